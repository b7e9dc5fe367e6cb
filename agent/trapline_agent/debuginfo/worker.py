"""The reader process: reads one file's debug information for the agent, and may be killed by what is in it.

``python -m trapline_agent.debuginfo.worker SOCKET PARENT PROGRAM DEBUG ALTERNATE``: descriptors (-1: none), and the agent's
pid. It has no privileges, opens nothing, and ends with the agent. It answers one request after the other.
"""

from __future__ import annotations

import resource
import signal
import socket
import sys
from typing import Final

import msgspec

from trapline.errors import ResolveError, TraplineError
from trapline_agent.debuginfo import libdw, messages
from trapline_agent.debuginfo.reader import Reader, Segment
from trapline_agent.kernel.process import die_with_parent, give_up_privileges, set_name

MEMORY_BYTES: Final = 300 << 20
"""Of its own; what it maps of files is not counted."""
REQUEST_S: Final = 60
"""CPU seconds for one request; a signal ends it then."""
_ADDRESS_SPACE: Final = 64 << 30


def main() -> None:
    """Runs the process."""
    peer, parent, program, debug, alternate = (int(a) for a in sys.argv[1:])
    set_name("trapline-debug")
    sys.setrecursionlimit(2000)
    with socket.socket(fileno=peer) as stream:
        try:
            libdw.load()
        except TraplineError as e:  # the first request is answered with it, and so is each further one
            failure: TraplineError | None = e
        else:
            failure = None
        _limit()
        give_up_privileges()
        die_with_parent(parent, signal.SIGKILL)
        descriptors = [None if fd < 0 else fd for fd in (debug, alternate)]
        serve(stream, program, descriptors[0], descriptors[1], failure)


def _limit() -> None:
    for what, most in (
        (resource.RLIMIT_DATA, MEMORY_BYTES),
        (resource.RLIMIT_AS, _ADDRESS_SPACE),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        _, hard = resource.getrlimit(what)
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (limit, limit))
    # Nothing more can be opened, whatever a file names; what is open stays so.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


def serve(
    stream: socket.socket, program: int, debug: int | None, alternate: int | None, failure: TraplineError | None
) -> None:
    """Answers until the agent hangs up."""
    decoder = msgspec.msgpack.Decoder(messages.Request)
    reader: Reader | None = None
    while (data := messages.receive(stream)) is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + REQUEST_S + 1, hard))
        try:
            if failure is not None:
                raise failure
            request = decoder.decode(data)
            if isinstance(request, messages.Open):
                reader = Reader(program, debug, alternate, [Segment(*s) for s in request.segments])
                used_it = request.index is not None and reader.use(request.index)
                result: object = None if used_it else reader.index()
            elif reader is None:
                raise ResolveError("nothing was opened")
            else:
                result = _answer(reader, request)
            answer: messages.Answer | messages.Failure = messages.Answer(msgspec.Raw(msgspec.msgpack.encode(result)))
        except TraplineError as e:
            answer = messages.Failure(e.to_wire())
        except Exception as e:  # noqa: BLE001 - whatever the file brings about is an answer
            answer = messages.Failure(ResolveError(f"its debug information is malformed: {e!r}"[:500]).to_wire())
        messages.send(stream, answer)


def _answer(reader: Reader, request: messages.Request) -> object:
    match request:
        case messages.ScopeOf(offset):
            return reader.scope(offset)
        case messages.TypeOf(ref):
            return reader.type(ref)
        case messages.VariableOf(name):
            return reader.variable(name)
        case messages.LineOf(file, line):
            return reader.line(file, line)
        case messages.InlinedOf(function):
            return reader.inlined(function)
        case messages.SourceOf(offset):
            return reader.source(offset)
    raise ResolveError("a request that is not known")


if __name__ == "__main__":
    main()
