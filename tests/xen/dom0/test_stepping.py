"""Every way of stepping that Xen has gives the same answer (VMITAP_XEN_STEPPING): the emulator, fast steps, toggled steps."""

import pytest

import vmitap
from demo_guest import assert_unseen, finish, start_demo, symbols
from domain import Start, attach

# Without the repeated instructions, which are thousands of steps where the emulator is not used.
KINDS = ("movups",)


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
