import { describe, expect, test } from "vitest";
import type { HitBatch } from "../src/live/codec";
import type { StreamMessage, Topic } from "../src/live/messages";
import { LiveStream, type LinkState, type Socket, type StreamEvents, type StreamWorld } from "../src/live/stream";
import { batchFrame } from "./batches";

class FakeSocket implements Socket {
  binaryType = "";
  onopen: (() => void) | null = null;
  onmessage: ((event: { data: unknown }) => void) | null = null;
  onclose: (() => void) | null = null;
  sent: unknown[] = [];
  closed = false;
  send(text: string): void {
    this.sent.push(JSON.parse(text));
  }
  close(): void {
    this.closed = true;
    this.onclose?.();
  }
  say(message: unknown): void {
    this.onmessage?.({ data: JSON.stringify(message) });
  }
}

class World implements StreamWorld {
  sockets: FakeSocket[] = [];
  timers: { ms: number; call: () => void }[] = [];
  refuse = false;
  tickets = 0;
  ticket: StreamWorld["ticket"] = async () => {
    this.tickets += 1;
    if (this.refuse) {
      const problem = { title: "", detail: "no", status: 0, code: "unreachable", reason: "", hint: "", suggestions: [], caret: "" };
      return { ok: false, problem };
    }
    return { ok: true, value: `t${this.tickets}` };
  };
  socket(): Socket {
    const s = new FakeSocket();
    this.sockets.push(s);
    return s;
  }
  now = (): number => 1000;
  later(ms: number, call: () => void): () => void {
    const timer = { ms, call };
    this.timers.push(timer);
    return () => {
      this.timers = this.timers.filter((t) => t !== timer);
    };
  }
  random = (): number => 0.5;
  fire(): number {
    const timer = this.timers.shift();
    if (!timer) throw new Error("no timer runs");
    timer.call();
    return timer.ms;
  }
}

class Log implements StreamEvents {
  states: LinkState[] = [];
  topics: Topic[] = [];
  batches: HitBatch[] = [];
  messages: StreamMessage[] = [];
  problems: string[] = [];
  state(s: LinkState): void {
    this.states.push(s);
  }
  subscribed(t: Topic): void {
    this.topics.push(t);
  }
  batch(b: HitBatch): void {
    this.batches.push(b);
  }
  message(m: StreamMessage): void {
    this.messages.push(m);
  }
  malformed(why: string): void {
    this.problems.push(why);
  }
  get last(): string {
    return this.states.at(-1)?.kind ?? "";
  }
}

async function started(): Promise<{ world: World; log: Log; stream: LiveStream; settle: () => Promise<void> }> {
  const world = new World();
  const log = new Log();
  const stream = new LiveStream(world, log);
  const settle = async (): Promise<void> => {
    for (let i = 0; i < 5; i++) await Promise.resolve();
  };
  stream.start();
  await settle();
  return { world, log, stream, settle };
}

describe("the live stream", () => {
  test("subscribes to all topics on one socket and is live once the service says so", async () => {
    const { world, log } = await started();
    const socket = world.sockets[0]!;
    socket.onopen?.();
    expect(socket.binaryType).toBe("arraybuffer");
    expect(socket.sent).toEqual(["hosts", "probes", "hits", "aggregates"].map((t) => ({ type: "subscribe", id: t, topic: t })));
    expect(log.last).toBe("connecting");
    socket.say({ type: "subscribed", id: "probes", number: 1 });
    expect(log.last).toBe("live");
    expect(log.topics).toEqual(["probes"]);
  });

  test("passes batches and messages on, and reports what it cannot read", async () => {
    const { world, log } = await started();
    const socket = world.sockets[0]!;
    socket.onmessage?.({ data: batchFrame({ count: 3 }) });
    socket.say({ type: "gap", id: "hits", probe: "p", host: "h", count: 4, stage: "tracer-ring" });
    socket.onmessage?.({ data: new ArrayBuffer(24) });
    socket.onmessage?.({ data: "{" });
    socket.say({ type: "of the future" });
    expect(log.batches.map((b) => b.count)).toEqual([3]);
    expect(log.messages).toMatchObject([{ type: "gap", count: 4 }]);
    expect(log.problems).toHaveLength(3);
    expect(log.last).toBe("connecting");
  });

  test("comes back after a cut with growing waits, a new ticket each, and starts small again once it was live", async () => {
    const { world, log, settle } = await started();
    const waits: number[] = [];
    for (let i = 0; i < 4; i++) {
      world.sockets.at(-1)!.close();
      expect(log.last).toBe("waiting");
      waits.push(world.fire());
      await settle();
    }
    expect(waits).toEqual([...waits].sort((a, b) => a - b));
    expect(new Set(waits).size).toBe(4);
    expect(world.tickets).toBe(5);
    world.sockets.at(-1)!.say({ type: "subscribed", id: "hits", number: 1 });
    world.sockets.at(-1)!.close();
    expect(world.fire()).toBe(waits[0]);
  });

  test("waits at least as long as a parting service asks", async () => {
    const { world } = await started();
    world.sockets[0]!.say({ type: "bye", reason: "restart", retry_after: 9 });
    world.sockets[0]!.close();
    expect(world.fire()).toBe(9000);
  });

  test("tries again when there is no ticket to be had, and says why", async () => {
    const { world, log, settle } = await started();
    world.refuse = true;
    world.sockets[0]!.close();
    world.fire();
    await settle();
    expect(world.sockets).toHaveLength(1);
    expect(log.states.at(-1)).toMatchObject({ kind: "waiting", problem: { code: "unreachable" } });
  });

  test("can be told to try now, once", async () => {
    const { world, stream, settle } = await started();
    world.sockets[0]!.close();
    stream.retryNow();
    stream.retryNow();
    await settle();
    expect(world.timers).toHaveLength(0);
    expect(world.sockets).toHaveLength(2);
  });

  test("stops for good, even while a ticket is on its way", async () => {
    const { world, log, stream, settle } = await started();
    world.sockets[0]!.close();
    stream.retryNow();
    stream.stop();
    await settle();
    expect(world.sockets).toHaveLength(1);
    expect(world.timers).toHaveLength(0);
    expect(log.last).toBe("stopped");
  });
});
