/** Hits per second of each probe, as they arrive: one bucket a second, the last minute. */

export const HISTORY_SECONDS = 60;
const SMOOTHED_SECONDS = 3;

export class RateMeter {
  private readonly current = new Map<string, number>();
  private history = new Map<string, readonly number[]>();

  /** `count` hits of a probe, delivered or lost. */
  add(probe: string, count: number): void {
    this.current.set(probe, (this.current.get(probe) ?? 0) + count);
  }

  /** Closes the running bucket, which lasted `seconds`; gives each probe's last minute, oldest first. */
  tick(seconds: number): ReadonlyMap<string, readonly number[]> {
    const next = new Map<string, readonly number[]>();
    for (const probe of new Set([...this.history.keys(), ...this.current.keys()])) {
      const rate = (this.current.get(probe) ?? 0) / Math.max(seconds, 0.001);
      const buckets = [...(this.history.get(probe) ?? []), rate].slice(-HISTORY_SECONDS);
      if (buckets.some((b) => b > 0)) next.set(probe, buckets);
    }
    this.current.clear();
    this.history = next;
    return next;
  }
}

/** The mean of the last seconds of a history. */
export function latestRate(history: readonly number[] | undefined): number {
  if (!history || history.length === 0) return 0;
  const last = history.slice(-SMOOTHED_SECONDS);
  return last.reduce((a, b) => a + b, 0) / last.length;
}

/** Adds histories bucket by bucket, aligned at their ends. */
export function sumHistories(histories: Iterable<readonly number[]>): number[] {
  const sum: number[] = [];
  for (const h of histories) {
    while (sum.length < h.length) sum.unshift(0);
    h.forEach((v, i) => {
      const at = sum.length - h.length + i;
      sum[at] = (sum[at] ?? 0) + v;
    });
  }
  return sum;
}
