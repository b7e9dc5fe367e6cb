/** The HTTP API, typed by its OpenAPI document. Every call gives a value or a Problem; none throws. */

import createClient, { type Client } from "openapi-fetch";
import { toProblem, unreachable } from "./problem";
import type { paths } from "./schema";
import type {
  Host,
  Probe,
  ProbeCreate,
  Problem,
  Process,
  Resolution,
  SymbolPage,
  Target,
} from "./types";

export type Result<T> = { ok: true; value: T } | { ok: false; problem: Problem };

export interface Identity {
  name: string;
  role: string;
}

/** Where the service is: the directory that the dashboard was loaded from, without a slash at the end. */
export function serviceBase(): string {
  return new URL(".", document.baseURI).href.replace(/\/$/, "");
}

export class Api {
  private readonly http: Client<paths>;

  constructor(
    readonly base: string,
    token: string,
    /** Called when the service no longer takes the token. */
    private readonly onUnauthorized: () => void = () => undefined,
  ) {
    this.http = createClient<paths>({
      baseUrl: base,
      headers: { Authorization: `Bearer ${token}` },
      // What is shown is what is there now, never what a cache remembers.
      cache: "no-store",
    });
  }

  me(): Promise<Result<Identity>> {
    return this.take(this.http.GET("/api/v1/me"), (b) => ({ name: b.name, role: b.role }));
  }

  hosts(): Promise<Result<Host[]>> {
    return this.take(this.http.GET("/api/v1/hosts"), (b) => b.items as Host[]);
  }

  processes(host: string, filter: string, pageSize: number, pageToken = ""): Promise<Result<{ items: Process[]; next: string }>> {
    return this.take(
      this.http.GET("/api/v1/hosts/{host}/processes", {
        params: { path: { host }, query: { filter, page_size: pageSize, ...(pageToken ? { page_token: pageToken } : {}) } },
      }),
      (b) => ({ items: b.items as Process[], next: b.next_page_token ?? "" }),
    );
  }

  symbols(q: string, module: string, signal: AbortSignal, limit = 40): Promise<Result<SymbolPage[]>> {
    return this.take(
      this.http.GET("/api/v1/symbols", { params: { query: { q, limit, ...(module ? { module } : {}) } }, signal }),
      (b) => b.items as SymbolPage[],
    );
  }

  probes(): Promise<Result<Probe[]>> {
    return this.take(this.http.GET("/api/v1/probes"), (b) => b.items as Probe[]);
  }

  createProbe(body: ProbeCreate): Promise<Result<Probe>> {
    return this.take(this.http.POST("/api/v1/probes", { body }), (b) => b as Probe);
  }

  resolve(body: ProbeCreate): Promise<Result<Resolution>> {
    return this.take(this.http.POST("/api/v1/probes:resolve", { body }), (b) => b as Resolution);
  }

  deleteProbe(id: string): Promise<Result<Probe>> {
    return this.take(this.http.DELETE("/api/v1/probes/{probe}", { params: { path: { probe: id } } }), (b) => b as Probe);
  }

  targets(id: string): Promise<Result<Target[]>> {
    return this.take(this.http.GET("/api/v1/probes/{probe}/targets", { params: { path: { probe: id } } }), (b) => b.items as Target[]);
  }

  streamTicket(): Promise<Result<string>> {
    return this.take(this.http.POST("/api/v1/stream-tickets"), (b) => b.ticket);
  }

  private async take<B, T>(
    call: Promise<{ data?: B; error?: unknown; response: Response }>,
    read: (body: B) => T,
  ): Promise<Result<T>> {
    try {
      const { data, error, response } = await call;
      if (response.ok && data !== undefined) return { ok: true, value: read(data) };
      if (response.status === 401) this.onUnauthorized();
      return { ok: false, problem: toProblem(error, response.status) };
    } catch {
      return { ok: false, problem: unreachable() };
    }
  }
}
