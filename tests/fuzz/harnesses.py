"""What is fuzzed: a function of bytes that may raise TraplineError and nothing else, and where its seeds come from.

libdw, which reads debug information, runs in a process of its own; tests/unit/debuginfo/test_worker.py damages its files.
"""

from __future__ import annotations

import contextlib
import lzma
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trapline import aggregates as counted
from trapline.errors import TraplineError
from trapline.protocol import aggregates, hits, stacks
from trapline.spec import parse_probe
from trapline_agent.capture.compiler import Site
from trapline_agent.capture.program import columns_of, compiled
from trapline_agent.debuginfo import lineheader
from trapline_agent.kernel.containers import container_of
from trapline_agent.symbols import gopclntab, usdt
from trapline_agent.symbols.demangle import demangle
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.symbols.index import SymbolIndex
from trapline_agent.symbols.separate import unpack
from trapline_agent.unwind import eh_frame, table

_MAX_SEED_BYTES = 1 << 16
_ROOT = Path(__file__).resolve().parents[2]


class Harness(NamedTuple):
    run: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]]


def _small_files() -> Iterator[bytes]:
    """The machine's own programs and libraries, the small ones."""
    found = 0
    for folder in (Path("/usr/bin"), Path("/usr/lib/x86_64-linux-gnu")):
        for path in sorted(folder.iterdir()):
            with contextlib.suppress(OSError):
                if path.is_file() and path.stat().st_size <= _MAX_SEED_BYTES and found < 40:
                    data = path.read_bytes()
                    if data.startswith(b"\x7fELF"):
                        found += 1
                        yield data


def _elf(data: bytes) -> None:
    fd = os.memfd_create("elf")
    try:
        os.write(fd, data)
        elf = ElfFile(fd, "x")
        index = SymbolIndex(elf)
        for i, symbol in enumerate(index):
            if i > 50:
                break
            index.find(symbol.name)
            index.at(symbol.offset)
            index.end_of(symbol)
        elf.thread_block()
        elf.soname()
        elf.text_relocations()
        usdt.probes(elf)
        eh_frame.read_table(elf).encode()
    finally:
        os.close(fd)


class _Some:
    """A real file, of which one section is another."""

    _file: ElfFile | None = None

    @classmethod
    def file(cls) -> ElfFile:
        if cls._file is None:
            cls._file = ElfFile(os.open(os.path.realpath(sys.executable), os.O_RDONLY), "x")
        return cls._file


def _section(name: str) -> Iterator[bytes]:
    for path in (os.path.realpath(sys.executable), "/lib/x86_64-linux-gnu/libc.so.6", "/bin/true"):
        with contextlib.suppress(OSError, TraplineError), open(path, "rb") as file:
            found = ElfFile(file.fileno(), path).section(name)
            if found is not None:
                yield found[0][:_MAX_SEED_BYTES]


def _eh_frame(data: bytes) -> None:
    elf = _Some.file()
    base = elf.segments[0].vaddr
    elf.eh_frame = lambda limit: (base, data)  # type: ignore[method-assign]
    made = eh_frame.read_table(elf)
    again = table.decode(made.encode())
    assert len(again) == len(made)


def _table(data: bytes) -> None:
    found = table.decode(data)
    for offset in (0, 1, 4096, 1 << 31):
        found.at(offset)


def _tables() -> Iterator[bytes]:
    with open("/bin/true", "rb") as file:
        yield eh_frame.read_table(ElfFile(file.fileno(), "x")).encode()


def _gopclntab(data: bytes) -> None:
    elf = _Some.file()
    elf.section = lambda name, limit=0: (data, 0) if name == ".gopclntab" else None  # type: ignore[method-assign]
    gopclntab.functions(elf)


def _go_tables() -> Iterator[bytes]:
    """As Go 1.18 and later lay it out, with two functions (runtime/symtab.go), and its beginnings of other versions."""
    names = b"main.main\0main.x\0".ljust(24, b"\0")
    base = 72 + len(names)
    rows = struct.pack("<5I", 0, 20, 16, 28, 32) + struct.pack("<2i", 0, 0) + struct.pack("<2i", 16, 10)
    for magic in (0xFFFF_FFF0, 0xFFFF_FFF1):
        head = struct.pack("<IHBB", magic, 0, 1, 8) + struct.pack("<8Q", 2, 0, 0x1000, 72, 0, 0, 0, base)
        yield head + names + rows
    for magic in (0xFFFF_FFFA, 0xFFFF_FFFB):
        yield struct.pack("<IHBB", magic, 0, 1, 8) + struct.pack("<7Q", 2, 0, 72, 0, 0, 0, 96) + bytes(8) + names + rows


def _usdt(data: bytes) -> None:
    elf = _Some.file()
    elf.section = lambda name, limit=0: (data, 0) if name == ".note.stapsdt" else None  # type: ignore[method-assign]
    for probe in usdt.probes(elf)[:100]:
        usdt.parse_arguments(probe.arguments)


def _notes() -> Iterator[bytes]:
    yield from _section(".note.stapsdt")
    desc = struct.pack("<3Q", 0x1000, 0, 0) + b"app\0begin\0-4@%edi 8@-16(%rbp) 8@$7 1@x(%rip)\0"
    yield struct.pack("<3I", 8, len(desc), 3) + b"stapsdt\0" + desc


def _hits(data: bytes) -> None:
    for hit in hits.decode(data).hits(0, 20):
        hit.model_dump_json()


def _batches() -> Iterator[bytes]:
    packed = struct.pack("<2Q", 0, 1 << 32 | 64)
    columns = hits.schema([("a", "u64"), ("b", "str"), ("c", "bytes"), ("d", "f64"), ("e", "bool"), ("f", "stack")])
    header = hits.Header(
        host="h", probe="p", source="s", seq=5, count=2, t0=1, t1=2, clock_offset=3, columns=columns, strings=[b"x", packed],
        sites=["m:f"], comms={7: "seven"}, drops={"ring": 2}, files={1: stacks.StackFile("/bin/true", "ab", "fd:01 7")},
    )  # fmt: skip
    rows = np.zeros(2, hits.row_dtype(columns))
    rows["f"] = 1
    yield hits.HitBatch(header, {c.name: rows[c.name] for c in columns}).encode()


def _aggregates(data: bytes) -> None:
    aggregates.head(data)
    delta = aggregates.decode(data)
    for _, cell in delta.cells():
        assert cell is not None
    aggregates.merged(data, data)


def _deltas() -> Iterator[bytes]:
    for value in (7, 2.5, b"text", True, None):
        cell = counted.Cell(count=2, sum=3, min=1, max=2)
        rows = [aggregates.entry(((value, 0),), cell)]
        delta = aggregates.Delta("h", "p", "s", 0, 2, 1, 9, entries=rows, drops={"ring": 1})
        yield aggregates.encode(delta)


def _stacks(data: bytes) -> None:
    stacks.unpack(data, {1: stacks.StackFile("/bin/true")})


def _probe(data: bytes) -> None:
    """A probe's text, and what can be said of its expressions without a file."""
    spec = parse_probe(data.decode("utf-8", "replace"))
    parse_probe(spec.text)
    compiled(columns_of(spec), spec.condition, Site(kind=spec.kind), aggregate=spec.aggregate is not None)


def _probes() -> Iterator[bytes]:
    for page in ("docs/expressions.md", "docs/probe-language.md", "docs/aggregates.md"):
        for line in (_ROOT / page).read_text().splitlines():
            if ":" in line and len(line) < 300:
                yield line.encode()


def _line_header(data: bytes) -> None:
    with contextlib.suppress(lineheader.Malformed):  # which its reader makes an error of
        lineheader.file_names(data, lambda at, line: "name", "/src")


def _xz(data: bytes) -> None:
    unpack(data)


def _minidebug() -> Iterator[bytes]:
    yield lzma.compress(b"\x7fELF" + bytes(200))


ALL: dict[str, Harness] = {
    "elf": Harness(_elf, _small_files),
    "eh-frame": Harness(_eh_frame, lambda: _section(".eh_frame")),
    "unwind-table": Harness(_table, _tables),
    "gopclntab": Harness(_gopclntab, _go_tables),
    "usdt": Harness(_usdt, _notes),
    "hits": Harness(_hits, _batches),
    "aggregates": Harness(_aggregates, _deltas),
    "stacks": Harness(_stacks, lambda: [struct.pack("<3Q", 0, 1 << 32 | 64, 1 << 32 | 99)]),
    "probe": Harness(_probe, _probes),
    "minidebuginfo": Harness(_xz, _minidebug),
    "names": Harness(lambda data: demangle(data.decode("utf-8", "replace")), lambda: [b"_ZN3foo3barEv", b"_RNvC1a1b"]),
    "line-header": Harness(_line_header, lambda: [bytes(40), struct.pack("<I", 36) + bytes(36)]),
    "cgroups": Harness(
        container_of, lambda: [b"0::/docker/" + b"ab" * 32 + b"\n", b"0::/machine.slice/machine-x.scope\n"]
    ),
}


def run_one(name: str, data: bytes) -> None:
    """Runs a harness on one input; what it may raise is caught."""
    with contextlib.suppress(TraplineError):
        ALL[name].run(data)
