"""Hits that nobody looks at are counted before there is an event: each one all the same, and beside those that somebody looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import Arg, Budget

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def calls(build_guest: Callable[..., str]) -> str:
    """Calls f 300 times, and g and h in between and at the end: 31 times."""
    return build_guest("calls.S")


def assert_whole(vm: vmitap.Vm) -> None:
    """The guest has come to its end, was called as often as it says, and saw nothing."""
    assert [vm.read_u64(name) for name in ("f_count", "g_count", "h_count", "wrong_results")] == [300, 31, 31, 0]
    first = vm.symbol("mismatches")
    assert [vm.read_u64(first + 8 * kind) for kind in range(10)] == [0] * 10


def test_a_run_ends_at_the_very_hit_that_was_asked_for(calls: str) -> None:
    with vmitap.attach(calls, cmdline="n=300 every=10") as vm:
        f = vm.breakpoint("f")
        done = 0
        for count in (1, 1, 2, 15, 16, 17, 31, 32, 33, 100):
            result = vm.run(timeout=60, max_hits=count)
            assert (result.reason, result.hits) == ("max_hits", count)
            done += count
            # The call of the last hit is under way.
            assert (f.stats.hits, vm.read_u64("f_count")) == (done, done - 1)
        assert vm.run(timeout=60).reason == "idle"
        assert f.stats.hits == vm.stats.hits == 300
        # One event a hit, one for each read of the hidden page, and one at the beginning and one at the end of each write.
        assert vm.stats.events == vm.stats.hits + vm.stats.hidden_reads + 2 * vm.stats.hidden_writes
        assert_whole(vm)


def test_hits_that_are_handed_out_are_handed_out_among_those_that_are_counted(calls: str) -> None:
    seen = []
    with vmitap.attach(calls, cmdline="n=300 every=10") as vm:
        f = vm.breakpoint("f")
        vm.breakpoint("g", lambda hit: seen.append(hit.address))
        h = vm.breakpoint("h")
        assert vm.run(timeout=60).reason == "idle"
        assert (f.stats.hits, len(seen), h.stats.hits) == (300, 31, 31)
        assert_whole(vm)


def test_a_breakpoint_that_gets_something_to_look_at_is_no_longer_only_counted(calls: str) -> None:
    with vmitap.attach(calls, cmdline="n=300 every=10") as vm:
        plain = vm.breakpoint("f", key="plain")
        vm.run(timeout=60, max_hits=50)
        even = vm.breakpoint("f", where=Arg(0) & 1 == 0, key="even")
        rows = vm.breakpoint("f", capture={"i": Arg(0)}, key="rows")
        once = vm.breakpoint("f", once=True, key="once")
        tired = vm.breakpoint("f", budget=Budget(per_second=3), key="tired")
        vm.run(timeout=60)
        assert plain.stats.hits == 300
        # The call of the 50th hit was under way, so these see the ones from the 51st on.
        assert (even.stats.hits, even.stats.filtered) == (125, 125)
        assert (rows.stats.hits, vm.stats.rows) == (250, 250)
        assert (once.stats.hits, once.state) == (1, "removed")
        assert tired.stats.over_budget
        assert tired.stats.hits < 250
        assert_whole(vm)


def test_a_handler_that_is_set_later_is_called(calls: str) -> None:
    seen: list[int] = []
    with vmitap.attach(calls, cmdline="n=300 every=10") as vm:
        f = vm.breakpoint("f")
        vm.run(timeout=60, max_hits=100)

        @f
        def handler(hit: vmitap.Hit) -> None:
            seen.append(hit.args[0])

        vm.run(timeout=60)
        assert seen == list(range(100, 300))
        assert_whole(vm)
