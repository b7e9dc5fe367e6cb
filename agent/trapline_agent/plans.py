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


# --- what is computed at a trap --------------------------------------------------------------------------------------
#
# A value is a tree: fetches, which read the stopped thread (registers, memory, strings, what the kernel says of it), and
# pure operations over them. It has no loops, no names and no state, and each node has one meaning on every processor but
# for the registers' names, so that an engine may run it as it is, compile it, or lower it to BPF. A node's value is an
# integer (exact, as Python's), a float, a bool, or bytes; or it has none, for one of ``ValueStatus``' reasons, and then
# nothing that is computed of it has one.


class Node(msgspec.Struct, frozen=True, tag_field="n"):
    pass


class Const(Node, frozen=True, tag="const"):
    value: bool | int | float | bytes


class Missing(Node, frozen=True, tag="missing"):
    """No value: ``status`` (``ValueStatus``) says why."""

    status: int


class Register(Node, frozen=True, tag="reg"):
    """A general register, unsigned."""

    name: str


class Xmm(Node, frozen=True, tag="xmm"):
    """The low 64 bits of a floating-point register, unsigned."""

    number: int


class Here(Node, frozen=True, tag="here"):
    """An address at a fixed distance from the probed instruction, in bytes: where the file's data is mapped."""

    distance: int


class Load(Node, frozen=True, tag="load"):
    """Memory at ``base`` plus ``offset``, 1 to 8 bytes, little-endian, unsigned. ``as_``: or ``i``, ``f``, ``b`` (not 0)."""

    base: Value
    offset: int
    size: int
    as_: str = "u"


class Bits(Node, frozen=True, tag="bits"):
    """``width`` bits of an integer from bit ``shift`` on, as ``Load`` has them."""

    of: Value
    shift: int
    width: int
    as_: str = "u"


class Text(Node, frozen=True, tag="text"):
    """The bytes from an address up to the first NUL, at most ``limit``."""

    address: Value
    limit: int


class Bytes(Node, frozen=True, tag="bytes"):
    """``size`` bytes from an address, at most ``limit``."""

    address: Value
    size: Value
    limit: int


class Context(Node, frozen=True, tag="context"):
    """What is known of the hit itself: ``pid tid comm exe uid cgroup container cpu ts latency``."""

    name: str


class Frames(Node, frozen=True, tag="frames"):
    """The thread's stack, packed (``trapline.protocol.stacks``): at most ``depth`` frames behind the first ``skip``."""

    depth: int
    skip: int = 0


class Symbol(Node, frozen=True, tag="symbol"):
    """Where in a file an address of code is: a packed stack of one frame, which its reader names."""

    address: Value


class Entry(Node, frozen=True, tag="entry"):
    """At a return: the value as it was when the function was entered."""

    of: Value


class Names(Node, frozen=True, tag="names"):
    """The name of a number, as text; the number's digits where it has none."""

    of: Value
    names: tuple[tuple[int, bytes], ...]


class Op(Node, frozen=True, tag="op"):
    """An operation of ``trapline.tree.Operation``, or ``len startswith endswith matches`` (a text and a pattern of re2),
    ``address`` (modulo 2**64),
    ``ip`` (the text of 4 or 16 bytes, or of 32 bits), ``sockaddr`` (the text of the address in one)."""

    op: str
    of: tuple[Value, ...]


Value = (
    Const
    | Missing
    | Register
    | Xmm
    | Here
    | Load
    | Bits
    | Text
    | Bytes
    | Context
    | Frames
    | Symbol
    | Entry
    | Names
    | Op
)  # a further kind of fetch is added here, and in capture.evaluate


class Program(msgspec.Struct, frozen=True):
    """What is computed at one site."""

    values: tuple[Value, ...] = ()
    """One for each of the probe's columns."""
    condition: Value | None = None
    """Hits where it is not true, or has no value, are counted as filtered."""


SEMAPHORE_BYTES = 2


class Semaphore(msgspec.Struct, frozen=True):
    """The counter of a USDT probe: an unsigned word of 16 bits in the program's data, which says how many look at the probe.
    While it is 0 the program skips it (https://sourceware.org/systemtap/wiki/UserSpaceProbeImplementation)."""

    offset: int
    """File offset of it."""
    distance: int
    """Bytes from the probe's instruction to it, where both are mapped."""


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
    program: Program | None = None
    """What is computed here, where that is more than the probe's plain fetches."""
    semaphore: Semaphore | None = None
    """To be raised by one in each process where the instruction is armed."""


LATENCY = "latency"
"""Stands for a register in a ``FetchPlan``: the time from a call to its return, in ns."""


CONTEXT = ("pid", "tid", "comm")
"""Stand for a register in a ``FetchPlan`` of an aggregate: what is known of a hit without looking at its registers."""


class FetchPlan(msgspec.Struct, frozen=True):
    """One captured value, a column of the probe: a register, or the NUL-terminated string it points to, or the stack;
    without a register, what each site's program computes."""

    name: str
    register: str = ""
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
    type: str = ""
    """Of the column (``trapline.protocol.hits``): by default ``str`` for a string, else ``u64``."""

    @property
    def column(self) -> str:
        """The column's type."""
        return self.type or ("stack" if self.stack else "str" if self.string else "u64")


DEFAULT_MAX_KEYS = 1000


class AggregatePlan(msgspec.Struct, frozen=True):
    """What becomes of hits at the source, in the place of rows."""

    function: Function
    parameters: tuple[int, ...] = ()
    by: int = 0
    """How many of the probe's columns its rows are kept apart by, the first ones; the next is what it is of."""
    max_keys: int = DEFAULT_MAX_KEYS
    """Rows that are kept apart; beyond, hits count in one row for all other keys."""
