/** JSON frames of `/api/v1/stream`, typed by the service's OpenAPI document (its webhook `stream-server`). */

import type { components } from "../api/schema";
import type { Answer } from "../api/types";

type Schemas = components["schemas"];

export type ClientMessage = Pick<Schemas["Subscribe"], "type" | "id" | "topic">;
export type Topic = Schemas["Subscribe"]["topic"];
/** This page asks for hits in binary, so that `HitItems` never comes. */
export type ServerMessage = Answer<Schemas["Subscribed"] | Schemas["Status"] | Schemas["Gap"] | Schemas["StreamError"] | Schemas["Bye"]>;
/** What concerns the page; the connection handles the others itself. */
export type StreamMessage = Exclude<ServerMessage, { type: "subscribed" | "bye" }>;

const TYPES: ReadonlySet<string> = new Set<ServerMessage["type"]>(["subscribed", "status", "gap", "error", "bye"]);

/** Reads a text frame; null for what this version does not know. */
export function parseServerMessage(text: string): ServerMessage | null {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    return null;
  }
  const type = typeof value === "object" && value !== null && "type" in value ? value.type : null;
  return typeof type === "string" && TYPES.has(type) ? (value as ServerMessage) : null;
}
