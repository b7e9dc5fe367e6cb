/** What an aggregate's figures look like: keys, bounds of buckets, lengths of bars. */

import type { AggregateTable } from "../api/types";
import { nanoseconds, quoted, whole } from "./format";

export type Row = AggregateTable["rows"][number];
type Value = Row["value"];

/** A value that was grouped by or counted; a faulty one says why in angle brackets. */
export function keyText(value: Value, status: string): string {
  if (value === null) return `<${status || "none"}>`;
  if (value === "") return '""';
  const text = typeof value === "string" && !/^-?\d+$/.test(value) ? quoted(value).slice(1, -1) : String(value);
  return text + (status === "truncated" ? "…" : "");
}

/** A figure: whole numbers grouped, others with what matters of them. */
export function figure(value: Value): string {
  if (value === null) return "–";
  if (typeof value === "string") return value.replace(/\B(?=(\d{3})+(?!\d))/g, ",");
  if (Number.isInteger(value) || Math.abs(value) >= 1000) return whole(value);
  return Math.abs(value) >= 1 ? value.toFixed(1) : value.toPrecision(3);
}

/** Whether what is measured is a time in nanoseconds. */
export const isTime = (table: AggregateTable): boolean => table.aggregate.value === "latency";

/** A figure in the unit of what is measured. */
export const measured = (table: AggregateTable, value: Value): string => (isTime(table) && typeof value === "number" ? nanoseconds(value) : figure(value));

const UNITS: readonly [bigint, string][] = [
  [1n << 40n, "T"],
  [1n << 30n, "G"],
  [1n << 20n, "M"],
  [1n << 10n, "K"],
];

/** A bound of a bucket: powers of two as 4K, 2M; of times as time. */
export function bound(table: AggregateTable, value: Value): string {
  if (value === null) return "…";
  if (isTime(table)) return nanoseconds(Number(value));
  const n = BigInt(value);
  const size = n < 0n ? -n : n;
  for (const [unit, name] of UNITS) if (size >= unit && n % unit === 0n) return `${n / unit}${name}`;
  return n.toString();
}

/** A bucket's values: one, or from and to. */
export function bucketText(table: AggregateTable, bucket: Row["buckets"][number]): string {
  const { low, high } = bucket;
  if (low !== null && high !== null && !isTime(table) && BigInt(high) - BigInt(low) === 1n) return bound(table, low);
  if (low === null) return `< ${bound(table, high)}`;
  if (high === null) return `≥ ${bound(table, low)}`;
  return `${bound(table, low)} – ${bound(table, high)}`;
}

/** A share of the largest, in percent of a bar's length; what there is at all is seen. */
export const share = (count: number, most: number): number => (count <= 0 || most <= 0 ? 0 : Math.max(1, (count / most) * 100));

const NAMES: Record<string, string> = { "0": "min", "0.5": "median", "1": "max" };

/** Names of quantiles in their order: `min`, `median`, `90 %`, `max`. */
export const quantileNames = (row: Row): [share: string, name: string][] =>
  Object.keys(row.quantiles)
    .sort((a, b) => Number(a) - Number(b))
    .map((q) => [q, NAMES[q] ?? `${Number((Number(q) * 100).toFixed(3))} %`]);

/** Hits without a value, in words: `3 null, 1 fault`. */
export const badText = (row: Row): string =>
  Object.entries(row.bad)
    .map(([status, n]) => `${whole(n)} ${status}`)
    .join(", ");
