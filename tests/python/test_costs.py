"""What can be promised about costs whatever the machine is: bytes, not times. The benchmarks measure the rest."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).resolve().parents[2] / "benches" / "python"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library does not say how much memory is in use")
def test_a_breakpoint_takes_less_than_250_bytes_beside_its_shadow_page() -> None:
    command = [sys.executable, str(BENCHES / "bench_insertion.py"), "--turns", "1", "--json"]
    figures = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert figures["breakpoints"] == 100_000
    # Neither is 0: then it was not measured.
    assert figures["bytes_rust"] > 50
    assert figures["bytes_python"] > 50
    assert figures["bytes_rust"] + figures["bytes_python"] < 250
