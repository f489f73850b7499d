"""What every test can ask for: the fixtures of `vmitap.testing`, an address in the demo guest that may be written to, and the guests of
tests/guests."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import stand_in

if TYPE_CHECKING:
    from collections.abc import Callable

    import vmitap

pytest_plugins = ["vmitap.testing"]

# A shell that starts the tests in the background has Ctrl-C ignored, and programs that a test starts inherit that: the tests of
# Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def vm(demo_vm: vmitap.Vm) -> vmitap.Vm:
    """The demo guest under its short name, as the examples of the documentation have it."""
    return demo_vm


@pytest.fixture
def scratch(vm: vmitap.Vm) -> int:
    """An address in `vm` that may be written to."""
    return vm.symbol("boot_copy")


@pytest.fixture(scope="session")
def build_guest(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Builds a guest, once, of a source in tests/guests or at a path, and of C files there; returns what to attach to."""
    program = Path(__file__).parents[1] / "guests" / "build.py"

    @functools.cache
    def build(source: str | Path, *more: str) -> str:
        image = tmp_path_factory.mktemp("guests") / f"{Path(source).stem}.elf"
        subprocess.run([sys.executable, str(program), str(source), str(image), *more], check=True, timeout=60)
        return f"emu:{image}"

    return build


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for Xen's libraries."""
    return stand_in.build(tmp_path_factory.mktemp("xen"))
