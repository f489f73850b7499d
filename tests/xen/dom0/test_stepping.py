"""Every way of stepping that Xen has gives the same answer (VMITAP_XEN_STEPPING): the emulator, fast steps, toggled steps."""

import struct

import pytest

import vmitap
from demo_guest import KERNEL_WINDOW, assert_unseen, finish, start_demo, symbols
from domain import Start, attach

# Without the repeated instructions, which are thousands of steps where the emulator is not used.
KINDS = ("movups",)
PAGE_FAULTS_FIXED = 0x70  # its offset in the truth page


@pytest.mark.parametrize("stepping", ["auto", "fast", "toggle"])
def test_hits_are_calls_and_nothing_is_seen_however_it_steps(start: Start, monkeypatch: pytest.MonkeyPatch, stepping: str) -> None:
    monkeypatch.setenv("VMITAP_XEN_STEPPING", stepping)
    start_demo(start, "mode=calls calls=100 parts=1 callers=1", kinds=KINDS)
    with attach("xen:demo") as vm:
        bp = vm.breakpoint(symbols()["open_file"])
        seen = finish(vm)
        assert bp.stats.hits == seen.calls["open_file"] == 100 * vm.vcpus
        assert_unseen(seen, KINDS)


def test_a_way_of_stepping_that_does_not_exist_is_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    start_demo(start, "mode=calls calls=1 parts=1")
    monkeypatch.setenv("VMITAP_XEN_STEPPING", "magic")
    with pytest.raises(vmitap.InvalidArgumentError, match="magic"):
        attach("xen:demo")


@pytest.mark.parametrize("stepping", ["auto", "fast", "toggle"])
def test_instructions_that_repeat_or_fault_do_what_they_did_however_it_steps(
    start: Start, monkeypatch: pytest.MonkeyPatch, stepping: str
) -> None:
    """A task hands the kernel a bad pointer in each round: the load that is tapped faults, and the kernel goes on behind it."""
    monkeypatch.setenv("VMITAP_XEN_STEPPING", stepping)
    start_demo(start, "rounds=2", kinds=KINDS)
    with attach("xen:demo") as vm:
        names = ("copy_user", "copy_user_move", "copy_user_load", "copy_user_string_bad")
        copies, repeated, loads, bad = (vm.breakpoint(symbols()[name]) for name in names)
        seen = finish(vm)
        (faults,) = struct.unpack("<Q", vm.read_pa(symbols()["truth"] - KERNEL_WINDOW + PAGE_FAULTS_FIXED, 8))
        assert repeated.stats.hits == copies.stats.hits > 0
        assert bad.stats.hits == faults == seen.rounds == 2
        assert loads.stats.hits > bad.stats.hits
        assert_unseen(seen, KINDS)
