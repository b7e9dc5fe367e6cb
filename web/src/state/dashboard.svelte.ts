/**
 * What the page knows: hosts, probes, the connection, and the tail. One object per signed-in session.
 *
 * The stream is the source; HTTP is asked once per (re)connection to find out what is gone, and for what people ask.
 */

import { SvelteMap } from "svelte/reactivity";
import { Api, type Identity } from "../api/client";
import type { AggregateTable, Host, Probe, ProbeCreate, Problem } from "../api/types";
import type { HitBatch } from "../live/codec";
import type { StreamMessage, Topic } from "../live/messages";
import { RateMeter, latestRate } from "../live/rates";
import { LiveStream, browserWorld, type LinkState, type StreamEvents } from "../live/stream";
import { LiveTail, type TailSnapshot } from "../live/tail";
import { ColourBook } from "./colours";

/** Painting is what costs: 30 times a second is smooth for text. */
const FRAME_MS = 33;

export class Dashboard implements StreamEvents {
  readonly hosts = new SvelteMap<string, Host>();
  readonly probes = new SvelteMap<string, Probe>();
  /** What probes with an aggregate come to, by probe. */
  readonly aggregates = new SvelteMap<string, AggregateTable>();
  readonly tail = new LiveTail();
  readonly colours = new ColourBook();
  link = $state.raw<LinkState>({ kind: "connecting", attempt: 0 });
  snapshot = $state.raw<TailSnapshot>(this.tail.snapshot());
  rates = $state.raw<ReadonlyMap<string, readonly number[]>>(new Map());
  /** Ticks once a second. */
  nowMs = $state(Date.now());
  /** The probe that the tail is narrowed to. */
  shownProbe = $state<string | null>(null);
  /** Both lists have been loaded once. */
  loaded = $state(false);
  /** What the stream last complained of, or sent that could not be read. */
  streamNote = $state("");
  /** The text in the composer. */
  draft = $state("");

  private readonly stream: LiveStream;
  private readonly meter = new RateMeter();
  private readonly heard = { hosts: new Set<string>(), probes: new Set<string>() };
  private loads = 0;
  private wasLive = false;
  private frame = 0;
  private ticker = 0;
  private lastTickMs = performance.now();

  constructor(
    readonly api: Api,
    readonly identity: Identity,
  ) {
    this.stream = new LiveStream(browserWorld(api.base, () => api.streamTicket()), this);
  }

  start(): void {
    this.stream.start();
    this.ticker = window.setInterval(() => this.tick(), 1000);
    let lastPaint = 0;
    const paint = (at: number): void => {
      this.frame = requestAnimationFrame(paint);
      if (at - lastPaint < FRAME_MS || this.tail.version === this.snapshot.version) return;
      lastPaint = at;
      this.snapshot = this.tail.snapshot();
    };
    this.frame = requestAnimationFrame(paint);
  }

  stop(): void {
    this.stream.stop();
    clearInterval(this.ticker);
    cancelAnimationFrame(this.frame);
  }

  retryNow(): void {
    this.stream.retryNow();
  }

  // --- what people see of it ---------------------------------------------------------------------------------------

  /** The probe that is looked at, where it has an aggregate. */
  get shownAggregate(): Probe | null {
    const probe = this.shownProbe === null ? undefined : this.probes.get(this.shownProbe);
    return probe?.spec.aggregate ? probe : null;
  }

  get hostList(): Host[] {
    return [...this.hosts.values()].sort((a, b) => Number(b.online) - Number(a.online) || a.facts.name.localeCompare(b.facts.name));
  }

  /** Newest first. */
  get probeList(): Probe[] {
    return [...this.probes.values()].sort((a, b) => b.created_at.localeCompare(a.created_at) || b.id.localeCompare(a.id));
  }

  hostName(id: string): string {
    return this.hosts.get(id)?.facts.name ?? id;
  }

  probeName(id: string): string {
    return this.probes.get(id)?.name ?? id;
  }

  rateOf(probe: string): number {
    return latestRate(this.rates.get(probe));
  }

  // --- what people do ------------------------------------------------------------------------------------------------

  async arm(body: ProbeCreate): Promise<Problem | Probe> {
    const result = await this.api.createProbe(body);
    if (!result.ok) return result.problem;
    // The stream may have told of it already, and later than this answer.
    if (!this.probes.has(result.value.id)) this.putProbe(result.value);
    // It sends no hits: what there is to see of it is what they add up to.
    if (result.value.spec.aggregate) this.showProbe(result.value.id);
    return result.value;
  }

  async remove(id: string): Promise<Problem | null> {
    const result = await this.api.deleteProbe(id);
    if (result.ok) {
      if (this.probes.has(id)) this.putProbe(result.value);
      return null;
    }
    if (result.problem.status === 404) {
      this.forgetProbe(id); // somebody else was quicker
      return null;
    }
    return result.problem;
  }

  showProbe(id: string | null): void {
    this.shownProbe = id;
    this.tail.filter(id === null ? null : new Set([id]));
    this.snapshot = this.tail.snapshot();
  }

  togglePause(): void {
    if (this.snapshot.paused) this.tail.resume();
    else this.tail.pause();
    this.snapshot = this.tail.snapshot();
  }

  clearTail(): void {
    this.tail.clear();
    this.snapshot = this.tail.snapshot();
  }

  // --- StreamEvents --------------------------------------------------------------------------------------------------

  state(state: LinkState): void {
    if (this.wasLive && state.kind !== "live") this.tail.disconnected();
    this.wasLive = state.kind === "live";
    this.link = state;
  }

  subscribed(topic: Topic): void {
    if (topic === "hits" || topic === "aggregates") return;
    this.heard[topic].clear();
    void this.reconcile(topic);
  }

  batch(batch: HitBatch): void {
    this.tail.batch(batch, Date.now());
    this.meter.add(batch.header.probe, batch.count);
  }

  message(message: StreamMessage): void {
    if (message.type === "gap") {
      this.tail.gap({ probe: message.probe, host: message.host, count: message.count, stage: message.stage, atMs: Date.now() });
      this.meter.add(message.probe, message.count);
    } else if (message.type === "status") {
      if (message.probe) this.putProbe(message.probe);
      if (message.host) {
        this.heard.hosts.add(message.host.id);
        this.hosts.set(message.host.id, message.host);
      }
      if (message.aggregate) this.putAggregate(message.aggregate);
      if (message.removed) {
        this.heard.probes.add(message.removed);
        this.forgetProbe(message.removed);
        this.hosts.delete(message.removed);
      }
    } else {
      this.streamNote = String(message.error["detail"] ?? "the stream reported an error");
    }
  }

  malformed(why: string): void {
    this.streamNote = why;
  }

  // --- inside --------------------------------------------------------------------------------------------------------

  private putProbe(probe: Probe): void {
    this.heard.probes.add(probe.id);
    this.probes.set(probe.id, probe);
  }

  private putAggregate(table: AggregateTable): void {
    const before = this.aggregates.get(table.probe);
    // What was there when this page came is not of this second.
    if (before && table.count > before.count) this.meter.add(table.probe, table.count - before.count);
    this.aggregates.set(table.probe, table);
  }

  private forgetProbe(id: string): void {
    this.probes.delete(id);
    this.aggregates.delete(id);
    if (this.shownProbe === id) this.showProbe(null);
  }

  /** The list says what is there now; what it does not name, and the stream has not named since, is gone. */
  private async reconcile(topic: "hosts" | "probes"): Promise<void> {
    const heard = this.heard[topic];
    if (topic === "hosts") {
      const result = await this.api.hosts();
      if (!result.ok) return;
      this.merge(this.hosts, result.value, heard, (id) => this.hosts.delete(id));
    } else {
      const result = await this.api.probes();
      if (!result.ok) return;
      this.merge(this.probes, result.value, heard, (id) => this.forgetProbe(id));
    }
    this.loads += 1;
    if (this.loads >= 2) this.loaded = true;
  }

  private merge<T extends { id: string }>(known: Map<string, T>, list: T[], heard: Set<string>, forget: (id: string) => void): void {
    const named = new Set(list.map((item) => item.id));
    for (const id of [...known.keys()]) if (!named.has(id) && !heard.has(id)) forget(id);
    for (const item of list) if (!heard.has(item.id)) known.set(item.id, item);
  }

  private tick(): void {
    const at = performance.now();
    this.rates = this.meter.tick((at - this.lastTickMs) / 1000);
    this.lastTickMs = at;
    this.nowMs = Date.now();
  }
}
