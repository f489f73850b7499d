"""The same with python-ptrace, a debugger written in Python: `ptrace_peer.py PROGRAM CALLS ADDRESS`, for a program without PIE."""

from __future__ import annotations

import os
import sys
from signal import SIGTRAP
from time import process_time_ns

from ptrace.debugger import ProcessExit, PtraceDebugger
from ptrace.debugger.child import createChild


def main() -> None:
    """Starts the program, and plants, hits, steps over and plants again."""
    program, calls, address = sys.argv[1], sys.argv[2], int(sys.argv[3], 0)
    pid = createChild([program, calls], False, dict(os.environ))
    debugger = PtraceDebugger()
    process = debugger.addProcess(pid, True)
    hits = began = ended = 0
    breakpoint_ = process.createBreakpoint(address)
    try:
        while True:
            process.cont()
            process.waitSignals(SIGTRAP)
            hits += 1
            ended = process_time_ns()
            began = began or ended
            process.getreg("rdi")
            breakpoint_.desinstall(set_ip=True)
            process.singleStep()
            process.waitSignals(SIGTRAP)
            breakpoint_ = process.createBreakpoint(address)
    except ProcessExit:
        pass
    print("hits", hits, "busy", ended - began, flush=True)
    debugger.quit()


if __name__ == "__main__":
    main()
