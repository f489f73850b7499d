"""VM exits and hypercalls, counted by Xen itself: its trace buffer, read with xentrace.

The records are those of Xen's public/trace.h: a word with the event (28 bits), the number of further words (3 bits) and whether eight bytes
of time follow.
"""

from __future__ import annotations

import signal
import struct
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

FILE = Path("/tmp/trace.bin")
# The classes HVM and PV, and in each the subclass of entries: what comes into Xen.
EVENTS = 0x00281000
VMEXIT, VMEXIT64 = 0x00081002, 0x00081102
HYPERCALL = 0x0020100D
LOST = 0x0001F001

# Intel SDM vol. 3, appendix C.
EXITS = {0: "exception", 37: "monitor trap", 48: "EPT violation"}
# Xen's public/xen.h.
HYPERCALLS = {1: "mmu_update", 12: "memory_op", 26: "mmuext_op", 32: "event_channel_op", 34: "hvm_op", 36: "domctl", 41: "dm_op"}
NOTIFY, SETUP = "event_channel_op", ("hvm_op", "memory_op", "domctl", "dm_op")


class Trace:
    """Counts while its `with` block runs: `exits` of all guests by their reason, `hypercalls` of dom0 by their name."""

    def __init__(self) -> None:
        self.exits: Counter[str] = Counter()
        self.hypercalls: Counter[str] = Counter()

    def __enter__(self) -> Self:
        FILE.unlink(missing_ok=True)
        command = ["xentrace", "-D", "-S", "2048", "-e", hex(EVENTS), "-s", "50", str(FILE)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE)
        while not FILE.exists() and self._process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.2)  # it has still to switch tracing on
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self._process.send_signal(signal.SIGINT)
        said = self._process.communicate(timeout=30)[1].decode()
        if kind is None:
            assert FILE.exists(), said
            assert FILE.stat().st_size, said
            self._count(FILE.read_bytes())

    def _count(self, data: bytes) -> None:
        at = 0
        while at + 4 <= len(data):
            (word,) = struct.unpack_from("<I", data, at)
            event, extra, timed = word & 0x0FFFFFFF, word >> 28 & 7, word >> 31
            first = at + 4 + 8 * timed
            at = first + 4 * extra
            assert event != LOST, "the trace buffer was too small"
            if event in (VMEXIT, VMEXIT64):
                (reason,) = struct.unpack_from("<I", data, first)
                self.exits[EXITS.get(reason, "other")] += 1
            elif event == HYPERCALL:
                (operation,) = struct.unpack_from("<I", data, first)
                self.hypercalls[HYPERCALLS.get(operation & 0xFFFFF, "other")] += 1


def table(title: str, columns: list[str], rows: list[tuple[object, ...]]) -> str:
    """Lines for the log, right-aligned."""
    cells = [[str(cell) for cell in row] for row in [tuple(columns), *rows]]
    widths = [max(len(row[n]) for row in cells) for n in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(["", title, *lines, ""])
