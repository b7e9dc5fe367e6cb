"""What the agent asks the reader process, and what it answers: msgpack behind its length in four bytes."""

from __future__ import annotations

import socket
import struct
import time
from typing import Any, Final

import msgspec

from trapline.errors import ProtocolError

MAX_BYTES: Final = 64 << 20
_LENGTH: Final = struct.Struct("<I")


class Open(msgspec.Struct, frozen=True, tag="open"):
    """The first request; answered with the index that was made, or nothing where ``index`` was used."""

    segments: list[tuple[int, int, int]]
    """Of the program: (file offset, virtual address, bytes)."""
    index: bytes | None


class ScopeOf(msgspec.Struct, frozen=True, tag="scope"):
    offset: int


class TypeOf(msgspec.Struct, frozen=True, tag="type"):
    ref: int


class VariableOf(msgspec.Struct, frozen=True, tag="variable"):
    name: str


class LineOf(msgspec.Struct, frozen=True, tag="line"):
    file: str
    line: int


class InlinedOf(msgspec.Struct, frozen=True, tag="inlined"):
    function: str


class SourceOf(msgspec.Struct, frozen=True, tag="source"):
    offset: int


Request = Open | ScopeOf | TypeOf | VariableOf | LineOf | InlinedOf | SourceOf


class Answer(msgspec.Struct, tag="answer"):
    result: msgspec.Raw


class Failure(msgspec.Struct, tag="failure"):
    error: dict[str, Any]
    """As ``TraplineError.to_wire`` gives it."""


def send(peer: socket.socket, message: msgspec.Struct) -> None:
    """Sends one message. Raises OSError, ProtocolError."""
    data = msgspec.msgpack.encode(message)
    if len(data) > MAX_BYTES:
        raise ProtocolError(f"a message of {len(data)} bytes")
    peer.sendall(_LENGTH.pack(len(data)) + data)


def receive(peer: socket.socket, deadline: float | None = None) -> bytes | None:
    """Returns one message, or None at the end of the stream.

    Args:
        peer: a stream.
        deadline: of time.monotonic.

    Raises:
        TimeoutError: it is over.
        ProtocolError: the message is too long.
        OSError: the peer is gone.
    """
    head = _exactly(peer, _LENGTH.size, deadline)
    if head is None:
        return None
    (size,) = _LENGTH.unpack(head)
    if size > MAX_BYTES:
        raise ProtocolError(f"a message of {size} bytes")
    return _exactly(peer, size, deadline)


def _exactly(peer: socket.socket, size: int, deadline: float | None) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            peer.settimeout(left)
        data = peer.recv(min(size - len(parts), 1 << 20))
        if not data:
            return None
        parts += data
    return bytes(parts)
