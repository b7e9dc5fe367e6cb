/** A colour for each probe, the same in the list and in the tail; names of the CSS variables `--probe-0` to `--probe-7`. */

export const COLOURS = 8;

export class ColourBook {
  private readonly taken = new Map<string, number>();

  /** The probe's colour number; the least used one at its first call. */
  of(probe: string): number {
    const known = this.taken.get(probe);
    if (known !== undefined) return known;
    const uses = new Array<number>(COLOURS).fill(0);
    for (const c of this.taken.values()) uses[c] = (uses[c] ?? 0) + 1;
    const colour = uses.indexOf(Math.min(...uses));
    this.taken.set(probe, colour);
    return colour;
  }
}
