"""The same with Qiling, which emulates a process on Unicorn: `qiling_peer.py PROGRAM CALLS ADDRESS`, for a static program without PIE."""

from __future__ import annotations

import sys
from time import process_time

from qiling import Qiling
from qiling.const import QL_VERBOSE

hits = 0
began = ended = 0.0


def look(ql: Qiling) -> None:
    """Counts, looks, goes on."""
    global hits, began, ended
    hits += 1
    _ = ql.arch.regs.rdi
    ended = process_time()
    if hits == 2:
        began = ended


def main() -> None:
    """Runs the program; times are those between the first counted call and the last."""
    program, calls, address = sys.argv[1], sys.argv[2], int(sys.argv[3], 0)
    ql = Qiling([program, calls], "/", verbose=QL_VERBOSE.DISABLED)
    ql.hook_address(look, address)
    ql.run()
    print("hits", hits, "ns", int((ended - began) * 1e9 * int(calls) / (hits - 2)))


if __name__ == "__main__":
    main()
