"""Turns fetched words and memory into values, at the trap: the tracer's half of a capture.

A return probe fetches twice: ``ReturnEvaluator.enter`` keeps what is asked of the entry, ``leave`` puts the row together.

Nothing here can fail: a pointer that is null or leads nowhere is a value with that status.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from operator import itemgetter

from trapline.protocol.hits import ValueStatus
from trapline.protocol.stacks import End
from trapline_agent.arch.x86_64.registers import INDEX
from trapline_agent.capture.compute import USER_TOP, Walk
from trapline_agent.plans import LATENCY, FetchPlan

_WHOLE = bytes((End.LIMIT,))


def no_stack(pid: int, words: Sequence[int], memory: int, depth: int, skip: int) -> bytes:
    """Stands for ``Stacks.walk`` where no stack is asked for."""
    return b""


class Evaluator:
    """The fetches of one probe, compiled. Values come in the order of ``trapline.protocol.hits.schema``: all words, then
    all statuses."""

    def __init__(self, fetches: Sequence[FetchPlan], walk: Walk = no_stack) -> None:
        """``walk``: takes a stack, where one is captured."""
        self._fetches = [(INDEX[f.register], f.string, f.max_bytes, f.stack, f.skip) for f in fetches]
        self._walk = walk
        self.has_strings = any(f.string or f.stack for f in fetches)
        self.words = self._compile_words()

    def _compile_words(self) -> Callable[[Sequence[int]], tuple[int, ...]]:
        indices = [i for i, *_ in self._fetches]
        if not indices:
            return lambda words: ()
        zeros = (0,) * len(indices)
        if len(indices) == 1:
            (only,) = indices
            return lambda words: (words[only], 0)
        get: Callable[[Sequence[int]], tuple[int, ...]] = itemgetter(*indices)
        return lambda words: get(words) + zeros

    def __call__(
        self, words: Sequence[int], memory: int, interned: dict[bytes, int], strings: list[bytes], pid: int = 0
    ) -> list[int]:
        """Fetches.

        Args:
            words: the thread's registers.
            memory: descriptor of /proc/PID/mem.
            interned: indices of the strings that this chunk has already; added to.
            strings: those strings; appended to.
            pid: the process, for its stack.

        Returns:
            A word or string index for each fetch, then a status for each.
        """
        values: list[int] = []
        statuses: list[int] = []
        for register, is_string, limit, depth, skip in self._fetches:
            word = words[register]
            if depth:
                text, status = stack_value(self._walk(pid, words, memory, depth, skip))
            elif not is_string:
                values.append(word)
                statuses.append(ValueStatus.OK)
                continue
            else:
                text, status = read_string(memory, word, limit)
            index = interned.get(text)
            if index is None:
                index = interned[text] = len(strings)
                strings.append(text)
            values.append(index)
            statuses.append(status)
        return values + statuses


Kept = tuple[int | tuple[bytes, ValueStatus], ...]
"""What a call keeps for its return: words, and strings with their status."""


class ReturnEvaluator:
    """The fetches of one return probe, compiled."""

    def __init__(self, fetches: Sequence[FetchPlan], walk: Walk = no_stack) -> None:
        """``walk``: takes a stack, where one is captured."""
        self._walk = walk
        self._at_entry = [(INDEX[f.register], f.string and not f.late, f.max_bytes) for f in fetches if f.entry]
        kept = 0
        self._at_return: list[tuple[int, int, bool, int, int, int]] = []
        """(index of what was kept or -1, register or -1 for the latency, is it a string, its bytes, frames of the stack,
        frames to skip)"""
        self._has_strings = any(f.string or f.stack for f in fetches)
        self._zeros = [int(ValueStatus.OK)] * len(fetches)
        for f in fetches:
            if f.entry:
                self._at_return.append((kept, 0, f.string, f.max_bytes, 0, 0))
                kept += 1
            else:
                register = -1 if f.register == LATENCY else INDEX[f.register]
                self._at_return.append((-1, register, f.string, f.max_bytes, f.stack, f.skip))

    def enter(self, words: Sequence[int], memory: int) -> Kept:
        """Fetches what is asked of the entry."""
        if not self._at_entry:
            return ()
        return tuple(
            read_string(memory, words[register], limit) if is_string else words[register]
            for register, is_string, limit in self._at_entry
        )

    def leave(
        self,
        words: Sequence[int],
        memory: int,
        latency_ns: int,
        kept: Kept,
        interned: dict[bytes, int],
        strings: list[bytes],
        pid: int = 0,
    ) -> list[int]:
        """Returns the values as ``Evaluator`` does, of a call whose ``enter`` gave ``kept``."""
        if not self._has_strings:
            return [  # type: ignore[return-value] # what is kept are words
                kept[index] if index >= 0 else latency_ns if register < 0 else words[register]
                for index, register, *_ in self._at_return
            ] + self._zeros
        values: list[int] = []
        statuses: list[int] = []
        for index, register, is_string, limit, depth, skip in self._at_return:
            word = kept[index] if index >= 0 else latency_ns if register < 0 else words[register]
            if depth:
                text, status = stack_value(self._walk(pid, words, memory, depth, skip))
            elif not is_string and isinstance(word, int):
                values.append(word)
                statuses.append(ValueStatus.OK)
                continue
            else:
                text, status = read_string(memory, word, limit) if isinstance(word, int) else word
            known = interned.get(text)
            if known is None:
                known = interned[text] = len(strings)
                strings.append(text)
            values.append(known)
            statuses.append(status)
        return values + statuses


def stack_value(packed: bytes) -> tuple[bytes, ValueStatus]:
    """Returns a packed stack with its status: one that could not be followed to its end is truncated."""
    return packed, ValueStatus.OK if packed[:1] <= _WHOLE else ValueStatus.TRUNCATED


def read_string(memory: int, address: int, limit: int) -> tuple[bytes, ValueStatus]:
    """Reads bytes up to the first NUL, at most ``limit``.

    A string that ends at a page's last byte is read though the next page is unmapped: pread of /proc/PID/mem gives what it
    got before the fault (fs/proc/base.c, mem_rw).
    """
    if address == 0:
        return b"", ValueStatus.NULL
    if address >= USER_TOP:
        return b"", ValueStatus.FAULT
    try:
        data = os.pread(memory, limit, address)
    except OSError:
        return b"", ValueStatus.FAULT
    if not data:
        return b"", ValueStatus.FAULT
    end = data.find(b"\0")
    if end >= 0:
        return data[:end], ValueStatus.OK
    return data, ValueStatus.TRUNCATED
