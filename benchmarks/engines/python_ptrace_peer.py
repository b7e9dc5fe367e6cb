"""The peer: python-ptrace's own debugger counting hits of a breakpoint, as its documentation does it.

Usage: python -m benchmarks.engines.python_ptrace_peer PID ADDRESS. Prints "armed" and serves hits; on SIGTERM, while the
target stands still, takes the breakpoint out, detaches and prints "served HITS".
"""

from __future__ import annotations

import signal
import sys

from ptrace.debugger import PtraceDebugger


class _Stop(Exception):
    pass


def _stop(number: int, frame: object) -> None:
    raise _Stop


def main() -> None:
    pid, address = int(sys.argv[1]), int(sys.argv[2], 0)
    debugger = PtraceDebugger()
    process = debugger.addProcess(pid, is_attached=False)
    breakpoint_ = process.createBreakpoint(address)
    process.cont()
    signal.signal(signal.SIGTERM, _stop)
    print("armed", flush=True)
    hits = 0
    try:
        while True:
            debugger.waitSignals(signal.SIGTRAP)
            breakpoint_.desinstall(set_ip=True)
            hits += 1
            process.singleStep()
            debugger.waitSignals(signal.SIGTRAP)
            breakpoint_ = process.createBreakpoint(address)
            process.cont()
    except _Stop:
        process.kill(signal.SIGSTOP)
        debugger.waitSignals(signal.SIGSTOP)
    breakpoint_.desinstall()
    process.detach()
    debugger.quit()
    print(f"served {hits}", flush=True)


if __name__ == "__main__":
    main()
