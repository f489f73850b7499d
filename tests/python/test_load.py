"""More events than anybody can take: nothing is lost that is not counted, and what the guest counts is what is told."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import Access, Arg, Filter
from vmitap.cli.truth import Truth

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CALLS = "mode=calls callers=1 check=0 calls="
STORM = """
#define TAPPED_SIZE 4096
#include "boot.inc"
counter own
counter guest_handled
	.text
	.global main
main:
	lea rax, [rip + on_int3]
	mov [rip + handlers + 3 * 8], rax
	mov ecx, 20000
1:	.global storm, prefixed, tapped
storm:	int3
prefixed:
	.byte 0x66, 0xf2, 0xcc
	.byte 0xcd, 0x03
tapped:	nop
	add qword ptr [rip + own], 3
	dec ecx
	jnz 1b
	ret
on_int3:
	count guest_handled
	ret
	.section .tapped, "ax"
	.fill 4096, 1, 0x90
"""


def assert_well(truth: Truth) -> None:
    assert truth.finished
    assert not any(truth.mismatches.values())


def test_of_a_million_hits_on_four_vcpus_each_is_counted_once_as_taken_filtered_or_lost() -> None:
    with vmitap.attach("demo", vcpus=4, cmdline=f"{CALLS}250000") as vm:
        # A third of them does not pass, and what passes is more than the queue holds.
        bp = vm.breakpoint("open_file", where=Filter.every(3))
        everything = vm.breakpoint("open_file", key="all")
        events = vm.events(bp, everything, queue=1000)
        taken = {bp.key: 0, "all": 0}
        for hit in events:
            taken[hit.key] += 1
        assert events.result is not None
        result, truth = events.result, Truth.read(vm)
        assert_well(truth)
        assert truth.calls["open_file"] == everything.stats.hits == 1_000_000
        assert bp.stats.hits + bp.stats.filtered == 1_000_000
        assert bp.stats.filtered > 600_000
        assert sum(taken.values()) + events.lost == bp.stats.hits + everything.stats.hits
        assert result.lost == events.lost


def test_a_reader_that_stops_reading_loses_what_does_not_fit_and_says_how_much() -> None:
    with vmitap.attach("demo", vcpus=4, cmdline=f"{CALLS}20000") as vm:
        bp = vm.breakpoint("open_file")
        other = vm.breakpoint("open_file", lambda _: None, key="handled")
        events = vm.events(bp, queue=10)
        assert next(events).breakpoint == bp
        # Somebody else runs the guest to its end; of what comes now the queue takes ten.
        assert vm.run(timeout=60).reason == "idle"
        assert_well(Truth.read(vm))
        assert other.stats.py_calls == other.stats.hits == bp.stats.hits == 80_000
        taken = 1 + sum(1 for _ in events)
        assert taken + events.lost == 80_000
        assert events.lost >= 70_000


def test_a_handler_that_stands_still_keeps_its_vcpu_waiting_and_loses_nothing() -> None:
    go_on = threading.Event()
    with vmitap.attach("demo", vcpus=4, cmdline=f"{CALLS}500") as vm:
        first = vm.breakpoint("open_file", once=True, key="first")

        @first
        def _(_hit: vmitap.Hit) -> None:
            go_on.wait(timeout=30)

        bp = vm.breakpoint("open_file")
        threading.Timer(0.5, go_on.set).start()
        begin = time.monotonic()
        assert vm.run(timeout=60).reason == "idle"
        assert time.monotonic() - begin > 0.4
        assert (first.stats.hits, bp.stats.hits, Truth.read(vm).calls["open_file"]) == (1, 2000, 2000)


def test_thousands_of_reads_of_hidden_pages_a_second_from_four_vcpus_are_all_answered() -> None:
    with vmitap.attach("demo", vcpus=4, cmdline="mode=calls calls=1000 kinds=3") as vm:
        bp = vm.breakpoint("open_file")
        watch = vm.watch("text_start", 16, Access.R)
        result = vm.run(timeout=60)
        truth = Truth.read(vm)
        assert result.reason == "idle"
        assert_well(truth)
        assert bp.stats.hits == 1000
        assert vm.stats.hidden_reads > 10_000
        # In each check two kinds of read go over the range: 16 bytes, and two quadwords. At the end each vCPU may be in the middle
        # of one, and at boot there is one look at it.
        assert truth.checks == 40
        assert 40 * 18 < watch.stats.hits <= 44 * 18 + 1


@pytest.mark.parametrize("vcpus", [1, 3])
def test_a_storm_of_the_guests_own_breakpoints_with_prefixes_goes_to_the_guest(
    tmp_path: Path, build_guest: Callable[..., str], vcpus: int
) -> None:
    source = tmp_path / "storm.S"
    source.write_text(STORM)
    with vmitap.attach(build_guest(source), memory=8 << 20, vcpus=vcpus) as vm:
        # One of ours on its first byte, and one behind it on the same page.
        own, beside = vm.breakpoint("storm"), vm.breakpoint("tapped", where=Arg(0) == Arg(0))
        assert vm.run(timeout=60).reason == "idle"
        assert [vm.read_u64(name) for name in ("own", "guest_handled", "done")] == [60_000, 60_000, 1]
        assert (own.stats.hits, beside.stats.hits, vm.stats.reinjected) == (20_000, 20_000, 60_000)
