"""A host as the dashboard's tests see one: processes, a library with symbols, probes that hit when the test says so."""

from __future__ import annotations

import difflib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.unit.service.peers import AgentPeer, World, batch, frame
from trapline.aggregates import Function
from trapline.errors import NotFound
from trapline.model import (
    Cause,
    HostResolution,
    ProbeSpec,
    Process,
    ResolvedSite,
    Symbol,
    SymbolPage,
    Target,
    TargetState,
)
from trapline.protocol import messages as m

LIBRARY = "/usr/lib/x86_64-linux-gnu/libc.so.6"
SYMBOLS = {"malloc": 617, "calloc": 1320, "realloc": 1102, "malloc_trim": 906, "getpid": 8, "openat": 241}
HELD_BY_GDB = "gdb (pid 4411) traces this process already"


def process(pid: int, comm: str, **fields: Any) -> Process:
    return Process(id=f"prc_{pid}", host="hst_a", pid=pid, start_time=1, comm=comm, user="root", **fields)


PROCESSES = [
    process(1, "systemd", cmdline="/sbin/init"),
    process(2, "kthreadd", eligible=False, reason="KernelThread"),
    process(70, "nginx", cmdline="nginx: master process"),
    process(71, "nginx", cmdline="nginx: worker process", threads=4),
    process(90, "trapline-agent", eligible=False, reason="Self"),
]


def target(pid: int, comm: str, symbol: str, *, held: bool = False) -> Target:
    fields: dict[str, Any] = {
        "pid": pid,
        "start_time": 1,
        "comm": comm,
        "module": LIBRARY,
        "symbol": symbol,
        "offset": 0x9A000,
    }
    if held:
        return Target(state=TargetState.REFUSED, reason="TracedByOther", message=HELD_BY_GDB, **fields)
    return Target(state=TargetState.ARMED, engine="ptrace", addr=0x7F0000009A000, cause=Cause.SCAN, **fields)


def resolve(spec: ProbeSpec) -> HostResolution:
    """Gives what a host with the library would do; raises NotFound with suggestions."""
    name = spec.point.value
    if name not in SYMBOLS:
        near = difflib.get_close_matches(name, SYMBOLS)
        raise NotFound(f"no symbol `{name}` in {LIBRARY}", reason="NoSuchSymbol", suggestions=near)
    site = ResolvedSite(
        module=LIBRARY, build_id="ab12", symbol=name, offset=0x9A000, instruction="push rbp", step="emulated"
    )
    return HostResolution(
        host="hst_a", sites=[site], targets=[target(70, "nginx", name), target(71, "nginx", name, held=True)]
    )


class Host:
    """The agent's side of a test; the sequence of each probe's hits is kept here."""

    def __init__(self, agent: AgentPeer) -> None:
        self.agent = agent
        self.sent: dict[str, int] = {}

    async def armed(self, symbol: str = "malloc") -> str:
        """Waits for a probe on a symbol, reports it armed, and returns its id."""
        await self.agent.until(lambda: any(p.spec.point.value == symbol for p in self.agent.desired.values()))
        probe = next(p.id for p in self.agent.desired.values() if p.spec.point.value == symbol)
        await self.observe(probe, symbol)
        return probe

    async def observe(self, probe: str, symbol: str = "malloc") -> None:
        targets = resolve(ProbeSpec.model_validate(self.agent.desired[probe].spec)).targets if symbol in SYMBOLS else []
        await self.agent.observe(probe, targets=targets, counters=self.sent.get(probe, 0), overhead_ns=11_240.0)

    async def hit(self, probe: str, count: int, text: str = "hello") -> None:
        """Sends so many hits; number n has ``n`` as its first captured value."""
        seq = self.sent.get(probe, 0)
        self.sent[probe] = seq + count
        await self.agent.send_batch(batch(probe, seq=seq, count=count, text=text))

    async def add_up(
        self,
        probe: str,
        function: Function,
        values: dict[str, list[int]],
        *,
        keyed: bool = True,
        parameters: tuple[int, ...] = (),
    ) -> None:
        """Sends what hits of these values, by key, add up to."""
        seq = self.sent.get(probe, 0)
        self.sent[probe] = seq + sum(map(len, values.values()))
        await self.agent.send_batch(
            frame(probe, values, function=function, parameters=parameters, seq=seq, keyed=keyed)
        )

    async def lose(self, probe: str, count: int) -> None:
        """Says that the agent had to let hits go."""
        self.sent[probe] = self.sent.get(probe, 0) + count
        await self.agent.say(m.LinkDrops(probe=probe, count=count))


def answer(request: m.Request) -> dict[str, Any]:
    if request.method == "resolve":
        try:
            return resolve(ProbeSpec.model_validate(request.params["spec"])).model_dump(mode="json")
        except NotFound as e:
            return {"error": e.to_wire()}
    q = str(request.params.get("q", ""))
    found = [
        Symbol(name=n, module=LIBRARY, offset=0x9A000, size=s, bind="global") for n, s in SYMBOLS.items() if q in n
    ]
    return SymbolPage(host="hst_a", total=len(found), symbols=found).model_dump(mode="json")


@asynccontextmanager
async def linked(world: World) -> AsyncIterator[Host]:
    """Links the host; its processes are known to the service when the body begins."""
    async with world.agent("hst_a", name="web-1") as agent:
        agent.answer = answer
        await agent.say(m.Processes(full=True, upsert=PROCESSES))
        yield Host(agent)
