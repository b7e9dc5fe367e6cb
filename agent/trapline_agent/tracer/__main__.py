"""``trapline-tracer``: the tracer process."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from trapline_agent.kernel.process import die_with_parent
from trapline_agent.tracer.loop import Tracer
from trapline_agent.tracer.standing import Standing

_SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep the interpreter from one that serves a trap (the default is 5 ms)."""


def main() -> int:
    """Parses arguments and runs a tracer; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="trapline-tracer",
        description="Holds Trapline's breakpoints on this host. Speaks to one agent over a Unix socket; takes everything "
        "out when it does not hear of it for the lease, and on SIGTERM.",
    )
    parser.add_argument("--socket", type=Path, required=True, help="Unix socket to listen on (made with mode 0600)")
    parser.add_argument(
        "--journal",
        type=Path,
        help="file that says what is left in programs if the tracer is killed (default: the socket's name, .journal)",
    )
    parser.add_argument("--stay", action="store_true", help="go on without an agent when the lease has ended")
    parser.add_argument("--verbose", action="store_true", help="log more, to standard error")
    parser.add_argument(
        "--supervise",
        nargs=argparse.REMAINDER,
        metavar="CMD",
        help="start CMD (the agent) and start it again when it ends; for containers, where the tracer is the main process",
    )
    args = parser.parse_args()
    if args.supervise and args.supervise[0] == "--":
        del args.supervise[0]
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING,
        format="%(asctime)s trapline-tracer %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    standing = Standing()
    standing.take()
    try:
        tracer = Tracer(
            args.socket,
            journal=args.journal,
            stay=args.stay or bool(args.supervise),
            before_exec=standing.give_back,
        )
    except OSError as e:
        print(f"trapline-tracer: cannot serve at {args.socket}: {e.strerror or e}", file=sys.stderr)
        return 2
    # What start-up made lives for ever; a collection in the middle of a hit would hold up the target for it.
    gc.collect()
    gc.freeze()
    supervisor = _Supervisor(args.supervise, standing) if args.supervise else None
    try:
        tracer.run()
    finally:
        if supervisor is not None:
            supervisor.stop()
    return 0


class _Supervisor:
    """Keeps the agent running beside the tracer, from a process of its own, so that it takes nothing from the traps."""

    def __init__(self, command: list[str], standing: Standing) -> None:
        script = (
            'trap "kill -TERM \\$child 2>/dev/null; wait \\$child; exit 0" TERM INT; '
            'while :; do "$@" & child=$!; wait $child; sleep 1 & child=$!; wait $child; done'
        )
        tracer = os.getpid()

        def before_exec() -> None:
            standing.give_back()
            die_with_parent(tracer, signal.SIGTERM)

        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", script, "trapline-supervise", *command],
            preexec_fn=before_exec,
        )

    def stop(self) -> None:
        self._shell.terminate()
        try:
            self._shell.wait(10)
        except subprocess.TimeoutExpired:
            self._shell.kill()
            self._shell.wait()


if __name__ == "__main__":
    sys.exit(main())
