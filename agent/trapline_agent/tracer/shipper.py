"""Everything that goes from the tracer to its agent, on a thread of its own: an agent that does not read must not hold up
the traps, nor the lease that is to end because of it."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from trapline_agent.engines.ring import HitRing
from trapline_agent.tracer import messages as m

log = logging.getLogger(__name__)

FLUSH_S = 0.01
"""An agent flushes at 10 ms or 2,000 hits (docs: pipeline rule 2)."""
_CLOSE_S = 2.0
"""How long an agent has to take what is left, when the tracer ends."""
_MAX_CONTROL = 10_000
"""Frames that wait for an agent that does not read; beyond, news of mappings is dropped (the agent looks by itself too), and
of files with frames (they are told again)."""
_NEWS = m.Mapped | m.FrameFile


class Shipper:
    """Sends control messages in order and at once, and what the rings hold: with them, or every ``FLUSH_S``."""

    def __init__(
        self, drain: Callable[[], list[tuple[HitRing, int, bytes]]], on_failure: Callable[[], None] = lambda: None
    ) -> None:
        """
        Args:
            drain: takes (ring, count, encoded batch) out of all rings; called on the shipper's thread.
            on_failure: called on that thread when it ends by an exception: nothing is sent any more.
        """
        self._drain = drain
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._urgent = threading.Event()
        """A control message waits: somebody may wait for it."""
        self._control: deque[bytes] = deque()
        self._settled: list[threading.Event] = []
        self._greeting = b""
        self._socket: socket.socket | None = None
        self._sending: socket.socket | None = None
        self._closing = False
        self.again_at = 0.0
        """CLOCK_MONOTONIC seconds at which ``drain`` is called again though nobody calls ``data``; 0: not. ``drain`` sets
        it."""
        self._thread = threading.Thread(target=self._run, name="trapline-ship", daemon=True)
        self._thread.start()

    def connect(self, connection: socket.socket, greeting: m.Message) -> None:
        """Begins to send to an agent: the greeting before all else, hits that wait too. What was meant for an earlier agent
        is forgotten."""
        with self._lock:
            self._control.clear()
            self._greeting = m.frame(greeting)
            self._socket = connection
        self._wake.set()

    def disconnect(self) -> None:
        """Stops sending; hits stay in their rings, within their bounds."""
        with self._lock:
            self._socket = None
            self._control.clear()

    def send(self, message: m.Message) -> None:
        """Queues a control message; without an agent it is dropped. Any thread."""
        with self._lock:
            if self._socket is None or (isinstance(message, _NEWS) and len(self._control) >= _MAX_CONTROL):
                return
            self._control.append(m.frame(message))
        self._urgent.set()
        self._wake.set()

    def data(self) -> None:
        """Says that a ring has something. Any thread, often."""
        self._wake.set()

    def settle(self, timeout: float) -> bool:
        """Waits until all that was queued went to the kernel, for ``timeout`` s at most; returns whether it did."""
        done = threading.Event()
        with self._lock:
            if self._socket is None:
                return False
            self._settled.append(done)
        self._wake.set()
        return done.wait(timeout)

    def _flush(self) -> None:
        with self._lock:
            connection = self._socket
            if connection is None:
                self._settled.clear()
                return
            # Taken before the rings are drained, and sent behind the hits: a ``Done`` follows all the hits it is about.
            control = list(self._control)
            self._control.clear()
            settled, self._settled = self._settled, []
        batches = self._drain()
        with self._lock:
            if self._socket is not connection:
                # Another agent has come, or none; what was drained is for that one, the messages were not.
                connection, control = self._socket, []
            greeting, self._greeting = self._greeting, b""
            self._sending = connection
        try:
            if connection is None:
                raise ConnectionResetError
            connection.sendall(b"".join((greeting, *(m.hits_frame(batch) for _, _, batch in batches), *control)))
        except OSError:
            self._forget(connection)  # the control thread sees the end of the connection itself
            for ring, count, _ in batches:
                ring.unsent(count)
        finally:
            with self._lock:
                self._sending = None
        for event in settled:
            event.set()

    def _forget(self, connection: socket.socket | None) -> None:
        """Stops sending to an agent that is gone, unless another one has come."""
        with self._lock:
            if self._socket is connection:
                self._socket = None
                self._control.clear()

    def _run(self) -> None:
        try:
            while not self._closing:
                self._wake.wait(max(0.0, self.again_at - time.monotonic()) if self.again_at else None)
                self._wake.clear()
                self._urgent.clear()
                started = time.monotonic()
                self._flush()
                # A steady stream of hits is sent in batches: no sooner than FLUSH_S after the last.
                rest = FLUSH_S - (time.monotonic() - started)
                if rest > 0 and not self._closing:
                    self._urgent.wait(rest)
            self._flush()  # what came during the last pause
        except Exception:
            log.exception("what sends to the agent failed; the tracer ends")
            self._on_failure()

    def close(self) -> None:
        """Sends the rest and ends the thread. An agent that does not take it in ``_CLOSE_S`` loses it."""
        self._closing = True
        self._urgent.set()
        self._wake.set()
        self._thread.join(_CLOSE_S)
        while self._thread.is_alive():
            with self._lock:
                blocked = self._sending
                if blocked is not None:
                    with contextlib.suppress(OSError):
                        blocked.shutdown(socket.SHUT_RDWR)
            self._thread.join(0.1)
