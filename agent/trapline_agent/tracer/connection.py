"""The tracer's socket, and its end of one connection: bytes in, messages out."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from trapline.errors import ProtocolError
from trapline_agent.tracer import messages as m

_READ_BYTES = 1 << 18


class Connection:
    """One that connected. Control thread alone, but for the shipper, which sends."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._received = bytearray()

    def receive(self) -> Iterator[m.ToTracer]:
        """Reads once, which does not block after the socket was found readable, and yields what is whole then.

        Raises:
            EOFError: the other end is closed.
            OSError: or broken.
            ProtocolError: it sent bytes that mean nothing.
        """
        data = self.socket.recv(_READ_BYTES)
        if not data:
            raise EOFError
        self._received += data
        while len(self._received) >= m.FRAME.size:
            length, kind = m.FRAME.unpack_from(self._received)
            if kind != m.CONTROL or length > m.MAX_FRAME_BYTES:
                raise ProtocolError(f"malformed frame to the tracer: kind {kind}, {length} bytes")
            end = m.FRAME.size + length
            if len(self._received) < end:
                return
            payload = bytes(self._received[m.FRAME.size : end])
            del self._received[:end]
            yield m.parse_to_tracer(payload)

    def close(self) -> None:
        """Ends it, also for a thread that is sending."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end was first
        finally:
            self.socket.close()


def listen(path: Path) -> socket.socket:
    """Returns a socket that listens at ``path``, with mode 0600; that of a tracer that is dead is replaced.

    Raises:
        OSError: it cannot be made; a tracer listens there (EADDRINUSE), or what is there is no socket (EEXIST).
    """
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if path.exists():
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise OSError(errno.EEXIST, f"{path} is there and is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)  # its tracer is dead
            else:
                raise OSError(errno.EADDRINUSE, f"a tracer listens on {path} already")
    before = os.umask(0o177)
    try:
        server.bind(str(path))
    finally:
        os.umask(before)
    server.listen(4)
    return server
