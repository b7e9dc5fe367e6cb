"""What is asked of /proc about the processes of a host, in one place; a simulated host (``engines.fake``) answers it too."""

from __future__ import annotations

import os
from typing import Protocol

from trapline_agent.kernel import procfs
from trapline_agent.targets import maps, process
from trapline_agent.targets.files import open_mapped
from trapline_agent.targets.maps import Mapping
from trapline_agent.targets.process import ProcessFacts


class Proc(Protocol):
    """The processes of a host. Any thread; of a process that is gone they raise ProcessLookupError, but for ``facts``."""

    def pids(self) -> list[int]:
        """Those that are there now, ascending."""

    def facts(self, pid: int) -> ProcessFacts | None:
        """What is said of a process, or None where there is none (any more)."""

    def maps(self, pid: int) -> bytes:
        """The text of /proc/PID/maps: proc(5)."""

    def content(self, pid: int, mapping: Mapping, offset: int, size: int) -> bytes:
        """Bytes of a mapped file, fewer at its end. Raises TraplineError where it cannot be opened, OSError."""

    def start_time(self, pid: int) -> int:
        """Clock ticks after boot."""

    def parent(self, pid: int) -> int:
        """The pid of the parent."""


class RealProc:
    """This host's /proc."""

    def pids(self) -> list[int]:
        return process.pids()

    def facts(self, pid: int) -> ProcessFacts | None:
        return process.facts(pid)

    def maps(self, pid: int) -> bytes:
        return maps.read_maps(pid)

    def content(self, pid: int, mapping: Mapping, offset: int, size: int) -> bytes:
        fd = open_mapped(pid, mapping)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def start_time(self, pid: int) -> int:
        return procfs.start_time(pid)

    def parent(self, pid: int) -> int:
        return int(procfs.stat_fields(pid)[1])
