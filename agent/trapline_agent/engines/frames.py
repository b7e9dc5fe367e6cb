"""The calls in flight of one address space: what a return probe knows between a call's entry and its return (semantics H6).

Pure: it is told of entries and returns, and says which calls return and which never will. Nothing is kept on the program's
stack. A call is known by its *key*, the stack pointer as it will be when the call has returned: no two calls that are in
flight have the same, whatever thread, coroutine or signal handler they run in, but for a chain of tail calls, which all
return at once. Goroutines' stacks move, so the key of theirs is the goroutine and the distance from its stack's upper end.

A call that is left by longjmp or a throw tells nobody. It is *abandoned* when something proves it: the key is seen again
in a call to elsewhere, or of the same function; something else returns with that stack pointer; the return address is no
longer where it was. Until then it is in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from trapline_agent.capture.evaluate import Kept
from trapline_agent.engines.base import ReturnSink

ABANDONED = "abandoned"
"""It was left by longjmp, a throw, or the like."""
ENDED = "ended"
"""Its thread, or its process, ended."""
EXECED = "exec"
"""Its process took on another image."""
DISARMED = "disarmed"
"""The probe was taken out meanwhile, there or altogether."""
TOO_MANY = "too-many"
"""More calls were in flight than are kept."""
MAX_FRAMES = 1 << 18
"""Calls in flight that are kept, by address space."""

Key = int | tuple[int, int]
"""The stack pointer after the return, or (goroutine, bytes below its stack's upper end)."""


@dataclass(eq=False, slots=True)
class Frame:
    """One call of one probed function."""

    site: int
    """Address of the breakpoint at its entry."""
    back: int
    """Address that it will return to."""
    pid: int
    tid: int
    """Who called; it may return in another thread."""
    held: Sequence[tuple[ReturnSink, Kept]]
    entered_ns: int
    """CLOCK_MONOTONIC ns when the thread was let go on at the entry."""
    inherited: bool = False
    """It began in a parent process, before the fork."""


class Frames:
    """See the module. Not to be shared between threads."""

    def __init__(self) -> None:
        self._by_key: dict[Key, list[Frame]] = {}
        self._count = 0
        self.of_goroutines = False
        """Whether a key is of a goroutine."""

    def __len__(self) -> int:
        return self._count

    def push(self, key: Key, frame: Frame) -> Sequence[Frame]:
        """Enters a call; returns those that it proves to be abandoned.

        A call with the key and the return address of another one is a tail call of that. It would be so too where a
        function calls itself in tail position, but the same function twice is rather one that was left by longjmp and is
        called again, in a loop: one that is counted as abandoned is better than one that returns twice.
        """
        chain = self._by_key.get(key)
        if chain is None:
            self._by_key[key] = [frame]
            self._count += 1
            self.of_goroutines = self.of_goroutines or type(key) is tuple
            return ()
        if chain[0].back != frame.back or any(f.site == frame.site for f in chain):
            self._by_key[key] = [frame]
            self._count += 1 - len(chain)
            return chain
        chain.append(frame)
        self._count += 1
        return ()

    def pop(self, key: Key, back: int) -> tuple[Sequence[Frame], Sequence[Frame]]:
        """Takes out what ends when a thread arrives at an address with the stack pointer of this key.

        Returns:
            (the calls that return, the innermost first; those that are proved to be abandoned).
        """
        chain = self._by_key.pop(key, None)
        if chain is None:
            return (), ()
        self._count -= len(chain)
        if chain[0].back != back:
            return (), chain
        chain.reverse()
        return chain, ()

    def between(self, low: int, high: int) -> Sequence[Key]:
        """Returns the keys of native stacks in a range, both ends included."""
        return [key for key in self._by_key if isinstance(key, int) and low <= key <= high]

    def drop_keys(self, keys: Iterable[Key]) -> list[Frame]:
        """Takes out the calls of some keys, and returns them."""
        gone = [frame for key in keys for frame in self._by_key.pop(key, ())]
        self._count -= len(gone)
        return gone

    def drop(self, which: Callable[[Frame], bool]) -> list[Frame]:
        """Takes out the calls that a function chooses, and returns them."""
        return self._filter(lambda key, frame: not which(frame))

    def sweep(self, stands: Callable[[Key, int], bool]) -> list[Frame]:
        """Takes out the calls whose return address is no longer on the stack, and returns them.

        Args:
            stands: (key, return address): whether it is there still.
        """
        return self._filter(lambda key, frame: stands(key, frame.back))

    def _filter(self, keep: Callable[[Key, Frame], bool]) -> list[Frame]:
        gone: list[Frame] = []
        for key, chain in list(self._by_key.items()):
            rest = [f for f in chain if keep(key, f)]
            if len(rest) == len(chain):
                continue
            gone += [f for f in chain if f not in rest]
            if rest:
                self._by_key[key] = rest
            else:
                del self._by_key[key]
        self._count -= len(gone)
        return gone

    def retain(self, sinks: Collection[ReturnSink]) -> None:
        """Lets go of all sinks but these: what they would have recorded is lost, ``DISARMED``."""
        if not self._count:
            return
        wanted = set(map(id, sinks))
        for chain in self._by_key.values():
            for frame in chain:
                for sink, _ in frame.held:
                    if id(sink) not in wanted and not frame.inherited:
                        sink.lose(DISARMED)
                frame.held = [(sink, kept) for sink, kept in frame.held if id(sink) in wanted]
        self.drop(lambda frame: not frame.held)

    def copy(self) -> Frames:
        """Returns what a forked child has of these calls: all, for it may return from any of them; none of them counts until
        it does."""
        child = Frames()
        child._by_key = {k: [replace(f, inherited=True) for f in chain] for k, chain in self._by_key.items()}
        child._count, child.of_goroutines = self._count, self.of_goroutines
        return child


def lose(frames: Iterable[Frame], reason: str) -> None:
    """Tells the sinks of calls that are no more."""
    for frame in frames:
        if not frame.inherited:
            for sink, _ in frame.held:
                sink.lose(reason)


def leave(frames: Iterable[Frame], ts: int, pid: int, tid: int, words: Sequence[int], memory: int) -> None:
    """Tells the sinks of calls that return; the arguments are as in ``Sink``."""
    for frame in frames:
        for sink, kept in frame.held:
            if frame.inherited:
                sink.inherit()
            sink.leave(ts, pid, tid, words, memory, ts - frame.entered_ns, kept)
