import { describe, expect, test } from "vitest";
import { CodecError, STREAM_PREFIX_BYTES, decodeBatch, decodeText, type HitRow } from "../src/live/codec";
import golden from "./golden-batches.json";

function frame(hex: string, prefix: number): ArrayBuffer {
  const out = new Uint8Array(prefix + hex.length / 2);
  for (let i = 0; i < hex.length; i += 2) out[prefix + i / 2] = parseInt(hex.slice(i, i + 2), 16);
  return out.buffer;
}

/** As JSON has it: what its numbers do not hold is text. */
function inJson(v: bigint | number | boolean | string | null): unknown {
  if (typeof v === "bigint") return v <= 2n ** 53n && v >= -(2n ** 53n) ? Number(v) : v.toString();
  if (typeof v !== "number" || Number.isFinite(v)) return v;
  return Number.isNaN(v) ? "nan" : v > 0 ? "inf" : "-inf";
}

/** A row as Python's `Hit` says it in JSON. */
function asHit(r: HitRow): Record<string, unknown> {
  const args: Record<string, unknown> = {};
  const status: Record<string, string> = {};
  for (const a of r.args) {
    args[a.name] = inJson(a.value);
    if (a.status !== "ok") status[a.name] = a.status;
  }
  const { probe, host, seq, pid, tid, comm, site } = r;
  return { probe, host, seq, ts_ns: r.tsNs.toString(), pid, tid, comm, site, args, status };
}

describe("batches of the Python codec", () => {
  for (const g of golden.batches) {
    test(g.name, () => {
      const batch = decodeBatch(frame(g.frame, STREAM_PREFIX_BYTES));
      expect(Array.from({ length: batch.count }, (_, i) => asHit(batch.row(i)))).toEqual(g.hits);
      expect(batch.header.drops).toEqual(g.drops);
      expect(batch.header.generation).toBe(g.generation);
    });
  }

  test("are laid over the frame, not copied", () => {
    const bytes = frame(golden.batches[0]!.frame, STREAM_PREFIX_BYTES);
    const batch = decodeBatch(bytes);
    const before = batch.row(0).tsNs;
    // The columns of a batch of one row: ts, pid, tid, site, 8 bytes each.
    new DataView(bytes).setBigUint64(bytes.byteLength - 32, 5_000_000_001n, true);
    expect(batch.row(0).tsNs - before).toBe(1n);
  });
});

describe("frames that are no batch", () => {
  for (const g of golden.malformed) {
    test(g.name, () => {
      expect(() => decodeBatch(frame(g.frame, STREAM_PREFIX_BYTES))).toThrow(CodecError);
    });
  }

  test("at an odd offset", () => {
    expect(() => decodeBatch(frame(golden.batches[0]!.frame, 4), 4)).toThrow(CodecError);
  });

  test("with any one byte changed, never anything but a batch or a CodecError", () => {
    const good = golden.batches.find((g) => g.name === "strings")!;
    for (let at = 0; at < good.frame.length / 2; at++) {
      const bytes = frame(good.frame, STREAM_PREFIX_BYTES);
      const view = new Uint8Array(bytes);
      view[STREAM_PREFIX_BYTES + at] = (view[STREAM_PREFIX_BYTES + at] ?? 0) ^ 0xff;
      let rows: unknown = [];
      try {
        const batch = decodeBatch(bytes);
        rows = Array.from({ length: batch.count }, (_, i) => batch.row(i));
      } catch (e) {
        expect(e).toBeInstanceOf(CodecError);
      }
      expect(Array.isArray(rows)).toBe(true);
    }
  });
});

test("text keeps a byte order mark and shows bytes that are no UTF-8", () => {
  expect(decodeText(new Uint8Array([0xef, 0xbb, 0xbf, 0x41]))).toBe("\ufeffA");
  expect(decodeText(new Uint8Array([0x41, 0xe2, 0x82, 0x41]))).toBe("A\\xe2\\x82A");
});
