import { describe, expect, test } from "vitest";
import { HitRing, type TailRow } from "../src/live/ring";
import { batch } from "./batches";

const seqs = (rows: TailRow[]): (number | string)[] => rows.map((r) => (r.kind === "hit" ? r.seq : `gap ${r.count}`));
const all = (ring: HitRing): (number | string)[] => seqs(ring.rows(ring.first, ring.end));
const gap = (count: number, probe = "prb_a") => ({ probe, host: "hst_a", count, stage: "tracer-ring", atMs: 0 });

describe("a ring of hits", () => {
  test("gives rows by absolute number, across batches", () => {
    const ring = new HitRing();
    ring.pushBatch(batch({ seq: 0, count: 3 }));
    ring.pushBatch(batch({ seq: 3, count: 2 }));
    expect(all(ring)).toEqual([0, 1, 2, 3, 4]);
    expect(seqs(ring.rows(2, 4))).toEqual([2, 3]);
    expect(ring.rows(0, 1)[0]).toMatchObject({ kind: "hit", key: 0, pid: 7, site: "app:f" });
    expect(ring.rows(5, 9)).toEqual([]);
  });

  test("lets the oldest batches go, whole, and keeps its numbering", () => {
    const ring = new HitRing({ maxRows: 10, maxBytes: 1 << 20 });
    for (let i = 0; i < 6; i++) ring.pushBatch(batch({ seq: 4 * i, count: 4 }));
    expect([ring.first, ring.end, ring.size]).toEqual([16, 24, 8]);
    expect(all(ring)).toEqual([16, 17, 18, 19, 20, 21, 22, 23]);
    expect(seqs(ring.rows(0, 18))).toEqual([16, 17]);
  });

  test("is bounded in bytes too, but never empty after a push", () => {
    const ring = new HitRing({ maxRows: 1 << 20, maxBytes: 10 });
    ring.pushBatch(batch({ count: 5 }));
    ring.pushBatch(batch({ seq: 5, count: 5 }));
    expect(all(ring)).toEqual([5, 6, 7, 8, 9]);
  });

  test("stays right through thousands of evictions", () => {
    const ring = new HitRing({ maxRows: 50, maxBytes: 1 << 20 });
    for (let i = 0; i < 5000; i++) ring.pushBatch(batch({ seq: i }));
    expect(all(ring)).toEqual(Array.from({ length: 50 }, (_, i) => 4950 + i));
  });

  test("joins gaps that follow one another and are of one kind", () => {
    const ring = new HitRing();
    ring.pushBatch(batch());
    ring.pushGap(gap(5));
    ring.pushGap(gap(7));
    ring.pushGap(gap(1, "prb_b"));
    expect(all(ring)).toEqual([0, "gap 12", "gap 1"]);
  });

  test("selects by probe, and the selection leads its own life", () => {
    const ring = new HitRing();
    ring.pushBatch(batch({ seq: 0, probe: "prb_a" }));
    ring.pushBatch(batch({ seq: 90, probe: "prb_b" }));
    ring.pushGap(gap(2));
    const only = ring.select((p) => p === "prb_a");
    expect(all(only)).toEqual([0, "gap 2"]);
    only.pushGap(gap(3));
    expect(all(only)).toEqual([0, "gap 5"]);
    expect(all(ring)).toEqual([0, 90, "gap 2"]);
  });

  test("takes over what another holds", () => {
    const ring = new HitRing();
    const other = new HitRing();
    ring.pushBatch(batch({ seq: 0 }));
    other.pushBatch(batch({ seq: 1, count: 2 }));
    ring.take(other);
    expect(all(ring)).toEqual([0, 1, 2]);
    expect(other.size).toBe(0);
  });
});
