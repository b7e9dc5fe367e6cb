import { describe, expect, test } from "vitest";
import { RateMeter, latestRate, sumHistories } from "../src/live/rates";
import { LiveTail } from "../src/live/tail";
import { batch } from "./batches";

function shown(tail: LiveTail): string[] {
  const { first, end } = tail.snapshot();
  return tail.rows(first, end).map((r) => (r.kind === "hit" ? `${r.probe} ${r.seq}` : `${r.probe} lost ${r.count} ${r.stage}`));
}

describe("the live tail", () => {
  test("a pause keeps what is shown and goes on counting", () => {
    const tail = new LiveTail();
    tail.batch(batch({ seq: 0 }), 0);
    tail.pause();
    tail.batch(batch({ seq: 1, count: 3 }), 0);
    expect(shown(tail)).toEqual(["prb_a 0"]);
    expect(tail.snapshot()).toMatchObject({ paused: true, pendingHits: 3, totalHits: 4 });
    tail.resume();
    expect(shown(tail)).toEqual(["prb_a 0", "prb_a 1", "prb_a 2", "prb_a 3"]);
    expect(tail.snapshot()).toMatchObject({ paused: false, pendingHits: 0, totalHits: 4 });
  });

  test("a filter holds for what is there and for what comes, and can be taken off", () => {
    const tail = new LiveTail();
    tail.batch(batch({ probe: "a" }), 0);
    tail.batch(batch({ probe: "b" }), 0);
    tail.filter(new Set(["b"]));
    tail.batch(batch({ probe: "b", seq: 1 }), 0);
    tail.batch(batch({ probe: "a", seq: 1 }), 0);
    expect(shown(tail)).toEqual(["b 0", "b 1"]);
    tail.filter(null);
    expect(shown(tail)).toEqual(["a 0", "b 0", "b 1", "a 1"]);
  });

  test("a filter set during a pause does not show what came since", () => {
    const tail = new LiveTail();
    tail.batch(batch({ probe: "a" }), 0);
    tail.pause();
    tail.batch(batch({ probe: "a", seq: 1 }), 0);
    tail.filter(new Set(["a"]));
    expect(shown(tail)).toEqual(["a 0"]);
  });

  test("what a cut cost shows in the sequence, once, less what the service told itself", () => {
    const tail = new LiveTail();
    tail.batch(batch({ seq: 0, count: 10 }), 0);
    tail.disconnected();
    tail.gap({ probe: "prb_a", host: "hst_a", count: 4, stage: "tracer-ring", atMs: 0 });
    tail.batch(batch({ seq: 30 }), 0);
    tail.batch(batch({ seq: 40 }), 0);
    expect(shown(tail).slice(10)).toEqual(["prb_a lost 4 tracer-ring", "prb_a lost 16 disconnected", "prb_a 30", "prb_a 40"]);
  });

  test("a cut without loss, and a source that is new after it, show no gap", () => {
    const tail = new LiveTail();
    tail.batch(batch({ seq: 0, count: 10 }), 0);
    tail.disconnected();
    tail.batch(batch({ seq: 10 }), 0);
    tail.batch(batch({ source: "src_b", seq: 500 }), 0);
    expect(shown(tail).slice(10)).toEqual(["prb_a 10", "prb_a 500"]);
  });

  test("clearing forgets rows, not the count", () => {
    const tail = new LiveTail();
    tail.batch(batch({ count: 5 }), 0);
    const before = tail.version;
    tail.clear();
    expect(shown(tail)).toEqual([]);
    expect(tail.snapshot().totalHits).toBe(5);
    expect(tail.version).not.toBe(before);
  });
});

describe("rates", () => {
  test("are hits over the real length of a bucket, and end at zero", () => {
    const meter = new RateMeter();
    meter.add("a", 50);
    expect(meter.tick(0.5).get("a")).toEqual([100]);
    expect(meter.tick(1).get("a")).toEqual([100, 0]);
    let history = meter.tick(1);
    for (let i = 0; i < 60; i++) history = meter.tick(1);
    expect(history.has("a")).toBe(false);
  });

  test("the latest is the mean of three seconds", () => {
    expect(latestRate([1000, 3, 0, 3])).toBe(2);
    expect(latestRate(undefined)).toBe(0);
  });

  test("add up aligned at the present", () => {
    expect(sumHistories([[1, 2, 3], [10]])).toEqual([1, 2, 13]);
  });
});
