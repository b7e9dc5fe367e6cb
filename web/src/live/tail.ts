/**
 * What the live tail shows: a ring, a filter by probe, and a pause that goes on counting.
 *
 * Plain TypeScript, no reactivity: hits arrive far more often than the page is painted. The page asks for a snapshot once a
 * frame and only for the rows on screen.
 */

import type { HitBatch } from "./codec";
import { DEFAULT_LIMITS, HitRing, type GapNote, type RingLimits, type TailRow } from "./ring";

export interface TailSnapshot {
  version: number;
  first: number;
  end: number;
  paused: boolean;
  /** Hits that came since the pause. */
  pendingHits: number;
  /** Hits since the page was opened. */
  totalHits: number;
}

export class LiveTail {
  totalHits = 0;
  private readonly all: HitRing;
  private shown: HitRing;
  private readonly pending: HitRing;
  private pendingHits = 0;
  private isPaused = false;
  private keep: ((probe: string) => boolean) | null = null;
  private changes = 0;
  /** Next sequence number by probe and source. */
  private readonly expected = new Map<string, number>();
  /** (probe, source) pairs that were heard before a cut and not since: their first batch tells what was missed. */
  private readonly cut = new Set<string>();
  /** Losses that the service itself told of since the cut, by probe and host: they are no part of what the cut cost. */
  private readonly told = new Map<string, number>();

  constructor(limits: RingLimits = DEFAULT_LIMITS) {
    this.all = new HitRing(limits);
    this.shown = this.all;
    this.pending = new HitRing(limits);
  }

  batch(batch: HitBatch, nowMs: number): void {
    const h = batch.header;
    const source = `${h.probe}\n${h.source}`;
    const missed = h.seq - (this.expected.get(source) ?? h.seq);
    this.expected.set(source, h.seq + h.count);
    const place = `${h.probe}\n${h.host}`;
    if (this.cut.delete(source)) {
      const unexplained = missed - (this.told.get(place) ?? 0);
      this.gap({ probe: h.probe, host: h.host, count: unexplained, stage: "disconnected", atMs: nowMs });
      this.told.delete(place);
    }
    this.totalHits += h.count;
    if (this.isPaused) {
      this.pending.pushBatch(batch);
      this.pendingHits += h.count;
    } else {
      this.all.pushBatch(batch);
      if (this.shown !== this.all && this.keep?.(h.probe)) this.shown.pushBatch(batch);
    }
    this.changes += 1;
  }

  gap(gap: GapNote): void {
    if (gap.count <= 0) return;
    const place = `${gap.probe}\n${gap.host}`;
    if (this.cut.size > 0) this.told.set(place, (this.told.get(place) ?? 0) + gap.count);
    if (this.isPaused) {
      this.pending.pushGap(gap);
    } else {
      this.all.pushGap(gap);
      if (this.shown !== this.all && this.keep?.(gap.probe)) this.shown.pushGap(gap);
    }
    this.changes += 1;
  }

  /** The connection was lost: what came meanwhile shows in the sequence numbers of what comes next. */
  disconnected(): void {
    this.told.clear();
    for (const source of this.expected.keys()) this.cut.add(source);
  }

  pause(): void {
    this.isPaused = true;
    this.changes += 1;
  }

  resume(): void {
    this.isPaused = false;
    this.all.take(this.pending);
    this.pendingHits = 0;
    this.refilter();
  }

  clear(): void {
    this.all.clear();
    this.pending.clear();
    this.pendingHits = 0;
    this.refilter();
  }

  /** Shows these probes only; null shows all. */
  filter(probes: ReadonlySet<string> | null): void {
    this.keep = probes === null ? null : (id) => probes.has(id);
    this.refilter();
  }

  snapshot(): TailSnapshot {
    return {
      version: this.changes,
      first: this.shown.first,
      end: this.shown.end,
      paused: this.isPaused,
      pendingHits: this.pendingHits,
      totalHits: this.totalHits,
    };
  }

  get version(): number {
    return this.changes;
  }

  rows(from: number, to: number): TailRow[] {
    return this.shown.rows(from, to);
  }

  private refilter(): void {
    this.shown = this.keep === null ? this.all : this.all.select(this.keep);
    this.changes += 1;
  }
}
