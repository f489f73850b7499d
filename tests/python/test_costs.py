"""What can be promised about costs whatever the machine is: bytes, not times. The benchmarks measure the rest."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from heap import heap

import vmitap

if TYPE_CHECKING:
    from vmitap import Vm

BENCHES = Path(__file__).resolve().parents[2] / "benches" / "python"


says_how_much_is_in_use = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library does not say how much memory is in use"
)


class Nothing:
    """A controller that plants nothing."""

    def check_event(self, event: vmitap.VmiEvent, /) -> None:
        return None

    def insert_breakpoint(self, pa: int, view: vmitap.View, /) -> None:
        pass

    def remove_breakpoint(self, pa: int, view: vmitap.View, /) -> None:
        pass

    def monitor(self, gfn: int, view: vmitap.View, /) -> None:
        pass

    def unmonitor(self, gfn: int, view: vmitap.View, /) -> None:
        pass


@says_how_much_is_in_use
def test_pages_that_have_no_breakpoint_any_more_take_no_memory(vm: Vm) -> None:
    """However many have come and gone, and wherever they were."""
    count = 4_000
    manager = vmitap.BreakpointManager(vm, Nothing())
    used = []
    for turn in range(8):
        points = [((turn * count + at) << 16, 0x1000, vm.views.tap) for at in range(count)]
        for va, root, view in points:
            assert manager.insert_with_hint(va, root, view, va)
        for point in points:
            assert manager.remove(*point)
        gc.collect()
        used.append(heap())
    # With a page's record left behind it is over a megabyte, and with an entry of the index over half of one.
    assert used[-1] - used[1] < 300_000, used


@says_how_much_is_in_use
def test_a_breakpoint_takes_less_than_250_bytes_beside_its_shadow_page() -> None:
    command = [sys.executable, str(BENCHES / "bench_insertion.py"), "--turns", "1", "--json"]
    figures = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert figures["breakpoints"] == 100_000
    # Neither is 0: then it was not measured.
    assert figures["bytes_rust"] > 50
    assert figures["bytes_python"] > 50
    assert figures["bytes_rust"] + figures["bytes_python"] < 250
