import { describe, expect, test } from "vitest";
import { toProblem } from "../src/api/problem";
import { ColourBook } from "../src/state/colours";
import { callsLine, captured, clock, countdown, nanoseconds, quoted, rate, short, word } from "../src/ui/format";

test.each([
  [0, "0"],
  [9_999, "9,999"],
  [10_000, "10.0k"],
  [123_456, "123k"],
  [1_234_567, "1.23M"],
])("%d hits are shown as %s", (n, text) => {
  expect(short(n)).toBe(text);
});

test("rates, times and countdowns", () => {
  expect([rate(0), rate(0.33), rate(12.7)]).toEqual(["0", "0.3", "13"]);
  expect([nanoseconds(null), nanoseconds(840), nanoseconds(11_240), nanoseconds(2_500_000)]).toEqual(["–", "840 ns", "11.2 µs", "2.5 ms"]);
  expect([countdown(-3), countdown(95), countdown(3600), countdown(90_000)]).toEqual(["0:00", "1:35", "1 h 0 min", "1 d 1 h"]);
});

test("a clock shows microseconds of the wall time", () => {
  const noon = new Date(2026, 0, 2, 12, 34, 56).getTime();
  expect(clock(BigInt(noon) * 1_000_000n + 7_008_999n)).toBe("12:34:56.007008");
  expect(clock(BigInt(noon + 1000) * 1_000_000n)).toBe("12:34:57.000000");
});

test("words: small ones decimal, -1 as such, addresses in hex", () => {
  expect([word(0n), word(4096n), word(2n ** 64n - 1n), word(0x7f3c5a10e8c0n)]).toEqual(["0", "4096", "-1", "0x7f3c5a10e8c0"]);
});

test("strings stay on one line, and say when they were cut", () => {
  expect(quoted('a"b\n\u0000\u2028')).toBe('"a\\"b\\n\\x00\\x2028"');
  expect(captured({ name: "s", value: "GET", status: "truncated" })).toBe('"GET"…');
  expect(captured({ name: "s", value: null, status: "fault" })).toBe("fault");
});

describe("problems", () => {
  test("are read from a body of any shape", () => {
    expect(toProblem({ detail: "no symbol", suggestions: ["malloc", 3] }, 422)).toMatchObject({ detail: "no symbol", status: 422, suggestions: ["malloc"] });
    expect(toProblem("<html>", 502).detail).toContain("502");
    expect(toProblem(null).detail).not.toBe("");
  });

  test("of an answer's inside bring their own caret", () => {
    expect(toProblem({ detail: "d", text: "a:b", position: 2 }).caret).toBe("a:b\n  ^");
  });
});

test("eight probes have eight colours, which stay theirs", () => {
  const book = new ColourBook();
  const first = Array.from({ length: 8 }, (_, i) => book.of(`p${i}`));
  expect(new Set(first).size).toBe(8);
  expect(book.of("p3")).toBe(first[3]);
});

test("what a return probe has not seen return", () => {
  const status = (calls: number, hits: number, reasons: Record<string, number>) =>
    ({
      spec: { kind: "ur" },
      status: {
        counters: { calls, hits, filtered: 0, limited: 0, unreturned: Object.values(reasons).reduce((a, b) => a + b, 0) },
        unreturned_by_reason: reasons,
      },
    }) as unknown as Parameters<typeof callsLine>[0];
  expect(callsLine(status(1050, 1000, { abandoned: 48 }))).toBe("Of 1,050 calls, not seen to return: 48 abandoned, 2 in flight");
  expect(callsLine(status(10, 10, {}))).toBe("");
  expect(callsLine({ ...status(10, 1, {}), spec: { kind: "u" } } as never)).toBe("");
});
