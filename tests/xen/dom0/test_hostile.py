"""Guests that make it hard: storms of their own breakpoints, pages rewritten under a tap, a full ring, views that run out."""

from __future__ import annotations

import struct

import pytest

import vmitap
from demo_guest import KERNEL_WINDOW, assert_unseen, begin, finish, start_demo, symbols, truth
from domain import Start, attach, wait_for
from vmitap import Filter, OnWrite

STORM = 40
# What probe_storm executes: INT3 plain, behind prefixes, and as INT 3.
FORMS = 6


def test_a_storm_of_the_guests_own_breakpoints_goes_to_the_guest_and_ours_are_ours(start: Start) -> None:
    start_demo(start, f"mode=probes probes=1 storm={STORM}", vcpus=1)
    with attach("xen:demo") as vm:
        names = ("probe_storm", "storm_plain", "storm_prefixed")
        # One beside them on the page, one of ours on the first byte of one of the guest's, one on a prefix; and one inside an instruction.
        beside, plain, prefixed = (vm.breakpoint(symbols()[name]) for name in names)
        inside = vm.breakpoint(symbols()["storm_prefixed"] + 1)
        assert len({symbols()[name] >> 12 for name in names}) == 1
        seen = finish(vm)
        assert (beside.stats.hits, plain.stats.hits, prefixed.stats.hits, inside.stats.hits) == (STORM, STORM, STORM, 0)
        assert seen.own_breakpoints == STORM * FORMS
        assert_unseen(seen)


@pytest.mark.seconds(1.7)
def test_a_vcpu_that_rewrites_the_tapped_page_all_the_time_breaks_no_tap(start: Start) -> None:
    """vCPU 1 stores to each word of the text through another mapping, and waits for nobody; vCPU 0 calls what is tapped there."""
    start_demo(start, "mode=calls calls=200 parts=1", vcpus=2, kinds=["xadd"])
    with attach("xen:demo", on_write=OnWrite.REAPPLY) as vm:
        tap = vm.breakpoint(symbols()["open_file"])
        seen = finish(vm)
        assert tap.stats.hits == seen.calls["open_file"] == 200
        assert seen.vcpu_checks[1] > 0
        assert vm.stats.hidden_writes > 512
        assert vm.stats.removed_by_write == 0
        assert_unseen(seen, ["xadd"])


@pytest.mark.parametrize(
    "vcpus",
    [
        4,
        # As many as the ring has slots, and the guest has room for.
        pytest.param(8, marks=[pytest.mark.long, pytest.mark.seconds(4)]),
    ],
)
def test_no_call_is_lost_when_many_vcpus_hammer_a_tapped_function(start: Start, vcpus: int) -> None:
    start_demo(start, "mode=calls calls=150 parts=1 callers=1 check=0", vcpus=vcpus)
    with attach("xen:demo") as vm:
        every = vm.breakpoint(symbols()["open_file"], where=Filter.every(3))
        begin(vm)
        result = vm.run(timeout=120)
        assert result.reason == "idle"
        calls = truth(vm).calls["open_file"]
        assert calls == 150 * vcpus
        assert every.stats.hits + every.stats.filtered == result.hits + result.filtered == calls
        assert every.stats.hits == calls // 3
        assert result.lost == 0


def test_views_that_run_out_are_an_error_and_all_that_there_are_work_and_are_given_back(start: Start) -> None:
    guest = start_demo(start, "mode=calls calls=40 parts=1 paced=20", vcpus=1)
    for turn in (1, 2):
        with attach("xen:demo") as vm:
            made = [vm.views.create() for _ in range(vm.caps.max_views - 1)]
            for _ in range(2):
                with pytest.raises(vmitap.DriverError, match="no room for another view") as error:
                    vm.views.create()
                assert error.value.errno == 22
            taps = [vm.breakpoint(symbols()["open_file"], view=view) for view in (vm.views.tap, *made)]
            # What was made last, and another in the place of one that went.
            vm.views.destroy(made[0])
            fresh = vm.views.create()
            taps.append(vm.breakpoint(symbols()["open_file"], view=fresh))
            begin(vm, turn)
            for view, tap in ((made[-1], taps[-2]), (fresh, taps[-1]), (vm.views.tap, taps[0])):
                vm.views.switch_to(view)
                before = [each.stats.hits for each in taps]
                assert vm.run(timeout=30, max_hits=6).reason == "max_hits"
                hits = {each: each.stats.hits - last for each, last in zip(taps, before, strict=True)}
                # One may have been on its way, from the view that the vCPU was in.
                assert sum(hits.values()) == 6
                assert hits[tap] >= 5
        wait_for("the turn", lambda: "integrity:" in guest.console or turn == 1)  # noqa: B023
    assert ", 0 mismatches" in guest.console


def test_a_write_is_thrown_away_where_the_emulator_can(start: Start) -> None:
    """A plain store of a number, which Xen's emulator is known to do right."""
    start_demo(start, "mode=probes probes=3", vcpus=1)
    place = symbols()["probe_results"]
    with attach("xen:demo", on_write=OnWrite.DENY) as vm:
        guarded = vm.breakpoint(place)
        seen = finish(vm)
        rounds, *rest = struct.unpack("<12Q", vm.read_pa(place - KERNEL_WINDOW, 96))
        # What it stored beside it is there, and what it stored at the breakpoint is not.
        assert rounds == 0
        assert all(rest[4:6])
        assert guarded.state == "active"
        assert vm.stats.hidden_writes >= 3
        assert vm.stats.removed_by_write == 0
        assert_unseen(seen)
