"""Stacks as hits carry them: packed at the trap, named by whoever reads them.

A packed stack is u64 words, little-endian: ``End`` and flags, then for each frame, innermost first, the number of its
file << 32 | an offset in it. The offset is that of the instruction in the first frame, and in one that a signal interrupted;
else of the last byte of a call. Numbers mean what the header's ``files`` say.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum

import msgspec

from trapline.errors import ProtocolError

DEFAULT_DEPTH = 127
"""As bpftrace and perf have it."""
MAX_DEPTH = 1024
MAX_FILES = 16_384
"""That ``Files`` tells apart."""
BY_FRAME_POINTER = 0x100
"""Flag beside ``End``: some frame was found by its frame pointer, for want of unwind information."""
_END = 0xFF


class End(IntEnum):
    """Why a stack has no further frame."""

    COMPLETE = 0
    """It was the outermost one."""
    LIMIT = 1
    """So many were asked for."""
    NO_UNWIND_INFO = 2
    """Its code says nothing of its caller, and there is no chain of frame pointers."""
    NO_TABLE_YET = 3
    """The same, but its file's unwind table is only being made."""
    FAULT = 4
    """The stack could not be read there."""
    BAD_PC = 5
    """The last frame's address is not in code."""
    LOOP = 6
    """It would lead to where it came from."""
    UNSUPPORTED = 7
    """Its code describes its caller in a way that is not understood."""

    @property
    def text(self) -> str:
        return self.name.lower().replace("_", "-")


class StackFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """A file that frames are in."""

    path: str
    """In the mount namespace of a process that maps it; ``[vdso]``, ``[anon]`` for code without a file (the offset is then
    from its mapping's start), empty where it is not known at all."""
    build_id: str = ""
    """In hex; empty where the file has none, or has not been looked at yet."""
    file: str = ""
    """``dev inode`` as /proc/PID/maps prints them; empty where there is no file."""


class Frame(msgspec.Struct, frozen=True):
    file: StackFile
    offset: int


class Stack(msgspec.Struct, frozen=True):
    """An unpacked stack."""

    frames: tuple[Frame, ...]
    """Innermost first."""
    end: End
    by_frame_pointer: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether it has all the frames that were asked for."""
        return self.end <= End.LIMIT


_NOWHERE = StackFile("")


class Files:
    """Numbers for the files of stacks that come from several sources, each of which has its own.

    Files are the same where their build-ids are, or of those without one their paths; of each the first that came is kept.
    Not thread-safe.

    Attributes:
        by_number: the files; 0 is what is not known, and has none.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], int] = {}
        self.by_number: dict[int, StackFile] = {}

    def get(self, number: int) -> StackFile:
        """Returns the file of a number."""
        return self.by_number.get(number, _NOWHERE)

    def number(self, file: StackFile) -> int:
        """Returns the number of a file; beyond ``MAX_FILES`` it is not known."""
        if not file.path and not file.build_id:
            return 0
        key = ("", file.build_id) if file.build_id else (file.path, "")
        number = self._numbers.get(key)
        if number is None:
            if len(self.by_number) >= MAX_FILES:
                return 0
            number = self._numbers[key] = len(self.by_number) + 1
            self.by_number[number] = file
        return number

    def renumbered(self, files: Mapping[int, StackFile]) -> Callable[[bytes], bytes]:
        """Returns what rewrites packed stacks, in which numbers mean ``files``, into these numbers."""
        numbers = {theirs: self.number(file) for theirs, file in files.items()}
        if all(theirs == mine for theirs, mine in numbers.items()):
            return lambda packed: packed

        def rewrite(packed: bytes) -> bytes:
            head, *words = _words(packed)
            mine = [numbers.get(word >> 32, 0) << 32 | word & 0xFFFF_FFFF for word in words]
            return struct.pack(f"<{len(mine) + 1}Q", head, *mine)

        return rewrite


def check(packed: bytes, files: Mapping[int, StackFile]) -> None:
    """Raises ProtocolError where bytes are no packed stack, or have frames in a file that is not told."""
    head, *words = _words(packed)
    if head & ~(_END | BY_FRAME_POINTER) or head & _END > max(End):
        raise ProtocolError(f"a stack that ends for the reason {head}")
    for word in words:
        if word >> 32 and word >> 32 not in files:
            raise ProtocolError(f"a stack with a frame in file {word >> 32}, which is not told")


def numbers_of(packed: bytes) -> set[int]:
    """Returns the numbers of the files that a packed stack has frames in."""
    return {word >> 32 for word in _words(packed)[1:]}


def unpack(packed: bytes, files: Mapping[int, StackFile]) -> Stack:
    """Returns a packed stack's frames. Raises ProtocolError where it is none."""
    head, *words = _words(packed)
    try:
        end = End(head & _END)
    except ValueError as e:
        raise ProtocolError(f"a stack that ends for the reason {head & _END}") from e
    frames = tuple(Frame(files.get(word >> 32, _NOWHERE), word & 0xFFFF_FFFF) for word in words)
    return Stack(frames, end, bool(head & BY_FRAME_POINTER))


def _words(packed: bytes) -> tuple[int, ...]:
    if not packed or len(packed) % 8 or len(packed) > 8 * (MAX_DEPTH + 1):
        raise ProtocolError(f"a stack of {len(packed)} bytes")
    return struct.unpack(f"<{len(packed) // 8}Q", packed)


def place(frame: Frame) -> str:
    """Returns a frame without a symbol: ``libc.so.6+0x9b0e3``."""
    name = frame.file.path.rpartition("/")[2]
    return f"{name}+{frame.offset:#x}" if name else f"{frame.offset:#x}"


Name = Callable[[Frame], Iterable[str]]
"""The names of a frame: the functions that are inlined there, innermost first, then the function itself."""


def placed(frame: Frame) -> Iterable[str]:
    """Names a frame by its place alone."""
    return (place(frame),)


def lines(stack: Stack, name: Name = placed) -> list[str]:
    """Returns a stack's names, innermost first; one that could not be followed ends in the reason."""
    names = [n for frame in stack.frames for n in name(frame)]
    if not stack.is_whole:
        names.append(f"[{stack.end.text}]")
    return names


def text(stack: Stack, name: Name = placed) -> str:
    """Returns a stack on one line, as ``malloc <- operator new <- main``."""
    return " <- ".join(lines(stack, name))


def folded(stack: Stack, name: Name = placed, *, root: Sequence[str] = ()) -> str:
    """Returns a stack as flamegraph.pl and speedscope read it: outermost first, separated by semicolons.

    Args:
        stack: unpacked; one that could not be followed has the reason in the place of what is missing.
        name: names its frames.
        root: what comes before it all, such as the process' name.
    """
    return fold((*root, *reversed(lines(stack, name))))


def fold(names: Iterable[str]) -> str:
    """Returns names, outermost first, as one line for flamegraph.pl and speedscope."""
    return ";".join(n.translate(_NOT_IN_FOLDED) for n in names)


_NOT_IN_FOLDED = str.maketrans({";": ":", "\n": " ", "\r": " "})
