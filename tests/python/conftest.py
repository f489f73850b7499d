"""What every test can ask for: the fixtures of `vmitap.testing`, and an address in the demo guest that may be written to."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
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
