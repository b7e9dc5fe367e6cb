"""The peer: python-ptrace's own debugger counting hits of a breakpoint, as its documentation does it.

Usage: python -m benchmarks.engines.python_ptrace_peer PID ADDRESS HITS. Prints "armed", serves exactly HITS hits, takes
the breakpoint out, detaches and prints "served HITS".
"""

from __future__ import annotations

import signal
import sys

from ptrace.debugger import PtraceDebugger


def main() -> None:
    pid, address, hits = int(sys.argv[1]), int(sys.argv[2], 0), int(sys.argv[3])
    debugger = PtraceDebugger()
    process = debugger.addProcess(pid, is_attached=False)
    breakpoint_ = process.createBreakpoint(address)
    process.cont()
    print("armed", flush=True)
    for served in range(1, hits + 1):
        debugger.waitSignals(signal.SIGTRAP)
        breakpoint_.desinstall(set_ip=True)
        if served == hits:
            break
        process.singleStep()
        debugger.waitSignals(signal.SIGTRAP)
        breakpoint_ = process.createBreakpoint(address)
        process.cont()
    process.detach()
    debugger.quit()
    print(f"served {hits}", flush=True)


if __name__ == "__main__":
    main()
