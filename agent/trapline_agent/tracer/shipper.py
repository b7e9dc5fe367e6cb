"""Everything that goes from the tracer to its agent, on a thread of its own: an agent that does not read must not hold up
the traps, nor the lease that is to end because of it."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from trapline_agent.engines.ring import HitRing
from trapline_agent.tracer import messages as m

FLUSH_S = 0.01
"""An agent flushes at 10 ms or 2,000 hits (docs: pipeline rule 2)."""


class Shipper:
    """Sends control messages in order, and what the rings hold, at most every ``FLUSH_S``."""

    def __init__(self, drain: Callable[[], list[tuple[HitRing, int, bytes]]]) -> None:
        """``drain`` takes (ring, count, encoded batch) out of all rings; it is called on the shipper's thread."""
        self._drain = drain
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._control: deque[bytes] = deque()
        self._greeting = b""
        self._socket: socket.socket | None = None
        self._closing = False
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
            if self._socket is not None:
                self._control.append(m.frame(message))
        self._wake.set()

    def data(self) -> None:
        """Says that a ring has something. Any thread, often."""
        self._wake.set()

    def _flush(self) -> None:
        with self._lock:
            if self._socket is None:
                return
        batches = self._drain()
        with self._lock:
            # Another agent may have come meanwhile; what was drained is then for that one.
            connection = self._socket
            # Hits go before the control messages that were queued meanwhile: a ``Done`` follows the hits it is about.
            frames = [self._greeting, *(m.hits_frame(batch) for _, _, batch in batches), *self._control]
            self._greeting = b""
            self._control.clear()
        try:
            if connection is None:
                raise ConnectionResetError
            connection.sendall(b"".join(frames))
        except OSError:
            self._forget(connection)  # the control thread sees the end of the connection itself
            for ring, count, _ in batches:
                ring.unsent(count)

    def _forget(self, connection: socket.socket | None) -> None:
        """Stops sending to an agent that is gone, unless another one has come."""
        with self._lock:
            if self._socket is connection:
                self._socket = None
                self._control.clear()

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait()
            self._wake.clear()  # before looking whether to close: the rest is sent once more
            started = time.monotonic()
            self._flush()
            # A steady stream is sent in batches: no sooner than FLUSH_S after the last.
            rest = FLUSH_S - (time.monotonic() - started)
            if rest > 0 and not self._control:
                time.sleep(rest)

    def close(self) -> None:
        """Sends the rest and ends the thread."""
        self._closing = True
        self._wake.set()
        self._thread.join()
