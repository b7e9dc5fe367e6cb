/** The API's resources by name, from the generated schema. */

import type { components } from "./schema";

type Schemas = components["schemas"];

/** The schema calls a field with a default optional; in what the service sends none is missing. */
export type Answer<T> = T extends readonly (infer U)[] ? Answer<U>[] : T extends object ? { [K in keyof T]-?: Answer<Exclude<T[K], undefined>> } : T;

export type Host = Answer<Schemas["Host"]>;
export type Process = Answer<Schemas["Process"]>;
export type Probe = Answer<Schemas["Probe"]>;
export type ProbeCreate = Schemas["ProbeCreate"];
export type Target = Answer<Schemas["Target"]>;
export type Resolution = Answer<Schemas["Resolution"]>;
export type HostResolution = Answer<Schemas["HostResolution"]>;
export type ResolvedSite = Answer<Schemas["ResolvedSite"]>;
export type SymbolPage = Answer<Schemas["SymbolPage"]>;
export type AggregateTable = Answer<Schemas["AggregateTable"]>;
export type SymbolInfo = Answer<Schemas["Symbol"]>;

/** What every error of the API says (RFC 9457), and what `TraplineError.to_wire` gives inside of answers. */
export type Problem = Omit<Schemas["Problem"], "type" | "errors">;
