"""What Xen does to views while one is not looking (docs/xen.md): each is provoked, and no tap is lost or seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmitap
from demo_guest import KERNEL_WINDOW, READ_KINDS, assert_unseen, begin, finish, start_demo, symbols, truth
from domain import Start, attach
from vmitap import Access, VmiCore

if TYPE_CHECKING:
    from pathlib import Path


def frame(name: str) -> int:
    return (symbols()[name] - KERNEL_WINDOW) >> 12


def test_a_vcpu_that_looks_all_the_time_sees_nothing_of_taps_that_come_and_go(start: Start) -> None:
    """`change_gfn` gives the page the rights that the frame has: they deny reading before the page is shown."""
    start_demo(start, "mode=calls calls=100000000 parts=1", vcpus=2)
    with attach("xen:demo") as vm:
        begin(vm)
        for _ in range(12):
            tap = vm.breakpoint(symbols()["open_file"])
            assert vm.run(timeout=5, max_hits=3).reason == "max_hits"
            tap.remove()
            vm.run(timeout=0.01)
        seen = truth(vm)
        assert seen.vcpu_checks[1] > 5
        assert seen.mismatches == dict.fromkeys(READ_KINDS, 0)
        assert vm.stats.hidden_reads > 0


def test_rights_that_change_in_the_default_view_take_no_tap_away(start: Start) -> None:
    """Xen writes them through to every view, over the entry of the hidden page."""
    start_demo(start, "mode=calls calls=50 parts=1", vcpus=1)
    with attach("xen:demo") as vm:
        core, tap = VmiCore(vm), vm.breakpoint(symbols()["open_file"])
        page = frame("open_file")
        for access in (Access.RX, Access.RWX):
            core.set_memory_access(page, vm.views.default, access)
            assert core.memory_access(page, vm.views.default) == access
        seen = finish(vm)
        assert tap.stats.hits == seen.calls["open_file"] == 50
        assert_unseen(seen)


def test_a_frame_that_is_given_back_takes_no_other_page_with_it(start: Start) -> None:
    """Xen throws the whole view away when a frame goes that lies between two that the view shows."""
    start_demo(start, "rounds=2")
    assert len({frame(name) for name in ("open_file", "copy_user", "check_integrity")}) > 1
    with attach("xen:demo") as vm:
        core = VmiCore(vm)
        first = vm.breakpoint(symbols()["open_file"])
        between = core.allocate_frame()
        last = vm.breakpoint(symbols()["copy_user"])
        core.free_frame(between)
        last.remove()
        seen = finish(vm)
        assert first.stats.hits == seen.calls["open_file"] > 0
        assert_unseen(seen)


def test_a_page_that_a_view_has_never_met_has_all_rights_in_it(start: Start) -> None:
    """Xen has no entry for it, and says that there is none."""
    start_demo(start, "mode=calls calls=1 parts=1")
    with attach("xen:demo") as vm:
        core, view = VmiCore(vm), vm.views.create()
        page = frame("open_file")
        assert core.memory_access(page, view) == Access.RWX
        core.set_memory_access(page, view, Access.X)
        assert core.memory_access(page, view) == Access.X
        assert core.memory_access(page + 1, view) == Access.RWX


def test_a_view_can_be_entered_at_once_and_not_once_it_is_gone(start: Start) -> None:
    """Xen moves vCPUs only into views that it calls visible, which a new one is."""
    start_demo(start, "mode=calls calls=1 parts=1")
    with attach("xen:demo") as vm:
        view = vm.views.create()
        vm.views.switch_to(view)
        assert [vm.views.of(vcpu) for vcpu in range(vm.vcpus)] == [view] * vm.vcpus
        vm.views.switch_to(vm.views.tap)
        vm.views.destroy(view)
        with pytest.raises(vmitap.ViewNotFoundError):
            vm.views.switch_to(view)


def test_a_domain_that_somebody_else_listens_to_is_refused(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Xen has one ring a domain: a tool that keeps its journal elsewhere is refused too, and harms nothing."""
    start_demo(start, "mode=calls calls=20 parts=1", vcpus=1)
    with attach("xen:demo") as vm:
        tap = vm.breakpoint(symbols()["open_file"])
        monkeypatch.setenv("VMITAP_STATE", str(tmp_path))
        with pytest.raises(vmitap.AttachError, match="listens"):
            attach("xen:demo")
        assert finish(vm).calls["open_file"] == tap.stats.hits == 20
