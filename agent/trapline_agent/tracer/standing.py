"""What the tracer takes from the kernel beyond an ordinary process, and gives back in what it starts."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

_OOM = Path("/proc/self/oom_score_adj")
_OOM_SCORE = -900
"""The tracer's death is fatal to programs that hold breakpoints; before it, nearly all others are ended (proc(5))."""


class Standing:
    """As many descriptors as permitted, for each followed process has one; and to be ended last when memory is out."""

    def __init__(self) -> None:
        self._files = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._oom = ""

    def take(self) -> None:
        """Takes what this process may have."""
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (self._files[1], self._files[1]))
        with contextlib.suppress(OSError, ValueError):
            before = _OOM.read_text().strip()
            if int(before) > _OOM_SCORE:
                _OOM.write_text(str(_OOM_SCORE))
                self._oom = before

    def give_back(self) -> None:
        """For a fresh child, before its exec: it gets what the tracer had at first."""
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, self._files)
        if self._oom:
            with contextlib.suppress(OSError):
                _OOM.write_text(self._oom)
