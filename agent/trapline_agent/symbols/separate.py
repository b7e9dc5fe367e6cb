"""Symbols that a program's file does not have itself: those of its debug file, and .gnu_debugdata."""

from __future__ import annotations

import contextlib
import lzma
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trapline.errors import ResolveError, TraplineError, Unsupported
from trapline_agent.symbols.elf import ElfFile, SymbolTable

DEBUG_DIRECTORY = Path("/usr/lib/debug/.build-id")
MAX_DEBUGDATA = 64 << 20
"""Bytes that .gnu_debugdata may unpack to; Fedora's libraries have less than one million."""
_MAX_PACKED = 16 << 20
_LZMA_MEMORY = 128 << 20
_CHUNK = 1 << 20
_BUILD_ID = re.compile(r"[0-9a-f]{6,128}")


class DebugPath(NamedTuple):
    """A debug file, and what tells it from another one of the same path."""

    path: str
    device: int
    inode: int
    mtime_ns: int
    size: int


def debug_path(build_id: str) -> DebugPath | None:
    """Returns where the debug file of a build-id is on this host, or None."""
    if not _BUILD_ID.fullmatch(build_id):
        return None
    path = DEBUG_DIRECTORY / build_id[:2] / f"{build_id[2:]}.debug"
    try:
        st = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(st.st_mode):
        return None
    return DebugPath(str(path), st.st_dev, st.st_ino, st.st_mtime_ns, st.st_size)


@contextlib.contextmanager
def opened(found: DebugPath | None, build_id: str) -> Iterator[ElfFile | None]:
    """Opens a debug file; yields None where there is none, or one that is not the file's."""
    if found is None:
        yield None
        return
    try:
        fd = os.open(found.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        yield None
        return
    try:
        yield _elf(fd, found.path, build_id)
    finally:
        os.close(fd)


def _elf(fd: int, path: str, build_id: str) -> ElfFile | None:
    try:
        elf = ElfFile(fd, path)
        return elf if elf.build_id(sections=True) == build_id else None
    except TraplineError:
        return None


def minidebuginfo(elf: ElfFile) -> SymbolTable | None:
    """Returns the symbols of .gnu_debugdata: a small ELF file, packed with xz, that has what .dynsym lacks.

    Returns:
        None where there is none, or what is there cannot be read.
    """
    try:
        found = elf.section(".gnu_debugdata", _MAX_PACKED)
        data = unpack(found[0]) if found else b""
    except (ResolveError, OverflowError):
        return None
    if not data:
        return None
    fd = os.memfd_create("gnu_debugdata", os.MFD_CLOEXEC)
    try:
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(data)
        return ElfFile(fd, f"{elf.path}:.gnu_debugdata").symbols(elf)
    except (ResolveError, Unsupported):
        return None
    finally:
        os.close(fd)


def unpack(data: bytes) -> bytes:
    """Returns what an xz stream has in it. Raises ResolveError where it is broken or too large."""
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY)
    out = bytearray()
    try:
        while not decoder.eof:
            piece = decoder.decompress(data, max_length=_CHUNK)
            data = b""
            out += piece
            if len(out) > MAX_DEBUGDATA:
                raise ResolveError(f".gnu_debugdata unpacks to more than {MAX_DEBUGDATA} bytes", reason="MalformedElf")
            if not piece and decoder.needs_input:
                raise ResolveError(".gnu_debugdata is cut off", reason="MalformedElf")
    except (lzma.LZMAError, EOFError, MemoryError) as e:
        raise ResolveError(f".gnu_debugdata cannot be unpacked: {e}", reason="MalformedElf") from e
    return bytes(out)
