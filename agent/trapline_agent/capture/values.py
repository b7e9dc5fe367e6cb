"""Values at the trap, one by one, where an aggregate wants them: not packed into a row, but as what they are.

The seam between expressions and aggregates: whatever makes ``Values`` of an expression can be counted, summed and grouped
by. As everywhere nothing here can fail; a pointer that leads nowhere is a value with that status.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from trapline.aggregates import Key, Part
from trapline.protocol.hits import ValueStatus
from trapline_agent.arch.x86_64.registers import INDEX
from trapline_agent.capture.compute import MASK, Scalar, Walk
from trapline_agent.capture.evaluate import Kept, no_stack, read_string, stack_value
from trapline_agent.plans import CONTEXT, LATENCY, FetchPlan

Values = Callable[[Sequence[int], int, int, int], Key]
"""Registers, descriptor of /proc/PID/mem, pid, tid: to the values of a hit."""
ReturnValues = Callable[[Sequence[int], int, int, int, int, Kept], Key]
"""The same, with the latency in ns and what was kept of the entry: to the values of a call that returns."""
_Getter = Callable[[Sequence[int], int, int, int, int, Kept], Part]

_OK = int(ValueStatus.OK)
_MAX_BYTES = 256
"""Of a text that is grouped by, or counted."""
_SIGN = 1 << 63


def compile_values(fetches: Sequence[FetchPlan], comms: Mapping[int, str], walk: Walk = no_stack) -> Values:
    """Compiles the expressions of a probe at an entry.

    Args:
        fetches: what is wanted, in order.
        comms: names of processes by pid; it may change.
        walk: takes a stack, where one is wanted.
    """
    if not fetches:
        return lambda words, memory, pid, tid: ()
    getters = [_getter(fetch, comms, -1, walk) for fetch in fetches]
    if len(getters) == 1:
        only = getters[0]
        return lambda words, memory, pid, tid: (only(words, memory, pid, tid, 0, ()),)
    return lambda words, memory, pid, tid: tuple([get(words, memory, pid, tid, 0, ()) for get in getters])


def compile_return_values(
    fetches: Sequence[FetchPlan], comms: Mapping[int, str], walk: Walk = no_stack
) -> ReturnValues:
    """Compiles the expressions of a probe at a return; what is kept of the entry is ``ReturnEvaluator.enter``'s."""
    kept = 0
    getters = []
    for fetch in fetches:
        getters.append(_getter(fetch, comms, kept if fetch.entry else -1, walk))
        kept += fetch.entry
    return lambda words, memory, pid, tid, latency_ns, kept_: tuple(
        [get(words, memory, pid, tid, latency_ns, kept_) for get in getters]
    )


def part_of(value: Scalar, status: int, *, stack: bool = False) -> Part:
    """Returns what a program has computed as a part of a key, or a value: bounded, and None where there is none. A packed
    stack is as long as the frames that were asked for, and whole."""
    if status > ValueStatus.TRUNCATED:
        return None, status
    if stack:
        return value, status
    if isinstance(value, bytes):
        return (value, status) if len(value) <= _MAX_BYTES else (value[:_MAX_BYTES], int(ValueStatus.TRUNCATED))
    if isinstance(value, float):
        # NaN is not even equal to itself: as a key, each would have a row of its own.
        return (value, status) if math.isfinite(value) else (None, int(ValueStatus.UNSUPPORTED))
    if -_SIGN <= value <= MASK:
        return value, status
    return value & MASK, int(ValueStatus.TRUNCATED)


def _getter(fetch: FetchPlan, comms: Mapping[int, str], kept: int, walk: Walk) -> _Getter:
    """``kept``: index of what was kept of the entry, or -1."""
    limit = min(fetch.max_bytes, _MAX_BYTES)
    if fetch.stack:
        depth, skip = fetch.stack, fetch.skip

        def of_the_stack(
            words: Sequence[int], memory: int, pid: int, tid: int, latency_ns: int, of_entry: Kept
        ) -> Part:
            packed, status = stack_value(walk(pid, words, memory, depth, skip))
            return packed, int(status)

        return of_the_stack
    if fetch.register == "comm":
        return lambda words, memory, pid, tid, latency_ns, of_entry: (comms.get(pid, "").encode(), _OK)
    if fetch.register in CONTEXT:
        if fetch.register == "pid":
            return lambda words, memory, pid, tid, latency_ns, of_entry: (pid, _OK)
        return lambda words, memory, pid, tid, latency_ns, of_entry: (tid, _OK)
    if fetch.register == LATENCY:
        return lambda words, memory, pid, tid, latency_ns, of_entry: (latency_ns, _OK)
    if kept >= 0:

        def of_the_entry(
            words: Sequence[int], memory: int, pid: int, tid: int, latency_ns: int, of_entry: Kept
        ) -> Part:
            value = of_entry[kept]
            if isinstance(value, tuple):
                text, status = value
                return text if status <= ValueStatus.TRUNCATED else None, int(status)
            return _string(memory, value, limit) if fetch.string else (value, _OK)

        return of_the_entry
    index = INDEX[fetch.register]
    if fetch.string:
        return lambda words, memory, pid, tid, latency_ns, of_entry: _string(memory, words[index], limit)
    return lambda words, memory, pid, tid, latency_ns, of_entry: (words[index], _OK)


def _string(memory: int, address: int, limit: int) -> Part:
    text, status = read_string(memory, address, limit)
    return text if status <= ValueStatus.TRUNCATED else None, int(status)
