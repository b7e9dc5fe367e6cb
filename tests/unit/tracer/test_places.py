"""Plans for where calls return to: the same bytes and the same room as the agent finds with its ELF reader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import needs
from trapline.errors import Unsupported
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.targets.files import file_key_of
from trapline_agent.targets.maps import Mapping
from trapline_agent.tracer.places import Places

FILES = ("/lib/x86_64-linux-gnu/libc.so.6", "/bin/sh", "/usr/bin/env", "/lib64/ld-linux-x86-64.so.2")


@needs.x86_64
@pytest.mark.parametrize("path", [f for f in FILES if Path(f).exists()])
def test_a_plan_is_the_agent_s(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        key = file_key_of(fd, path)
        reads = []

        def read(offset: int, size: int) -> bytes:
            reads.append(offset)
            return os.pread(fd, size, offset)

        (segment, *_) = (s for s in ElfFile(fd, path).segments if s.filesz > 4096)
        code = os.pread(fd, segment.filesz, segment.offset)
        at = code.index(b"\xe8", 64) + 5  # as good as a call
        mapping = Mapping(
            0x10000 + segment.offset, 0x10000 + segment.end, "r-xp", segment.offset, key.dev, key.inode, path, False
        )
        places = Places()
        plan = places.plan(mapping, 0x10000 + segment.offset + at, read)
        assert (plan.file, plan.offset, plan.path) == (key, segment.offset + at, path)
        assert plan.code == code[at : at + 15]
        assert (plan.slack_offset, plan.slack_len) == (segment.slack_offset, segment.slack_len)
        before = len(reads)
        assert places.plan(mapping, 0x10000 + segment.offset + at, read) is plan
        assert len(reads) == before, "it is kept"
        odd = next(i for i in range(64, 4000) if i % 16 and b"\xe8" not in code[i - 9 : i] and code[i - 1] != 0x90)
        if b"\xff" not in code[odd - 9 : odd]:
            with pytest.raises(Unsupported) as e:
                places.plan(mapping, 0x10000 + segment.offset + odd, read)
            assert e.value.reason == "NotAReturnAddress"
    finally:
        os.close(fd)


def test_a_file_that_is_no_elf_has_no_room() -> None:
    mapping = Mapping(0x1000, 0x2000, "r-xp", 0, "fd:00", 7, "/x", False)
    content = bytes(100) + b"\xe8" + bytes(100)
    plan = Places().plan(mapping, 0x1000 + 105, lambda offset, size: content[offset : offset + size])
    assert (plan.offset, plan.slack_len, plan.code) == (105, 0, bytes(15))
