"""The programs of tests/targets in likeness, for the fake engine: the same commands and answers over simulated processes.

Only what the contract suite says is understood; anything else is an error, never a silent success. Threads do not run by
themselves here: what is told to ``start`` makes a few calls at each question, so that what happens between two questions of
a test differs from what happened before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from msgspec import structs

from tests.support.children import ChildDied
from trapline_agent.engines.fake.world import PAGE, SimulatedFile, SimulatedProcess, World
from trapline_agent.plans import SEMAPHORE_BYTES, Semaphore, SitePlan

_USDT = ("target_usdt", "target_usdt_again")
_SYMBOLS = (
    *("target_hot", "target_six", "target_forks", "target_execs", "dlfn"),
    *("target_ret", "target_rec", "target_frame", "target_jumper", "target_hold", "target_fork"),
    *_USDT,
)


class SimulatedFiles:
    """Plans by symbol: each symbol has its place in every file."""

    def __init__(self, world: World) -> None:
        self._world = world

    def plan(self, path: Path, symbol: str, site: int = 0, offset: int = 0) -> SitePlan:
        return file_of(self._world, path).plan(offset_of(symbol) + offset, site)

    def usdt(self, path: Path) -> list[SitePlan]:
        """Plans of the places of the probe of ``usdt``."""
        file = file_of(self._world, path)
        counter = len(file.content) - file.data
        offsets = [offset_of(symbol) for symbol in _USDT]
        return [structs.replace(file.plan(o), semaphore=Semaphore(counter, counter - o)) for o in offsets]


def offset_of(symbol: str) -> int:
    return 256 * (1 + _SYMBOLS.index(symbol))


def file_of(world: World, path: Path) -> SimulatedFile:
    return next((f for f in world.files.values() if f.path == str(path)), None) or world.file(
        str(path), data=PAGE if path.name in ("usdt", "libusdt.so") else 0
    )


class SimulatedTargets:
    """As ``tests.support.targets.Targets``."""

    def __init__(self, world: World) -> None:
        self.world = world

    def build(self, name: str) -> Path:
        return Path(f"/simulated/{name}")

    def library(self) -> Path:
        return Path("/simulated/libdlfn.so")

    def start(self, name: str, *args: str | Path) -> SimulatedChild:
        return SimulatedChild(self.world, name, [str(a) for a in args])

    @contextmanager
    def run(self, name: str, *args: str | Path) -> Iterator[SimulatedChild]:
        child = self.start(name, *args)
        try:
            yield child
            if child.process.status:
                raise ChildDied(f"{name} ended with status {child.process.status}")
        finally:
            child.kill()


class SimulatedChild:
    """As ``tests.support.children.Child``."""

    def __init__(self, world: World, name: str, args: list[str]) -> None:
        self._world = world
        self._program = file_of(world, Path(f"/simulated/{name}"))
        self._library = file_of(world, Path(args[0])) if name == "dl" else None
        self._symbol = {"dl": "dlfn", "returns": "target_ret"}.get(name, f"target_{name}")
        self.process = world.spawn(self._program, comm=name)
        self.pid = self.process.pid
        self.popen = SimpleNamespace(kill=self.kill)
        self._count = {"begun": 0, "done": 0, "wrong": 0, "failed": 0, "calls": 0, "returns": 0, "left": 0}
        self._count |= {"evaluated": 0, "semaphore": 0}
        self._threads = int(args[0]) if name == "hot" else 1
        self._running = False
        self._held: SimulatedProcess | None = None
        self._last = ""

    def count(self) -> dict[str, int]:
        self._run_on()
        return dict(self._count)

    def kill(self) -> None:
        self._world.end(self.process, self.process.status or 0)

    def send(self, command: str) -> None:
        self._last = self.ask(command)

    def wait_for(self, beginning: str) -> str:
        assert self._last.startswith(beginning)
        return self._last

    def ask(self, line: str, timeout: float = 0.0) -> str:
        command, *words = line.split()
        n = int(words[0]) if words and words[0].isdigit() else 1
        match command:
            case "call" | "fork" | "vfork" | "clone" | "hold" | "go" | "semaphore" | "lift" if (
                self._symbol == "target_usdt"
            ):
                return self._usdt(command, n)
            case "call" | "six":
                return self._called(self.process, n, "target_six" if command == "six" else self._symbol)
            case "start" | "storm":
                self._running = True
            case "stop" | "calm":
                self._run_on()
                self._running = False
            case "spawn" if self._symbol == "target_hot":
                self._threads += n
                self._run_on()
            case "recurse" | "jump" | "hold" | "go" | "fork" if self._symbol == "target_ret":
                self._returns(command, n)
            case "fork" | "vfork" | "spawn" | "clone" | "thread":
                self._child(command, n)
            case "hold":
                self._held = self._world.fork(self.process)
                return f"held {self._held.pid}"
            case "go":
                assert self._held is not None
                self._called(self._held, 50, self._symbol)
                self._bury(self._held)
            case "exec" | "exec-thread":
                self._world.exec(self.process, self._program)
                return f"ready {self.pid}"
            case "open":
                assert self._library is not None
                self._world.mmap(self.process, self._library)
            case "close":
                self._close()
            case "cycle":
                assert self._library is not None
                for _ in range(n):
                    self._world.mmap(self.process, self._library)
                    self._called(self.process, int(words[1]), "dlfn")
                    self._close()
            case _:
                raise AssertionError(f"no simulated target understands `{line}`")
        return f"{command} done"

    def _usdt(self, command: str, n: int) -> str:
        """What the target ``usdt`` does, whose probe is skipped while its semaphore is 0."""
        match command:
            case "semaphore":
                return f"semaphore={self._semaphore(self.process)}"
            case "lift":
                addr = self._semaphore_at(self.process)
                self._world.write(self.process.memory, addr, self._semaphore(self.process) + n)
            case "call":
                self._sell(self.process, n)
            case "hold":
                self._held = self._world.fork(self.process)
                return f"held {self._held.pid}"
            case "go":
                assert self._held is not None
                self._sell(self._held, n)
                self._bury(self._held)
            case _:
                child = self._world.fork(self.process, shares_memory=command != "fork")
                self._sell(child, n)
                self._bury(child)
        return f"{command} done"

    def _semaphore_at(self, process: SimulatedProcess) -> int:
        return next(m.start for m in process.memory.mappings if m.file == self._program.key and m.writable)

    def _semaphore(self, process: SimulatedProcess) -> int:
        addr = self._semaphore_at(process)
        return sum(self._world.read(process.memory, addr + i) << 8 * i for i in range(SEMAPHORE_BYTES))

    def _sell(self, process: SimulatedProcess, n: int) -> None:
        for _ in range(n):
            for symbol in _USDT:
                if self._semaphore(process):
                    self._count["evaluated"] += 1
                    self._world.call(process, self._program, offset_of(symbol))
        self._count["calls"] += n
        self._count["semaphore"] = self._semaphore(process)

    def _returns(self, command: str, n: int) -> None:
        """What the target ``returns`` does with calls that are in flight for a while."""
        match command:
            case "recurse":
                for _ in range(n):
                    self._enter("target_rec")
                self._leave(n)
            case "jump":
                for _ in range(n):
                    self._enter("target_frame")
                    self._enter("target_jumper")
                    self._world.leave(self.process, times=2, jump=True)
                    self._count["left"] += 2
            case "hold":
                self._enter("target_hold")
            case "go":
                self._leave(1)
            case "fork":
                self._enter("target_fork")
                child = self._world.fork(self.process)
                self._world.leave(child)
                self._count["returns"] += 1
                self._bury(child)
                self._leave(1)

    def _enter(self, symbol: str) -> None:
        self._count["calls"] += 1
        self._world.enter(self.process, self._program, offset_of(symbol))

    def _leave(self, n: int) -> None:
        self._world.leave(self.process, times=n)
        self._count["returns"] += n

    def _called(self, process: SimulatedProcess, n: int, symbol: str) -> str:
        file = self._library if symbol == "dlfn" else self._program
        assert file is not None
        for _ in range(n):
            self._count["begun"] += 1
            places = self._world.call(process, file, offset_of(symbol))
            if process.status is not None:
                self._count["failed"] += 1
                if process is self.process:
                    raise ChildDied(f"{self._program.path} was ended by a trap that nobody served")
                return "died"
            assert places == 1
            self._count["done"] += 1
            self._count["calls"] += 1
            self._count["returns"] += 1
        return f"called {n}"

    def _child(self, kind: str, n: int) -> None:
        if kind == "thread":
            self._called(self.process, n, self._symbol)
            return
        child = self._world.fork(self.process, shares_memory=kind in ("vfork", "clone", "spawn"))
        if kind == "spawn":
            self._world.exec(child, self._program)
        self._called(child, n, self._symbol)
        self._bury(child)

    def _bury(self, child: SimulatedProcess) -> None:
        self._world.end(child)

    def _close(self) -> None:
        assert self._library is not None
        for m in [m for m in self.process.memory.mappings if m.file == self._library.key]:
            self._world.munmap(self.process, m.start, m.end)

    def _run_on(self) -> None:
        if not self._running:
            return
        if self._symbol == "target_forks":
            for kind in ("fork", "vfork", "spawn", "clone", "thread"):
                self._child(kind, 5)
        else:
            self._called(self.process, 3 * self._threads, self._symbol)
