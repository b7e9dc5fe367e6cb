"""The table of calls in flight against a model of it that knows every stack: hypothesis makes up calls, tail calls, returns,
longjmps, coroutines, threads that end, and forks, in any order.

The model is the machine: stacks of (stack pointer, return address, functions). What it says has returned is a hit; what it
says was left is none, ever. Functions that are not probed call from places of their own: see ``test_h6_longjmp...`` of
tests/engines for what is done about those that do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trapline_agent.engines.frames import ABANDONED, DISARMED, ENDED, Frame, Frames, leave, lose

SITES = (0x1000, 0x2000, 0x3000)
BACKS = (0x9000, 0x9100)
"""Where it is called from: added to the site, since a direct call has one callee."""
ELSEWHERE = 0x7777
FRAME = 32


class Recorder:
    """A ``ReturnSink`` that writes down what it is told."""

    def __init__(self) -> None:
        self.calls = 0
        self.returned: list[object] = []
        self.lost: Counter[str] = Counter()

    def enter(self, words: Sequence[int], memory: int) -> tuple[int]:
        self.calls += 1
        return (self.calls,)

    def leave(self, ts: int, pid: int, tid: int, words: Sequence[int], memory: int, latency: int, kept: object) -> None:
        assert latency >= 0
        self.returned.append(kept)

    def inherit(self) -> None:
        self.calls += 1

    def lose(self, reason: str) -> None:
        self.lost[reason] += 1


@dataclass
class Call:
    sp: int
    back: int
    kept: list[object]
    """Of each function of its chain of tail calls, the innermost last."""
    sites: list[int]


@dataclass
class Stack:
    """One thread's, or one coroutine's."""

    base: int
    calls: list[Call] = field(default_factory=list)
    words: dict[int, int] = field(default_factory=dict)
    """Its memory: what lies there when a call has been left, too."""

    @property
    def sp(self) -> int:
        return self.calls[-1].sp - FRAME if self.calls else self.base


class FramesMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.sink = Recorder()
        self.frames = Frames()
        self.stacks = [Stack(0x10000 * n) for n in range(1, 4)]
        self.returned: list[object] = []
        self.clock = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def push(self, stack: Stack, site: int, sp: int, back: int) -> object:
        kept = self.sink.enter((), -1)
        tid = stack.base
        lose(self.frames.push(sp, Frame(site, back, 1, tid, [(self.sink, kept)], self.tick())), ABANDONED)
        return kept

    stack = st.integers(0, 2)

    @rule(stack=stack, site=st.sampled_from(SITES), back=st.sampled_from(BACKS))
    def call(self, stack: int, site: int, back: int) -> None:
        s = self.stacks[stack]
        sp, back = s.sp, back + site
        s.words[sp - 8] = back
        s.calls.append(Call(sp, back, [self.push(s, site, sp, back)], [site]))

    @rule(stack=stack)
    def call_unprobed(self, stack: int) -> None:
        s = self.stacks[stack]
        s.words[s.sp - 8] = ELSEWHERE
        s.calls.append(Call(s.sp, ELSEWHERE, [], []))

    @rule(stack=stack, site=st.sampled_from(SITES))
    def tail_call(self, stack: int, site: int) -> None:
        s = self.stacks[stack]
        if s.calls and s.calls[-1].kept and site not in s.calls[-1].sites:
            call = s.calls[-1]
            call.kept.append(self.push(s, site, call.sp, call.back))
            call.sites.append(site)

    @rule(stack=stack)
    def ret(self, stack: int) -> None:
        s = self.stacks[stack]
        if s.calls:
            call = s.calls.pop()
            done, gone = self.frames.pop(call.sp, call.back)
            lose(gone, ABANDONED)
            leave(done, self.tick(), 1, s.base, (), -1)
            self.returned += reversed(call.kept)

    @rule(stack=stack, depth=st.integers(0, 5))
    def longjmp(self, stack: int, depth: int) -> None:
        """Nobody is told."""
        s = self.stacks[stack]
        del s.calls[depth:]

    @rule()
    def sweep(self) -> None:
        words = {k: v for s in self.stacks for k, v in s.words.items()}
        lose(self.frames.sweep(lambda key, back: isinstance(key, int) and words.get(key - 8) == back), ABANDONED)

    @rule(stack=stack)
    def thread_ends(self, stack: int) -> None:
        s = self.stacks[stack]
        lose(self.frames.drop(lambda frame: frame.tid == s.base), ENDED)
        s.calls.clear()

    @rule(stack=stack)
    def fork(self, stack: int) -> None:
        """The child returns from all calls of one stack, and ends; the parent's are as they were."""
        s = self.stacks[stack]
        child, before = self.frames.copy(), len(self.frames)
        for call in reversed(s.calls):
            done, gone = child.pop(call.sp, call.back)
            lose(gone, ABANDONED)
            leave(done, self.tick(), 2, s.base, (), -1)
            self.returned += reversed(call.kept)
        lose(child.drop(lambda frame: True), ENDED)
        assert (len(child), len(self.frames)) == (0, before)

    @rule()
    @precondition(lambda self: len(self.frames))
    def disarm(self) -> None:
        self.frames.retain([])
        assert not len(self.frames)
        for s in self.stacks:
            for call in s.calls:
                call.kept.clear()  # nobody waits for them any more
                call.sites.clear()

    @invariant()
    def what_returned_is_what_was_told(self) -> None:
        assert self.sink.returned == self.returned

    @invariant()
    def calls_are_hits_lost_or_in_flight(self) -> None:
        assert self.sink.calls == len(self.sink.returned) + sum(self.sink.lost.values()) + len(self.frames)

    @invariant()
    def no_call_that_goes_on_is_given_up(self) -> None:
        assert len(self.frames) >= sum(len(c.kept) for s in self.stacks for c in s.calls)
        assert set(self.sink.lost) <= {ABANDONED, ENDED, DISARMED}


class TestFrames(FramesMachine.TestCase):
    settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
