"""Plans: what the agent worked out of a probe's text, ready for an engine, so that nothing is left there to parse.

The one thing that resolving, capturing, the tracer and the engines all speak of.
"""

from __future__ import annotations

import msgspec


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


class FetchPlan(msgspec.Struct, frozen=True):
    """One captured value: a register, or the NUL-terminated string it points to, or the stack."""

    name: str
    register: str
    string: bool = False
    max_bytes: int = 64
    entry: bool = False
    """At a return: the register is that of the entry."""
    late: bool = False
    """With ``entry``: the string is read at the return."""
    stack: int = 0
    """The most frames of the thread's stack; 0: it is none. The register has no meaning then."""
    skip: int = 0
    """Innermost frames to leave out of the stack."""

    @property
    def column(self) -> str:
        """The type of its column (``trapline.protocol.hits``)."""
        return "stack" if self.stack else "str" if self.string else "u64"
