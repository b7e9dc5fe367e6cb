/** JSON frames of `/api/v1/stream`; the source is `trapline/protocol/stream.py`. */

import type { Host, Probe } from "../api/types";

export type Topic = "hits" | "probes" | "hosts";

export interface Subscribe {
  type: "subscribe";
  id: string;
  topic: Topic;
}

export type ServerMessage =
  | { type: "subscribed"; id: string; number: number }
  | { type: "status"; id: string; probe?: Probe | null; host?: Host | null; removed?: string | null }
  | { type: "gap"; id: string; probe: string; host: string; count: number; stage: string }
  | { type: "error"; id: string; error: Record<string, unknown> }
  | { type: "bye"; reason: string; retry_after: number };

const TYPES = new Set(["subscribed", "status", "gap", "error", "bye"]);

/** Reads a text frame; null for what this version does not know. */
export function parseServerMessage(text: string): ServerMessage | null {
  const value: unknown = JSON.parse(text);
  if (typeof value !== "object" || value === null) return null;
  const type = (value as { type?: unknown }).type;
  return typeof type === "string" && TYPES.has(type) ? (value as ServerMessage) : null;
}
