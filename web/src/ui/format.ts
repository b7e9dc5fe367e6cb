/** Numbers, times and captured values as people read them. */

import type { Probe } from "../api/types";
import type { Captured } from "../live/codec";

const grouped = new Intl.NumberFormat("en-US");

/** 1234567 as `1,234,567`. */
export const whole = (n: number): string => grouped.format(Math.round(n));

/** 1234567 as `1.23M`; below 10,000 in full. */
export function short(n: number): string {
  if (Math.abs(n) < 10_000) return whole(n);
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]] as const) {
    if (Math.abs(n) >= size) {
      const v = n / size;
      return `${v.toFixed(v < 10 ? 2 : v < 100 ? 1 : 0)}${unit}`;
    }
  }
  return whole(n);
}

/** Hits a second: small rates keep a digit. */
export const rate = (n: number): string => (n > 0 && n < 10 ? n.toFixed(1) : short(n));

/** Nanoseconds as `11.2 µs`. */
export function nanoseconds(ns: number | null | undefined): string {
  if (ns === null || ns === undefined) return "–";
  if (ns < 1_000) return `${Math.round(ns)} ns`;
  if (ns < 1_000_000) return `${(ns / 1_000).toFixed(ns < 100_000 ? 1 : 0)} µs`;
  return `${(ns / 1_000_000).toFixed(1)} ms`;
}

export const plural = (n: number, one: string, many = `${one}s`): string => `${whole(n)} ${n === 1 ? one : many}`;

/** What a return probe has not seen return: `Of 50 calls, not seen to return: 48 abandoned, 2 in flight`. Empty where it has seen all. */
export function callsLine(probe: Pick<Probe, "spec" | "status">): string {
  const { counters, unreturned_by_reason: reasons } = probe.status;
  if (probe.spec.kind !== "ur") return "";
  const parts = Object.entries(reasons).map(([reason, n]) => `${whole(n)} ${reason}`);
  const inFlight = counters.calls - counters.hits - counters.filtered - counters.limited - counters.unreturned;
  if (inFlight > 0) parts.push(`${whole(inFlight)} in flight`);
  return parts.length ? `Of ${plural(counters.calls, "call")}, not seen to return: ${parts.join(", ")}` : "";
}

/** What a condition let go: `40 more did not match the condition`. Empty where there is none. */
export function filteredLine(probe: Pick<Probe, "spec" | "status">): string {
  const n = probe.status.counters.filtered;
  return probe.spec.condition || n ? `${whole(n)} more did not match the condition` : "";
}

/** Seconds until an expiry as `59:12`, `3 h 20 min` or `6 d`. */
export function countdown(seconds: number): string {
  const s = Math.max(0, Math.floor(seconds));
  if (s < 3600) return `${Math.floor(s / 60)}:${String(s % 60).padStart(2, "0")}`;
  if (s < 86_400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86_400)} d ${Math.floor((s % 86_400) / 3600)} h`;
}

let cachedSecond = -1;
let cachedText = "";

/** Wall clock ns as local `14:03:07.123456`. */
export function clock(tsNs: bigint): string {
  const us = Number(tsNs / 1000n);
  const second = Math.floor(us / 1_000_000);
  if (second !== cachedSecond) {
    const d = new Date(second * 1000);
    cachedText = [d.getHours(), d.getMinutes(), d.getSeconds()].map((n) => String(n).padStart(2, "0")).join(":");
    cachedSecond = second;
  }
  return `${cachedText}.${String(us - second * 1_000_000).padStart(6, "0")}`;
}

const I64 = 1n << 63n;
const U64 = 1n << 64n;
const POINTER = 1n << 32n;

/** A 64-bit word: small ones decimal, small negative ones with their sign, the rest (addresses, flags) in hex. */
export function word(v: bigint): string {
  if (v < POINTER) return v.toString();
  if (v >= I64 && U64 - v <= POINTER) return (v - U64).toString();
  return `0x${v.toString(16)}`;
}

/** All that a word can mean, for the tooltip. */
export function wordDetail(v: bigint): string {
  const parts = [v.toString(), `0x${v.toString(16)}`];
  if (v >= I64) parts.push((v - U64).toString());
  return parts.join("  ·  ");
}

const ESCAPES: Record<string, string> = { "\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"' };

/** A string between quotes, on one line. */
export function quoted(s: string): string {
  const body = s.replace(/[\u0000-\u001f\u007f-\u009f\u2028\u2029"]/g, (c) => ESCAPES[c] ?? `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`);
  return `"${body}"`;
}

export function captured(c: Captured): string {
  if (c.value === null) return c.status;
  const more = c.status === "truncated" ? "…" : "";
  if (typeof c.value === "bigint") return word(c.value) + more;
  return (typeof c.value === "string" ? quoted(c.value) : String(c.value)) + more;
}

export function basename(path: string): string {
  return path.slice(path.lastIndexOf("/") + 1) || path;
}

const STAGES: Record<string, string> = {
  "tracer-ring": "the tracer's ring was full",
  "tracer-capture": "the tracer failed to capture them; its log has the reason",
  "agent-outbox": "the agent's outbox was full",
  "subscriber-queue": "this page was slower than the stream",
  paused: "the stream was paused",
  unknown: "nobody said where",
  disconnected: "the connection was away",
};

/** Where hits were lost, in words. */
export const stageText = (stage: string): string => STAGES[stage] ?? stage;
