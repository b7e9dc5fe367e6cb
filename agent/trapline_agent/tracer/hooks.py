"""How the tracer learns of mappings in processes that it does not follow yet.

Processes that it follows tell by themselves: fork and exec stops, and the loader's ``_dl_debug_state``, all before the new
code runs. For the rest there is ``mappers``, which holds them until they are armed, where the file system can; the perf
side-band stream, which comes after the fact (what ran before is reported as *may have missed*), or where there is none the
connector's exec events; and behind everything the periodic look at /proc.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable

from trapline_agent.kernel.perf_event import Lost, MappingStream
from trapline_agent.kernel.proc_connector import ExecStream
from trapline_agent.plans import FileKey
from trapline_agent.targets.process import text
from trapline_agent.tracer.messages import Mapped

log = logging.getLogger(__name__)


class MappingHook:
    """Watches the host's executable mappings on a thread of its own."""

    name = "perf-mmap"

    def __init__(
        self,
        *,
        is_probed: Callable[[FileKey], bool],
        on_mapping: Callable[[int], None],
        on_unknown: Callable[[Mapped], None],
        on_lost: Callable[[], None],
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """The callbacks run on the hook's thread and must not block.

        Args:
            is_probed: whether a file has uprobes.
            on_mapping: a process (pid) mapped a probed file.
            on_unknown: a process mapped another file whose basename is watched.
            on_lost: records are missing.
            on_failure: the thread ends by an exception.
        """
        self._is_probed = is_probed
        self._on_mapping = on_mapping
        self._on_unknown = on_unknown
        self._on_lost = on_lost
        self._on_failure = on_failure
        self._names: frozenset[bytes] = frozenset()
        self._stop_r, self._stop_w = os.pipe()
        self._thread: threading.Thread | None = None
        self.reason = ""
        """Why it does not work here; empty if it does."""

    def start(self) -> bool:
        """Opens the stream; returns whether it works on this host."""
        try:
            stream = MappingStream()
        except OSError as e:
            self.reason = e.strerror or str(e)
            return False
        self._thread = threading.Thread(target=self._run, args=(stream,), name="trapline-hook", daemon=True)
        self._thread.start()
        return True

    def watch(self, names: list[str]) -> None:
        """Sets the basenames that are told of in ``on_unknown``."""
        self._names = frozenset(os.fsencode(n) for n in names)

    def _run(self, stream: MappingStream) -> None:
        poll = select.poll()
        for fd in (*stream.filenos(), self._stop_r):
            poll.register(fd, select.POLLIN)
        own = os.getpid()
        try:
            while not any(fd == self._stop_r for fd, _ in poll.poll()):
                for record in stream.read():
                    if isinstance(record, Lost):
                        self._on_lost()
                    elif record.pid != own:
                        self._seen(record.pid, FileKey(record.dev, record.inode), record.path)
        except Exception:
            log.exception("the watch over mappings failed; the tracer ends")
            self._on_failure()
        finally:
            stream.close()

    def _seen(self, pid: int, file: FileKey, path: bytes) -> None:
        if self._is_probed(file):
            self._on_mapping(pid)
        elif self._names and path.rpartition(b"/")[2] in self._names:
            self._on_unknown(Mapped(pid=pid, path=text(path), file=file))

    def close(self) -> None:
        if self._thread is not None:
            os.write(self._stop_w, b"x")
            self._thread.join()
        os.close(self._stop_r)
        os.close(self._stop_w)


class ExecHook:
    """Watches the host's execs on a thread of its own, where there is no stream of mappings: what a program is linked with
    and what it opens later is left to the periodic look."""

    name = "proc-connector"

    def __init__(self, *, on_exec: Callable[[int], None], on_lost: Callable[[], None]) -> None:
        """The callbacks run on the hook's thread and must not block.

        Args:
            on_exec: a process (pid) has a new image.
            on_lost: events are missing.
        """
        self._on_exec = on_exec
        self._on_lost = on_lost
        self._stop_r, self._stop_w = os.pipe()
        self._thread: threading.Thread | None = None
        self._stream: ExecStream | None = None
        self.reason = ""
        """Why it does not work here; empty if it does."""
        try:
            self._stream = ExecStream()
        except OSError as e:
            self.reason = f"the kernel refuses process events: {e.strerror or e}"

    @property
    def available(self) -> bool:
        return not self.reason

    def start(self) -> bool:
        """Begins to watch; returns whether it works on this host."""
        if self._stream is None:
            return False
        self._thread = threading.Thread(target=self._run, args=(self._stream,), name="trapline-execs", daemon=True)
        self._thread.start()
        return True

    def _run(self, stream: ExecStream) -> None:
        poll = select.poll()
        for fd in (stream.fileno(), self._stop_r):
            poll.register(fd, select.POLLIN)
        try:
            while not any(fd == self._stop_r for fd, _ in poll.poll()):
                for event in stream.read():
                    if isinstance(event, Lost):
                        self._on_lost()
                    else:
                        self._on_exec(event)
        except Exception:
            log.exception("the watch over execs failed; the periodic look goes on")

    def close(self) -> None:
        """Ends the watch, and gives the stream back if it never began."""
        if self._thread is not None:
            os.write(self._stop_w, b"x")
            self._thread.join()
            self._thread = None
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._stop_r >= 0:
            os.close(self._stop_r)
            os.close(self._stop_w)
            self._stop_r = -1
