"""What the watchdog of a session runs: waits until its standard input ends, as it does with the session's process, and repairs the guest.

Started by `vmitap.attach`. Without the command line's packages: it is there as long as the session is, and small.
"""

from __future__ import annotations

import sys

import vmitap
from vmitap._native import _drop_privileges


def main() -> None:
    """Waits, and repairs the guest that the one argument names; does nothing if nothing was left in it."""
    (target,) = sys.argv[1:]
    # It waits for as long as a session lives, and a repair takes root's device files and nothing more.
    _drop_privileges()
    while sys.stdin.buffer.read(4096):
        pass
    vmitap.repair(target)


if __name__ == "__main__":
    main()
