/** Errors as values that a person can act on: what happened, to what, what to do next. */

import type { Problem } from "./types";

const asText = (v: unknown): string => (typeof v === "string" ? v : "");

/** Reads a problem+json body, or the wire form of an error inside an answer; never throws. */
export function toProblem(body: unknown, status = 0): Problem {
  const b = (typeof body === "object" && body !== null ? body : {}) as Record<string, unknown>;
  const text = asText(b["text"]);
  const position = b["position"];
  const detail = asText(b["detail"]) || asText(b["title"]);
  return {
    title: asText(b["title"]),
    detail: detail || (status ? `The service answered with status ${status}` : "Something went wrong"),
    status,
    code: asText(b["code"]),
    reason: asText(b["reason"]),
    hint: asText(b["hint"]),
    suggestions: Array.isArray(b["suggestions"]) ? b["suggestions"].filter((s) => typeof s === "string") : [],
    caret: asText(b["caret"]) || (text && typeof position === "number" ? `${text}\n${" ".repeat(position)}^` : ""),
  };
}

/** The service could not be asked at all. */
export function unreachable(): Problem {
  return {
    title: "The service does not answer",
    detail: "The service does not answer",
    status: 0,
    code: "unreachable",
    reason: "",
    hint: "Is it running? The dashboard goes on by itself once it is back.",
    suggestions: [],
    caret: "",
  };
}
