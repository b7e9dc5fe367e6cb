/**
 * The probe text taken apart just far enough to edit it with clicks: the location, the selector, the captures.
 *
 * The service's parser decides what is right (`trapline/spec.py` has the grammar); what this does not understand is kept word
 * by word.
 */

export interface Selector {
  key: string;
  value: string;
}

export interface ProbeParts {
  /** Name, kind, object and point. */
  head: string;
  where: Selector[];
  condition: string;
  captures: string[];
  aggregate: string;
  /** Text that belongs to no clause. */
  rest: string;
}

type Clause = "head" | "where" | "if" | "captures" | "aggregate" | "rest";

const KIND = /^\s*(?:[A-Za-z_][\w.-]*\s*=(?!=)\s*)?(?:(?:u|ur|usdt|uprobe|uretprobe):)?\s*/;
const WHERE = /^@(?=\s*[A-Za-z_]+\s*=)/;
const IF = /^if(?!\w)/;

/** Whether a text is of a return probe, whose captures are others. */
export const isReturn = (text: string): boolean => /(?:^|[\s=])(?:ur|uretprobe):\s*$/.test(KIND.exec(text)?.[0] ?? "");

/** Takes a text apart; clauses may come in any order. Never throws. */
export function splitProbe(text: string): ProbeParts {
  const parts: ProbeParts = { head: "", where: [], condition: "", captures: [], aggregate: "", rest: "" };
  let clause: Clause = "head";
  let start = 0;
  const close = (end: number): void => {
    const body = text.slice(start, end).trim();
    if (clause === "where") parts.where.push(...splitList(body).map(toSelector));
    else if (clause === "captures") parts.captures.push(...splitList(body));
    else if (clause === "if") parts.condition = body;
    else if (body) parts[clause] = parts[clause] ? `${parts[clause]} ${body}` : body;
  };
  let i = afterPoint(text);
  while (i < text.length) {
    const mark = markAt(text, i);
    if (mark) {
      close(i);
      clause = mark.clause;
      start = i += mark.length;
      if (clause === "captures") {
        i = closingBrace(text, i);
        close(i);
        clause = "rest";
        start = i += 1;
      }
    } else {
      i = isQuote(text[i]) ? afterQuoted(text, i) : i + 1;
    }
  }
  close(text.length);
  return parts;
}

/** The canonical text of these parts. */
export function joinProbe(p: ProbeParts): string {
  return [
    p.head,
    p.where.length ? `@ ${p.where.map((w) => `${w.key}=${w.value}`).join(", ")}` : "",
    p.condition ? `if ${p.condition}` : "",
    p.captures.length ? `{${p.captures.join(", ")}}` : "",
    p.aggregate ? `-> ${p.aggregate}` : "",
    p.rest,
  ]
    .filter(Boolean)
    .join(" ");
}

/** Adds a capture, or takes it out where it is there already (under whatever name). */
export function toggleCapture(text: string, expression: string): string {
  const parts = splitProbe(text);
  const kept = parts.captures.filter((c) => expressionOf(c) !== expression);
  parts.captures = kept.length === parts.captures.length ? [...kept, expression] : kept;
  return joinProbe(parts);
}

/** A capture without its column name: `size=arg0` gives `arg0`. */
export function expressionOf(capture: string): string {
  return capture.replace(/^[A-Za-z_]\w*\s*=(?!=)\s*/, "").replace(/\s+/g, "");
}

/** Sets selector keys; an empty value takes the key out. */
export function withSelector(text: string, values: Record<string, string>): string {
  const parts = splitProbe(text);
  parts.where = parts.where.filter((w) => !(w.key in values));
  for (const [key, value] of Object.entries(values)) if (value) parts.where.push({ key, value: quoteValue(value) });
  return joinProbe(parts);
}

/** What a symbol search looks for, from what is typed so far: `libc.so.6:mal` gives module and beginning. */
export function searchOf(text: string): { module: string; q: string } {
  const { head } = splitProbe(text);
  const location = head.replace(KIND, "");
  const object = /^("[^"]*"|'[^']*'|[^\s:{}"']+)\s*:(?!:)/.exec(location);
  // A quote may still be open while somebody types.
  const q = location.slice(object?.[0].length ?? 0).trim().replace(/^["']|["']$/g, "");
  return { module: unquoted(object?.[1] ?? ""), q };
}

/** Puts a found symbol into the text; name, kind, selector and captures stay. */
export function withLocation(text: string, object: string, symbol: string): string {
  const parts = splitProbe(text);
  const kind = (KIND.exec(parts.head)?.[0] ?? "").trim();
  const needsSpace = kind.endsWith("=");
  parts.head = `${kind}${needsSpace ? " " : ""}${quoteObject(object)}:${quotePoint(symbol)}`;
  return joinProbe(parts);
}

/** Puts a suggested name in the place of the one that was not found. */
export function withSuggestion(text: string, suggestion: string): string {
  if (suggestion.includes(":") && !suggestion.includes("::")) {
    const parts = splitProbe(text);
    return joinProbe({ ...parts, head: splitProbe(suggestion).head });
  }
  return withLocation(text, searchOf(text).module || "*", suggestion);
}

/** A value without the quotes around it. */
export const unquoted = (s: string): string => s.trim().replace(/^(["'])(.*)\1$/, "$2");

function quotePoint(symbol: string): string {
  return /^[A-Za-z_.$][\w.$]*(?:@@?[\w.]+)?$/.test(symbol) ? symbol : JSON.stringify(symbol);
}

function quoteObject(object: string): string {
  return /^[^\s:{}"']+$/.test(object) ? object : JSON.stringify(object);
}

function quoteValue(value: string): string {
  return /^[\w./*?[\]!:+-]+$/.test(value) ? value : JSON.stringify(value);
}

function toSelector(item: string): Selector {
  const at = item.indexOf("=");
  return at < 0 ? { key: item.trim(), value: "" } : { key: item.slice(0, at).trim(), value: item.slice(at + 1).trim() };
}

/** Index behind object and, where the point is a /regex/, behind that: braces in it are no clause. */
function afterPoint(text: string): number {
  const from = KIND.exec(text)?.[0].length ?? 0;
  const regex = /^(?:"[^"]*"|'[^']*'|[^\s:{}"']+)?\s*:\s*\/(?:\\.|[^/\\])*\//.exec(text.slice(from));
  return regex ? from + regex[0].length : from;
}

function markAt(text: string, i: number): { clause: Clause; length: number } | null {
  const rest = text.slice(i);
  if (rest.startsWith("{")) return { clause: "captures", length: 1 };
  if (rest.startsWith("->")) return { clause: "aggregate", length: 2 };
  if (WHERE.test(rest)) return { clause: "where", length: 1 };
  const before = text[i - 1] ?? " ";
  return IF.test(rest) && /[\s}"')\]]/.test(before) ? { clause: "if", length: 2 } : null;
}

const isQuote = (c: string | undefined): boolean => c === '"' || c === "'";

function afterQuoted(text: string, i: number): number {
  const quote = text[i];
  for (let k = i + 1; k < text.length; k++) {
    if (text[k] === "\\") k += 1;
    else if (text[k] === quote) return k + 1;
  }
  return text.length;
}

function closingBrace(text: string, i: number): number {
  let depth = 1;
  for (let k = i; k < text.length; ) {
    const c = text[k];
    if (c === "{") depth += 1;
    else if (c === "}" && --depth === 0) return k;
    k = isQuote(c) ? afterQuoted(text, k) : k + 1;
  }
  return text.length;
}

/** Splits at the commas outside of quotes and brackets. */
function splitList(body: string): string[] {
  const items: string[] = [];
  let depth = 0;
  let start = 0;
  for (let k = 0; k <= body.length; ) {
    const c = body[k];
    if (c === undefined || (c === "," && depth === 0)) {
      items.push(body.slice(start, k).trim());
      start = k + 1;
    } else if ("([{".includes(c)) depth += 1;
    else if (")]}".includes(c)) depth -= 1;
    k = isQuote(c) ? afterQuoted(body, k) : k + 1;
  }
  return items.filter(Boolean);
}
