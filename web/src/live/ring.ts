/**
 * The live tail's memory: batches in the order they came, bounded in rows and bytes, addressed by absolute row number.
 *
 * Rows stay inside their batches; a view of some probes is a view of some batches, since a batch is of one probe. So adding
 * 2,000 hits costs one push, and only the rows on screen are ever made.
 */

import type { HitBatch, HitRow } from "./codec";

/** Hits that were lost, told where they would have been. */
export interface GapNote {
  probe: string;
  host: string;
  count: number;
  stage: string;
  atMs: number;
}

export type TailRow = ({ kind: "hit"; key: number } & HitRow) | ({ kind: "gap"; key: number } & GapNote);

interface Segment {
  /** Absolute number of its first row. */
  first: number;
  rows: number;
  batch: HitBatch | null;
  gap: GapNote | null;
}

export interface RingLimits {
  maxRows: number;
  maxBytes: number;
}

export const DEFAULT_LIMITS: RingLimits = { maxRows: 100_000, maxBytes: 64 * 1024 * 1024 };
const GAP_BYTES = 64;

export class HitRing {
  /** Changes with each change of content. */
  version = 0;
  private segments: Segment[] = [];
  private head = 0;
  private next = 0;
  private bytes = 0;

  constructor(private readonly limits: RingLimits = DEFAULT_LIMITS) {}

  /** Absolute number of the oldest row that is kept. */
  get first(): number {
    return this.segments[this.head]?.first ?? this.next;
  }

  /** One beyond the absolute number of the newest row. */
  get end(): number {
    return this.next;
  }

  get size(): number {
    return this.end - this.first;
  }

  pushBatch(batch: HitBatch): void {
    this.push({ first: this.next, rows: batch.count, batch, gap: null });
  }

  /** Adds a gap; it joins the one before it when that is of the same probe, host and stage. */
  pushGap(gap: GapNote): void {
    const last = this.segments.at(-1)?.gap;
    if (this.size > 0 && last && last.probe === gap.probe && last.host === gap.host && last.stage === gap.stage) {
      last.count += gap.count;
      this.version += 1;
      return;
    }
    this.push({ first: this.next, rows: 1, batch: null, gap: { ...gap } });
  }

  clear(): void {
    this.segments = [];
    this.head = 0;
    this.bytes = 0;
    this.version += 1;
  }

  /** Moves everything of `other` behind what is here. */
  take(other: HitRing): void {
    for (const s of other.segments.slice(other.head)) this.push({ ...s, first: this.next });
    other.clear();
  }

  /** A new ring with the rows of these probes only. */
  select(keep: (probe: string) => boolean): HitRing {
    const out = new HitRing(this.limits);
    for (const s of this.segments.slice(this.head)) {
      if (keep(s.batch?.header.probe ?? s.gap?.probe ?? "")) {
        // Gaps are added to later: the copy needs its own.
        out.push({ ...s, first: out.next, gap: s.gap && { ...s.gap } });
      }
    }
    return out;
  }

  /** Rows [from, to) by absolute number, those that are still kept. */
  rows(from: number, to: number): TailRow[] {
    const out: TailRow[] = [];
    let n = Math.max(from, this.first);
    const stop = Math.min(to, this.end);
    for (let at = this.find(n); n < stop; at++) {
      const s = this.segments[at];
      if (!s) break;
      for (const last = Math.min(s.first + s.rows, stop); n < last; n++) {
        if (s.batch) out.push({ kind: "hit", key: n, ...s.batch.row(n - s.first) });
        else if (s.gap) out.push({ kind: "gap", key: n, ...s.gap });
      }
    }
    return out;
  }

  private push(segment: Segment): void {
    this.segments.push(segment);
    this.next += segment.rows;
    this.bytes += cost(segment);
    while (this.head < this.segments.length - 1 && (this.size > this.limits.maxRows || this.bytes > this.limits.maxBytes)) {
      this.bytes -= cost(this.segments[this.head]!);
      this.head += 1;
    }
    // Shifting an array for each batch would be quadratic; the dead part is cut off when it is the larger one.
    if (this.head > 512 && this.head * 2 > this.segments.length) {
      this.segments = this.segments.slice(this.head);
      this.head = 0;
    }
    this.version += 1;
  }

  /** Index of the segment that holds absolute row `n`. */
  private find(n: number): number {
    let low = this.head;
    let high = this.segments.length - 1;
    while (low < high) {
      const mid = (low + high + 1) >> 1;
      if (this.segments[mid]!.first <= n) low = mid;
      else high = mid - 1;
    }
    return low;
  }
}

function cost(s: Segment): number {
  return s.batch?.bytes ?? GAP_BYTES;
}
