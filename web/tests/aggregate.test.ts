import { describe, expect, it } from "vitest";
import type { AggregateTable } from "../src/api/types";
import { badText, bound, bucketText, figure, keyText, measured, quantileNames, share } from "../src/ui/aggregate";

const table = (value = "arg0"): AggregateTable => ({
  probe: "prb_1",
  aggregate: { text: `hist(${value})`, function: "hist", value, parameters: [], by: [] },
  count: 0,
  keys: 0,
  rows: [],
  other: null,
  lost: 0,
  since: null,
  until: null,
  series: [],
  frames: [],
  hosts: [],
});
const row = (more: object): AggregateTable["rows"][number] => ({
  key: [], key_status: [], stacks: {}, count: 1, value: null, buckets: [], quantiles: {}, items: [], error: 0, bad: {}, ...more,
});

describe("figures", () => {
  it("are grouped, exact beyond 2^53, and short below 1", () => {
    expect([figure(1234567), figure("18446744073709551615"), figure(0.01234), figure(12.34), figure(1234.5), figure(null)]).toEqual([
      "1,234,567", "18,446,744,073,709,551,615", "0.0123", "12.3", "1,235", "–",
    ]);
  });
  it("are times where latency is measured", () => {
    expect(measured(table("latency"), 11_200)).toBe("11.2 µs");
    expect(measured(table(), 11_200)).toBe("11,200");
  });
});

it("keys say what they are not", () => {
  expect([keyText("nginx", ""), keyText("a\nb", ""), keyText("long", "truncated"), keyText(null, "fault"), keyText(7, ""), keyText("", "")]).toEqual([
    "nginx", "a\\nb", "long…", "<fault>", "7", '""',
  ]);
});

it("buckets are named by their bounds", () => {
  const text = (low: number | string | null, high: number | string | null, of = "arg0"): string => bucketText(table(of), { low, high, count: 1 });
  expect([text(0, 1), text(2, 4), text(1024, 2048), text(null, 5), text(100, null), text(1024, 2048, "latency")]).toEqual([
    "0", "2 – 4", "1K – 2K", "< 5", "≥ 100", "1.0 µs – 2.0 µs",
  ]);
  expect(text("9223372036854775808", "18446744073709551616")).toBe("8388608T – 16777216T");
  expect(bound(table(), -2048)).toBe("-2K");
});

it("a bar is seen where there is anything", () => {
  expect([share(0, 10), share(1, 1_000_000), share(5, 10), share(0, 0)]).toEqual([0, 1, 50, 0]);
});

it("quantiles are in order and have names", () => {
  expect(quantileNames(row({ quantiles: { "0.99": 1, "0": 1, "0.5": 1, "1": 1, "0.999": 1 } })).map(([, name]) => name)).toEqual([
    "min", "median", "99 %", "99.9 %", "max",
  ]);
  expect(badText(row({ bad: { null: 3, fault: 1 } }))).toBe("3 null, 1 fault");
});
