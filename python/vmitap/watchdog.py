"""What the watchdog of a session runs: waits until its standard input ends, as it does with the session's process, and repairs the guest.

Started by `vmitap.attach`. Without the command line's packages: it is there as long as the session is, and small.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import vmitap
from vmitap._native import _drop_privileges


def main() -> None:
    """Waits, and repairs the guest that the one argument names; does nothing if nothing was left in it."""
    (target,) = sys.argv[1:]
    # What the tool hands down to its children is not for this one: others may wait for its end.
    for descriptor in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if descriptor > 2:
            # The listing's own is closed already.
            with suppress(OSError):
                os.close(descriptor)
    # It waits for as long as a session lives, and a repair takes root's device files and nothing more.
    _drop_privileges()
    while sys.stdin.buffer.read(4096):
        pass
    vmitap.repair(target)


if __name__ == "__main__":
    main()
