"""Hits per second from an agent's link to one subscriber, through a real service.

Three processes: this one is the agent's end (its real link and outbox, with columns that were made beforehand), the
service as `trapline serve` runs it, and one subscriber of the binary stream. The rates are offered one after the other:
for each the table says what arrived, how old it was on arrival, and what was dropped, by the gap notices; sent =
delivered + dropped, or the run fails. `max` offers as fast as the service acknowledges.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import platform
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table
from websockets.asyncio.client import connect

from tests.support.children import Child, fields
from trapline.ids import new_id
from trapline.model import Cause, HostFacts, HostResolution, ResolvedSite, Target, TargetState
from trapline.protocol import hits, stream
from trapline.protocol import messages as p
from trapline_agent.link import Link
from trapline_agent.outbox import Outbox
from trapline_service import server
from trapline_service.config import Settings

ROOT = Path(__file__).resolve().parents[2]
SELF = [sys.executable, "-m", "benchmarks.pipeline.end_to_end"]
TICK_S = 0.01
"""Agents flush so often (docs/architecture)."""
IN_FLIGHT_BYTES = 1024 * 1024
"""At ``max``: so much may be unacknowledged before the next batch."""
CAPTURES = [(f"arg{i}", "u64") for i in range(6)]


def _same(observed: p.Observed) -> p.Observed:
    return observed


class Host:
    """Answers for a host with one probe-able function; a ``trapline_agent.link.Handler``."""

    def __init__(self) -> None:
        self.id = new_id("hst")
        self.link_id = new_id("lnk")
        self.link: Link
        self.probe = ""
        self.armed = asyncio.Event()

    def hello(self) -> p.Hello:
        facts = HostFacts(name="bench", boot_id=secrets.token_hex(16))
        return p.Hello(instance_id=self.id, link_id=self.link_id, pid=os.getpid(), facts=facts)

    async def welcomed(self, welcome: p.Welcome) -> None:
        self.link.post("processes", lambda: p.Processes(full=True))

    def desired(self, desired: p.Desired) -> None:
        for probe in desired.upsert:
            self.probe = probe.id
            target = Target(pid=1, comm="bench", module="bench", symbol="f", state=TargetState.ARMED, cause=Cause.SCAN)
            observed = p.Observed(probe=probe.id, generation=probe.generation, resolved=True, targets=[target])
            self.link.post(f"observed {probe.id}", functools.partial(_same, observed))
            self.armed.set()

    async def request(self, request: p.Request) -> dict[str, Any]:
        sites = [ResolvedSite(module="/usr/bin/bench", symbol="f", offset=4096)]
        return HostResolution(host=self.id, sites=sites).model_dump(mode="json")


def batches(host: str, probe: str, count: int, rows: int, seq: int, source: str) -> Iterator[hits.HitBatch]:
    """Yields batches of six captured words a hit, as the tracer makes them; ``ts`` is set when they are sent."""
    columns = hits.schema(CAPTURES)
    data: dict[str, Any] = {
        "ts": np.zeros(rows, "<u8"),
        "pid": np.full(rows, 4711, "<u4"),
        "tid": np.full(rows, 4711, "<u4"),
        "site": np.zeros(rows, "<u4"),
    }
    for name, _ in CAPTURES:
        data[name] = np.arange(rows, dtype="<u8")
        data[name + hits.STATUS_SUFFIX] = np.zeros(rows, "u1")
    offset = time.time_ns() - time.monotonic_ns()
    for i in range(count):
        yield hits.HitBatch(
            hits.Header(
                host=host,
                probe=probe,
                source=source,
                seq=seq + i * rows,
                count=rows,
                t0=0,
                t1=0,
                clock_offset=offset,
                columns=columns,
                sites=["bench:f"],
                comms={4711: "bench"},
            ),
            data,
        )


@dataclass
class Result:
    offered: str
    sent: int
    delivered: int
    dropped: int
    seconds: float
    p50_ms: float
    p99_ms: float


# --- the subscriber, a process of its own ----------------------------------------------------------------------------


async def subscribe(url: str, token: str) -> None:
    """Counts; obeys ``expect N`` on standard input by answering when N hits were delivered or said to be dropped."""
    async with connect(
        url,
        additional_headers={"Authorization": f"Bearer {token}"},
        subprotocols=[stream.BINARY_SUBPROTOCOL],  # type: ignore[list-item]
        compression=None,
        max_size=None,
    ) as socket_:
        await socket_.send(stream.Subscribe(id="bench", topic="hits").model_dump_json())
        delivered = dropped = 0
        ages: list[float] = []
        weights: list[int] = []
        first = last = 0.0
        expected: int | None = None
        answered = asyncio.Event()

        def answer() -> None:
            nonlocal expected, delivered, dropped
            if expected is None or delivered + dropped < expected:
                return
            p50, p99 = np.quantile(np.repeat(ages, weights), [0.5, 0.99]) if ages else (0.0, 0.0)
            print(
                f"seen delivered={delivered} dropped={dropped} us={int((last - first) * 1e6)} "
                f"p50_us={int(p50 * 1e6)} p99_us={int(p99 * 1e6)}",
                flush=True,
            )
            expected = None
            delivered = dropped = 0
            ages.clear()
            weights.clear()
            answered.set()

        async def commands() -> None:
            nonlocal expected
            reader = asyncio.StreamReader()
            await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
            while line := await reader.readline():
                expected = int(line.split()[1])
                answer()
            await socket_.close()

        task = asyncio.create_task(commands())
        async for frame in socket_:
            if isinstance(frame, str):
                message = stream.parse_server_message(frame)
                if isinstance(message, stream.Subscribed):
                    print("ready", flush=True)
                elif isinstance(message, stream.Gap):
                    dropped += message.count
            else:
                header, _ = hits.peek(memoryview(frame)[stream.BINARY_PREFIX_BYTES :])
                now = time.monotonic()
                first = first if delivered else now
                last = now
                delivered += header.count
                ages.append(now - header.t0 / 1e9)
                weights.append(header.count)
            answer()
        await task


# --- the run ---------------------------------------------------------------------------------------------------------


async def offer(
    outbox: Outbox, prepared: list[hits.HitBatch], rate: int | None, subscriber: Child, offered: str
) -> Result:
    """Sends the batches at a rate in hits/s (None: as the outbox empties) and asks the subscriber what came."""
    began = time.monotonic()
    sent = 0
    for batch in prepared:
        if rate:
            if (ahead := began + sent / rate - time.monotonic()) > 0:
                await asyncio.sleep(ahead)
        elif outbox.size_bytes > IN_FLIGHT_BYTES:
            await outbox.empty.wait()
        batch.header.t0 = batch.header.t1 = time.monotonic_ns()
        outbox.put(batch.encode())
        sent += batch.header.count
    line = await asyncio.to_thread(subscriber.ask, f"expect {sent}", 120.0)
    seen = fields(line)
    if seen["delivered"] + seen["dropped"] != sent:
        raise SystemExit(
            f"{sent} hits were sent, but {seen['delivered']} came and {seen['dropped']} were said to be dropped"
        )
    return Result(
        offered, sent, seen["delivered"], seen["dropped"], seen["us"] / 1e6, seen["p50_us"] / 1e3, seen["p99_us"] / 1e3
    )


async def run(rates: list[int | None], seconds: float, rows: int) -> list[Result]:
    token = "tlp_" + secrets.token_urlsafe(40)
    results = []
    with tempfile.TemporaryDirectory() as state:
        env = {"TRAPLINE_ADMIN_TOKEN": token, "TRAPLINE_PORT": "0", "TRAPLINE_STATE_DIR": state}
        with Child([*SELF, "--service"], env=env, stderr=None, cwd=ROOT) as service:
            url = service.ready_line.split()[1]
            websocket = url.replace("http", "ws", 1) + "/api/v1"
            host, outbox = Host(), Outbox()
            link = Link(f"{websocket}/agents/link", token, handler=host, outbox=outbox)
            host.link = link
            linking = asyncio.create_task(link.run())
            await link.connected.wait()
            async with httpx.AsyncClient(trust_env=False, headers={"Authorization": f"Bearer {token}"}) as http:
                made = await http.post(f"{url}/api/v1/probes", json={"probe": "bench:f {arg0}", "name": "bench"})
                if made.is_error:
                    raise SystemExit(made.text)
            await host.armed.wait()
            argv = [*SELF, "--subscriber", f"{websocket}/stream"]
            with Child(argv, env={"TRAPLINE_TOKEN": token}, cwd=ROOT, stderr=None) as subscriber:
                seq, source = 0, new_id("src")
                for rate in rates:
                    # Ten milliseconds' worth a batch at most, as agents flush; at most `rows`.
                    size = min(rows, max(1, int(rate * TICK_S))) if rate else rows
                    count = int((rate or 500_000) * seconds / size)
                    prepared = list(batches(host.id, host.probe, count, size, seq, source))
                    seq += count * size
                    name = f"{rate:,}/s" if rate else "max"
                    results.append(await offer(outbox, prepared, rate, subscriber, name))
                subscriber.popen.terminate()
                subscriber.popen.wait()
                subscriber.popen.returncode = 0
            linking.cancel()
            await asyncio.gather(linking, return_exceptions=True)
            service.popen.terminate()
            await asyncio.to_thread(service.wait)
            service.popen.returncode = 0
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rates", default="1000,10000,100000,max", help="hits/s to offer, or max")
    parser.add_argument("--seconds", type=float, default=5, help="per rate")
    parser.add_argument("--rows", type=int, default=2000, help="hits in a batch at most")
    parser.add_argument("--json", action="store_true", help="figures as JSON, on standard output")
    parser.add_argument("--subscriber", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--service", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.service:
        server.run(Settings(), on_ready=lambda s: print(f"ready {s.url}", flush=True))
        return
    if args.subscriber:
        asyncio.run(subscribe(args.subscriber, os.environ["TRAPLINE_TOKEN"]))
        return
    rates = [None if r == "max" else int(r) for r in args.rates.split(",")]
    results = asyncio.run(run(rates, args.seconds, args.rows))
    if args.json:
        figures = [vars(r) | {"delivered_per_s": r.delivered / r.seconds} for r in results]
        print(
            json.dumps(
                {"python": platform.python_version(), "kernel": platform.release(), "figures": figures}, indent=2
            )
        )
        return
    table = Table(title="agent's link to one subscriber, six words a hit")
    for heading in ("offered", "sent", "delivered/s", "dropped", "p50 ms", "p99 ms"):
        table.add_column(heading, justify="right")
    for r in results:
        table.add_row(
            r.offered,
            f"{r.sent:,}",
            f"{r.delivered / r.seconds:,.0f}",
            f"{r.dropped:,}",
            f"{r.p50_ms:.1f}",
            f"{r.p99_ms:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
