"""The process events connector: forks, execs and exits of the whole host over netlink (drivers/connector/cn_proc.c).

Layouts are from include/uapi/linux/connector.h and cn_proc.h. It is passive: nobody waits for its reader.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

from trapline_agent.kernel.perf_event import Lost

_NETLINK_CONNECTOR, _CN_IDX_PROC, _CN_VAL_PROC, _NLMSG_DONE = 11, 1, 1, 3
_LISTEN: Final = 1
_NONE, _EXEC = 0, 2
_ACK_TIMEOUT_S = 1.0
# nlmsghdr: len type flags seq pid; cn_msg: idx val seq ack len flags
_NLMSG = struct.Struct("=IHHII")
_CN = struct.Struct("=IIIIHH")
# proc_event: what cpu timestamp_ns, then pid and tgid (exec) or errno (none)
_EVENT = struct.Struct("=IIQII")
_RECEIVE_BYTES = 1 << 20


class ExecStream:
    """Execs of all processes. One reader."""

    def __init__(self) -> None:
        """Raises OSError: PermissionError without CAP_NET_ADMIN, TimeoutError outside of the first pid or user namespace,
        where the kernel keeps silent, others where it has no connector."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_CONNECTOR)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
            self._socket.bind((0, _CN_IDX_PROC))
            operation = struct.pack("=I", _LISTEN)
            body = _CN.pack(_CN_IDX_PROC, _CN_VAL_PROC, 0, 0, len(operation), 0) + operation
            self._socket.send(_NLMSG.pack(_NLMSG.size + len(body), _NLMSG_DONE, 0, 0, os.getpid()) + body)
            self._socket.settimeout(_ACK_TIMEOUT_S)
            while True:
                what, code, _ = self._event(self._socket.recv(4096))
                if what == _NONE:
                    break
            if code:
                raise OSError(code, os.strerror(code))
            self._socket.setblocking(False)
        except OSError:
            self._socket.close()
            raise

    @staticmethod
    def _event(data: bytes) -> tuple[int, int, int]:
        what, _, _, first, second = _EVENT.unpack_from(data, _NLMSG.size + _CN.size)
        return what, first, second

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> Iterator[int | Lost]:
        """Yields the pids that took on a new image since; never blocks."""
        while True:
            try:
                what, _, pid = self._event(self._socket.recv(4096))
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise
                yield Lost()
                continue
            if what == _EXEC:
                yield pid

    def close(self) -> None:
        self._socket.close()
