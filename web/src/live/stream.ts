/**
 * The live connection: ticket, socket, subscriptions, and coming back after a cut.
 *
 * Everything outside is handed in (tickets, sockets, timers, chance), so that tests drive it without a network.
 */

import { CodecError, decodeBatch, type HitBatch } from "./codec";
import { parseServerMessage, type ClientMessage, type StreamMessage, type Topic } from "./messages";
import type { Problem } from "../api/types";

export const SUBPROTOCOL = "trapline.v1.binary";
const TOPICS: readonly Topic[] = ["hosts", "probes", "hits", "aggregates"];
const BACKOFF_MS = { first: 500, factor: 1.8, most: 15_000 };

export type LinkState =
  | { kind: "connecting"; attempt: number }
  | { kind: "live" }
  | { kind: "waiting"; attempt: number; retryAtMs: number; problem: Problem | null }
  | { kind: "stopped" };

export interface StreamEvents {
  state(state: LinkState): void;
  /** A topic's subscription stands; after a cut it is called again. */
  subscribed(topic: Topic): void;
  batch(batch: HitBatch): void;
  message(message: StreamMessage): void;
  /** A frame that means nothing here; the connection stays. */
  malformed(why: string): void;
}

/** The part of WebSocket that is used. */
export interface Socket {
  binaryType: string;
  onopen: (() => void) | null;
  onmessage: ((event: { data: unknown }) => void) | null;
  onclose: (() => void) | null;
  send(text: string): void;
  close(): void;
}

export interface StreamWorld {
  ticket(): Promise<{ ok: true; value: string } | { ok: false; problem: Problem }>;
  socket(ticket: string): Socket;
  now(): number;
  /** Calls later; gives a way to call it off. */
  later(ms: number, call: () => void): () => void;
  random(): number;
}

export class LiveStream {
  private socket: Socket | null = null;
  private attempt = 0;
  private cancel: (() => void) | null = null;
  private running = false;
  private retryAfterMs = 0;
  /** Counts connections, so that the answer to an old ticket request finds out that it is old. */
  private era = 0;

  constructor(
    private readonly world: StreamWorld,
    private readonly events: StreamEvents,
  ) {}

  start(): void {
    if (this.running) return;
    this.running = true;
    void this.connect();
  }

  stop(): void {
    this.running = false;
    this.drop();
    this.events.state({ kind: "stopped" });
  }

  /** Tries now instead of when the wait is over. */
  retryNow(): void {
    if (this.running && this.socket === null && this.cancel !== null) {
      this.cancel();
      this.cancel = null;
      void this.connect();
    }
  }

  private async connect(): Promise<void> {
    const era = ++this.era;
    this.events.state({ kind: "connecting", attempt: this.attempt });
    const ticket = await this.world.ticket();
    if (!this.running || era !== this.era) return;
    if (!ticket.ok) {
      this.wait(ticket.problem);
      return;
    }
    const socket = this.world.socket(ticket.value);
    this.socket = socket;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      for (const topic of TOPICS) {
        const message: ClientMessage = { type: "subscribe", id: topic, topic };
        socket.send(JSON.stringify(message));
      }
    };
    socket.onmessage = ({ data }) => this.receive(data);
    socket.onclose = () => {
      if (this.socket !== socket) return;
      this.socket = null;
      this.wait(null);
    };
  }

  private receive(data: unknown): void {
    if (data instanceof ArrayBuffer) {
      try {
        this.events.batch(decodeBatch(data));
      } catch (e) {
        if (!(e instanceof CodecError)) throw e;
        this.events.malformed(e.message);
      }
      return;
    }
    const message = parseServerMessage(String(data));
    if (message === null) {
      this.events.malformed("unknown message");
    } else if (message.type === "subscribed") {
      this.attempt = 0; // it was a good connection: the next cut waits briefly again
      this.events.state({ kind: "live" });
      this.events.subscribed(message.id as Topic);
    } else if (message.type === "bye") {
      this.retryAfterMs = message.retry_after * 1000;
    } else {
      this.events.message(message);
    }
  }

  private wait(problem: Problem | null): void {
    if (!this.running) return;
    const full = Math.min(BACKOFF_MS.most, BACKOFF_MS.first * BACKOFF_MS.factor ** this.attempt);
    // Chance spreads the tabs of many people that lost the same service.
    const ms = Math.max(this.retryAfterMs, full * (0.75 + this.world.random() / 2));
    this.retryAfterMs = 0;
    this.attempt += 1;
    this.events.state({ kind: "waiting", attempt: this.attempt, retryAtMs: this.world.now() + ms, problem });
    this.cancel = this.world.later(ms, () => {
      this.cancel = null;
      void this.connect();
    });
  }

  private drop(): void {
    this.era += 1;
    this.cancel?.();
    this.cancel = null;
    const socket = this.socket;
    this.socket = null;
    socket?.close();
  }
}

/** The browser's own ticket, socket and clock. */
export function browserWorld(base: string, ticket: StreamWorld["ticket"]): StreamWorld {
  return {
    ticket,
    socket: (t) => {
      const address = `${base.replace(/^http/, "ws")}/api/v1/stream?ticket=${encodeURIComponent(t)}`;
      return new WebSocket(address, SUBPROTOCOL) as unknown as Socket;
    },
    now: () => Date.now(),
    later: (ms, call) => {
      const id = setTimeout(call, ms);
      return () => clearTimeout(id);
    },
    random: () => Math.random(),
  };
}
