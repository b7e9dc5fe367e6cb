"""Plans: what the agent worked out of a probe's text, ready for an engine, so that nothing is left there to parse.

The one thing that resolving, capturing, the tracer and the engines all speak of.
"""

from __future__ import annotations

import msgspec

from trapline.aggregates import Function


class FileKey(msgspec.Struct, frozen=True, order=True):
    """A file's identity as /proc/PID/maps prints it (on btrfs and overlayfs that differs from stat(2))."""

    dev: str
    """``major:minor`` in hex, as printed there: ``fd:01``."""
    inode: int


class SitePlan(msgspec.Struct, frozen=True):
    """One instruction of one file, ready to be armed: nothing is left for the tracer to parse."""

    site: int
    """Index into the probe's ``sites``."""
    file: FileKey
    path: str
    """Where the agent found the file, for messages and to hold the inode (semantics R9)."""
    offset: int
    """File offset of the instruction."""
    code: bytes
    """The file's bytes from ``offset`` on: 15, or fewer at the segment's end. Never read from memory (semantics R14)."""
    slack_offset: int = 0
    """File offset of unused zero bytes behind the executable segment, mapped with its last page; slots go there."""
    slack_len: int = 0
    go: bool = False
    """It is in a Go function, behind its stack check: the goroutine's pointer is in r14 there (Go's ABIInternal)."""
    unwinds: bool = False
    """It is the first instruction of the C library's longjmp: calls in flight are left there."""


LATENCY = "latency"
"""Stands for a register in a ``FetchPlan``: the time from a call to its return, in ns."""


CONTEXT = ("pid", "tid", "comm")
"""Stand for a register in a ``FetchPlan`` of an aggregate: what is known of a hit without looking at its registers."""


class FetchPlan(msgspec.Struct, frozen=True):
    """One captured value: a register, or the NUL-terminated string it points to."""

    name: str
    register: str
    string: bool = False
    max_bytes: int = 64
    entry: bool = False
    """At a return: the register is that of the entry."""
    late: bool = False
    """With ``entry``: the string is read at the return."""


DEFAULT_MAX_KEYS = 1000


class AggregatePlan(msgspec.Struct, frozen=True):
    """What becomes of hits at the source, in the place of rows."""

    function: Function
    parameters: tuple[int, ...] = ()
    value: FetchPlan | None = None
    """What it is of; None for ``count``."""
    by: tuple[FetchPlan, ...] = ()
    max_keys: int = DEFAULT_MAX_KEYS
    """Rows that are kept apart; beyond, hits count in one row for all other keys."""
