/**
 * Hit batches as `trapline/protocol/hits.py` encodes them, laid out in place: the columns are typed arrays over the
 * frame, nothing is copied, and a row is made only when somebody looks at it.
 */

import { Decoder } from "@msgpack/msgpack";

export const MAGIC = 0x31484c54; // "TLH1", little-endian
/** In front of a batch on the stream: u32 subscription number, u32 zero. */
export const STREAM_PREFIX_BYTES = 8;
const MAX_ROWS = 65_536;
const FIXED = ["ts:u64", "pid:u32", "tid:u32", "site:u32"];
const STATUS_SUFFIX = "?";

/** Order of `ValueStatus` in hits.py. */
const STATUS_TEXT = ["ok", "truncated", "null", "fault", "optimised-out", "redacted", "unsupported"];

export class CodecError extends Error {
  override name = "CodecError";
}

type ColumnType = "u64" | "u32" | "str" | "u8" | "i64" | "f64" | "bool" | "bytes" | "stack";
type ColumnData = BigUint64Array | BigInt64Array | Float64Array | Uint32Array | Uint8Array;
const EIGHT_BYTES: readonly ColumnType[] = ["u64", "i64", "f64"];
const ONE_BYTE: readonly ColumnType[] = ["u8", "bool"];

export interface BatchHeader {
  host: string;
  probe: string;
  source: string;
  /** Sequence number of the first row; row i is `seq + i` of (probe, source). */
  seq: number;
  count: number;
  /** CLOCK_MONOTONIC ns of the host. */
  t0: bigint;
  t1: bigint;
  /** CLOCK_REALTIME - CLOCK_MONOTONIC, in ns. */
  clockOffset: bigint;
  generation: number;
  sites: readonly string[];
  comms: Readonly<Record<number, string>>;
  /** Hits lost at the source since its last batch, by stage. */
  drops: Readonly<Record<string, number>>;
}

/** A captured value: an integer, a number, a truth value, a string (bytes: hex digits), or null where `status` says why. */
export interface Captured {
  name: string;
  value: bigint | number | boolean | string | null;
  status: string;
}

export interface HitRow {
  probe: string;
  host: string;
  seq: number;
  /** CLOCK_REALTIME ns. */
  tsNs: bigint;
  pid: number;
  tid: number;
  comm: string;
  site: string;
  args: Captured[];
}

interface CapturedColumn {
  name: string;
  data: ColumnData;
  type: ColumnType;
  status: Uint8Array;
}

/** One batch: its header and views of its columns. */
export class HitBatch {
  constructor(
    readonly header: BatchHeader,
    readonly bytes: number,
    private readonly ts: BigUint64Array,
    private readonly pids: Uint32Array,
    private readonly tids: Uint32Array,
    private readonly sites: Uint32Array,
    private readonly captured: readonly CapturedColumn[],
    private readonly strings: readonly Uint8Array[],
    private readonly files: Readonly<Record<number, string>>,
  ) {}

  get count(): number {
    return this.header.count;
  }

  /** Row `i` of 0..count-1 as values. */
  row(i: number): HitRow {
    const h = this.header;
    const pid = this.pids[i] ?? 0;
    return {
      probe: h.probe,
      host: h.host,
      seq: h.seq + i,
      tsNs: (this.ts[i] ?? 0n) + h.clockOffset,
      pid,
      tid: this.tids[i] ?? 0,
      comm: h.comms[pid] ?? "",
      site: h.sites[this.sites[i] ?? 0] ?? "",
      args: this.captured.map((c) => this.value(c, i)),
    };
  }

  private value(c: CapturedColumn, i: number): Captured {
    const code = c.status[i] ?? 0;
    const status = STATUS_TEXT[code] ?? `status-${code}`;
    if (code > 1) return { name: c.name, value: null, status };
    const raw = c.data[i] ?? 0;
    return { name: c.name, value: this.valueOf(c.type, raw), status };
  }

  private valueOf(type: ColumnType, raw: bigint | number): bigint | number | boolean | string {
    switch (type) {
      case "str":
        return decodeText(this.strings[Number(raw)] ?? new Uint8Array());
      case "stack":
        return stackText(this.strings[Number(raw)] ?? new Uint8Array(), this.files);
      case "bytes":
        return hexOf(this.strings[Number(raw)] ?? new Uint8Array());
      case "bool":
        return raw !== 0;
      case "f64":
        return Number(raw);
      default:
        return BigInt(raw);
    }
  }
}

const decoder = new Decoder({ useBigInt64: true });

/**
 * Reads a batch that begins at byte `at` of a frame; `at` must be a multiple of 8, as it is on the stream.
 * Throws CodecError where the frame contradicts the format or itself.
 */
export function decodeBatch(frame: ArrayBuffer, at = STREAM_PREFIX_BYTES): HitBatch {
  if (at % 8 !== 0) throw new CodecError(`hit batch at offset ${at} is not aligned to 8 bytes`);
  if (frame.byteLength < at + 8) throw new CodecError(`frame of ${frame.byteLength} bytes has no hit batch`);
  const view = new DataView(frame, at);
  if (view.getUint32(0, true) !== MAGIC) throw new CodecError("not a hit batch: wrong magic");
  const headLength = view.getUint32(4, true);
  if (at + 8 + headLength > frame.byteLength) {
    throw new CodecError(`header of ${headLength} bytes does not fit a frame of ${frame.byteLength}`);
  }
  const raw = readHeader(new Uint8Array(frame, at + 8, headLength));
  const count = Number(big(raw["count"]));
  const seq = Number(big(raw["seq"]));
  if (!(count > 0 && count <= MAX_ROWS) || !(seq >= 0)) throw new CodecError(`count ${count}, sequence ${seq}`);
  const strings = list(raw["strings"]).map(bytes);

  let offset = at + pad8(8 + headLength);
  const columns = new Map<string, { type: ColumnType; data: ColumnData }>();
  const declared = readColumns(raw["columns"]);
  for (const { name, type } of declared) {
    if (columns.has(name)) throw new CodecError(`column ${name} is there twice`);
    const size = count * (EIGHT_BYTES.includes(type) ? 8 : ONE_BYTE.includes(type) ? 1 : 4);
    if (offset + size > frame.byteLength) throw new CodecError(`column ${name} goes beyond the frame`);
    columns.set(name, { type, data: layOver(frame, offset, count, type) });
    offset += pad8(size);
  }
  if (offset !== frame.byteLength) {
    throw new CodecError(`frame of ${frame.byteLength} bytes should have ${offset}`);
  }
  const captured: CapturedColumn[] = [];
  for (const { name, type } of declared.slice(FIXED.length)) {
    if (name.endsWith(STATUS_SUFFIX)) continue;
    const status = columns.get(name + STATUS_SUFFIX)?.data;
    if (!(status instanceof Uint8Array)) throw new CodecError(`column ${name} has no status column`);
    captured.push({ name, data: columns.get(name)!.data, type, status });
  }
  const header: BatchHeader = {
    host: text(raw["host"]),
    probe: text(raw["probe"]),
    source: text(raw["source"]),
    seq,
    count,
    t0: big(raw["t0"]),
    t1: big(raw["t1"]),
    clockOffset: big(raw["clock_offset"]),
    generation: Number(raw["generation"] ?? 1),
    sites: list(raw["sites"]).map(text),
    comms: Object.fromEntries(entries(raw["comms"]).map(([pid, comm]) => [pid, text(comm)])),
    drops: Object.fromEntries(entries(raw["drops"]).map(([stage, n]) => [stage, Number(n)])),
  };
  return new HitBatch(
    header,
    frame.byteLength,
    columns.get("ts")!.data as BigUint64Array,
    columns.get("pid")!.data as Uint32Array,
    columns.get("tid")!.data as Uint32Array,
    columns.get("site")!.data as Uint32Array,
    captured,
    strings,
    Object.fromEntries(
      entries(raw["files"]).map(([number, file]) => [number, text(Object.fromEntries(entries(file))["path"])]),
    ),
  );
}

/** Order of `End` in trapline/protocol/stacks.py. */
const STACK_ENDS = ["complete", "limit", "no-unwind-info", "no-table-yet", "fault", "bad-pc", "loop", "unsupported"];

/** A packed stack (trapline/protocol/stacks.py) on one line, innermost frame first; files are by number. */
export function stackText(packed: Uint8Array, files: Readonly<Record<number, string>>): string {
  if (packed.length === 0 || packed.length % 8 !== 0) return "[malformed]";
  const words = new DataView(packed.buffer, packed.byteOffset, packed.byteLength);
  const names: string[] = [];
  for (let at = 8; at < packed.length; at += 8) {
    const file = (files[words.getUint32(at + 4, true)] ?? "").split("/").at(-1);
    const offset = `0x${words.getUint32(at, true).toString(16)}`;
    names.push(file ? `${file}+${offset}` : offset);
  }
  const end = words.getUint8(0);
  if (end > 1) names.push(`[${STACK_ENDS[end] ?? end}]`);
  return names.join(" <- ");
}

function readHeader(bytes: Uint8Array): Record<string, unknown> {
  let value: unknown;
  try {
    value = decoder.decode(bytes);
  } catch (e) {
    throw new CodecError(`malformed header: ${e instanceof Error ? e.message : String(e)}`);
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new CodecError("header is no map");
  return value as Record<string, unknown>;
}

function readColumns(value: unknown): { name: string; type: ColumnType }[] {
  const columns = list(value).map((c) => {
    const fields = Object.fromEntries(entries(c));
    return { name: text(fields["name"]), type: text(fields["type"]) as ColumnType };
  });
  FIXED.forEach((want, i) => {
    const c = columns[i];
    if (!c || `${c.name}:${c.type}` !== want) throw new CodecError(`column ${i} is not ${want}`);
  });
  return columns;
}

function layOver(frame: ArrayBuffer, offset: number, count: number, type: ColumnType): ColumnData {
  switch (type) {
    case "u64":
      return new BigUint64Array(frame, offset, count);
    case "i64":
      return new BigInt64Array(frame, offset, count);
    case "f64":
      return new Float64Array(frame, offset, count);
    case "u32":
    case "str":
    case "bytes":
    case "stack":
      return new Uint32Array(frame, offset, count);
    case "u8":
    case "bool":
      return new Uint8Array(frame, offset, count);
    default:
      throw new CodecError(`unknown column type ${String(type)}`);
  }
}

const pad8 = (n: number): number => (n + 7) & ~7;

// What a header's field must be; one that is something else makes the frame malformed.

function wrong(v: unknown, what: string): never {
  throw new CodecError(`header has ${typeof v} where ${what} belongs`);
}

const text = (v: unknown): string => (typeof v === "string" ? v : wrong(v, "a string"));
const bytes = (v: unknown): Uint8Array => (v instanceof Uint8Array ? v : wrong(v, "a byte string"));
const list = (v: unknown): unknown[] => (v === undefined ? [] : Array.isArray(v) ? v : wrong(v, "a list"));
const entries = (v: unknown): [string, unknown][] => (v === undefined ? [] : typeof v === "object" && v !== null ? Object.entries(v) : wrong(v, "a map"));

function big(v: unknown): bigint {
  if (typeof v === "bigint") return v;
  return Number.isInteger(v) ? BigInt(v as number) : wrong(v, "an integer");
}

const hexOf = (data: Uint8Array): string => Array.from(data, (b) => b.toString(16).padStart(2, "0")).join("");

const strictUtf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** Captured bytes as text; what is no UTF-8 becomes `\xNN`, as Python's `backslashreplace` does. */
export function decodeText(bytes: Uint8Array): string {
  try {
    return strictUtf8.decode(bytes);
  } catch {
    let out = "";
    for (let i = 0; i < bytes.length; ) {
      const length = validLength(bytes, i);
      if (length === 0) {
        out += `\\x${(bytes[i] ?? 0).toString(16).padStart(2, "0")}`;
        i += 1;
      } else {
        out += strictUtf8.decode(bytes.subarray(i, i + length));
        i += length;
      }
    }
    return out;
  }
}

/** Length of the well-formed sequence at `i`, 0 if there is none (Unicode 16, table 3-7). */
function validLength(b: Uint8Array, i: number): number {
  const lead = b[i] ?? 0;
  const length = lead < 0x80 ? 1 : lead >= 0xc2 && lead < 0xe0 ? 2 : lead >= 0xe0 && lead < 0xf0 ? 3 : lead >= 0xf0 && lead < 0xf5 ? 4 : 0;
  if (length === 0 || i + length > b.length) return 0;
  for (let k = 1; k < length; k++) {
    const c = b[i + k] ?? 0;
    let low = 0x80;
    let high = 0xbf;
    if (k === 1) {
      if (lead === 0xe0) low = 0xa0;
      else if (lead === 0xed) high = 0x9f;
      else if (lead === 0xf0) low = 0x90;
      else if (lead === 0xf4) high = 0x8f;
    }
    if (c < low || c > high) return 0;
  }
  return length;
}
