"""What every test can ask for: a fresh session with the demo guest, and an address in it that may be written to."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

import vmitap

if TYPE_CHECKING:
    from collections.abc import Iterator

# A shell that starts the tests in the background has Ctrl-C ignored, and programs that a test starts inherit that: the tests of
# Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def vm() -> Iterator[vmitap.Vm]:
    """A fresh session; it is ended, and the guest restored, even if the test forgets it."""
    with vmitap.attach("demo") as session:
        yield session


@pytest.fixture
def scratch(vm: vmitap.Vm) -> int:
    """An address in `vm` that may be written to."""
    return vm.symbol("boot_copy")
