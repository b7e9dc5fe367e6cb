/** Batches made here, for tests of what keeps and shows them. */

import { Encoder } from "@msgpack/msgpack";
import { decodeBatch, type HitBatch } from "../src/live/codec";

const encoder = new Encoder({ useBigInt64: true });

export interface BatchFields {
  probe?: string;
  host?: string;
  source?: string;
  seq?: number;
  count?: number;
}

/** A batch without captures; row i happened i µs after the first. */
export function batchFrame({ probe = "prb_a", host = "hst_a", source = "src_a", seq = 0, count = 1 }: BatchFields): ArrayBuffer {
  const columns = [["ts", "u64"], ["pid", "u32"], ["tid", "u32"], ["site", "u32"]].map(([name, type]) => ({ name, type }));
  const head = encoder.encode({
    host, probe, source, seq, count, t0: 0, t1: 0, clock_offset: 0n, columns, sites: ["app:f"], comms: {},
  });
  const pad = (n: number): number => Math.ceil(n / 8) * 8;
  const start = 8 + pad(8 + head.length);
  const column4 = pad(4 * count);
  const frame = new ArrayBuffer(start + 8 * count + 3 * column4);
  const view = new DataView(frame);
  view.setUint32(8, 0x31484c54, true);
  view.setUint32(12, head.length, true);
  new Uint8Array(frame).set(head, 16);
  for (let i = 0; i < count; i++) view.setBigUint64(start + 8 * i, BigInt(i) * 1000n, true);
  for (let i = 0; i < count; i++) view.setUint32(start + 8 * count + 4 * i, 7, true);
  return frame;
}

export const batch = (fields: BatchFields = {}): HitBatch => decodeBatch(batchFrame(fields));
