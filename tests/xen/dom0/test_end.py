"""However a session ends, the guest goes on as if nothing had been; and however the guest ends, the session says so."""

import gc
import os
import re
import signal
import struct
import threading
import time

import pytest

import vmitap
from demo_guest import KERNEL_WINDOW, assert_unseen, begin, finish, start_demo, symbols, truth
from domain import Domain, Start, attach, wait_for, xl

HAMMER = "mode=calls calls=3000 parts=1 callers=1"


def assert_ends_well(guest: Domain, calls: int) -> None:
    wait_for("the guest's verdict", lambda: "integrity:" in guest.console)
    assert ", 0 mismatches" in guest.console
    with attach(f"xen:{guest.domid}") as vm:
        assert truth(vm).calls["open_file"] == calls


def test_leaving_while_both_vcpus_hammer_a_tap_loses_nothing(start: Start) -> None:
    guest = start_demo(start, HAMMER)
    with attach("xen:demo") as vm:
        vm.breakpoint(symbols()["open_file"])
        begin(vm)
        assert vm.run(timeout=60, max_hits=50).reason == "max_hits"
    assert_ends_well(guest, 3000 * guest.vcpus)


def test_an_error_in_a_handler_ends_the_run_and_not_the_guest(start: Start) -> None:
    guest = start_demo(start, HAMMER)

    def fail(hit: vmitap.Hit) -> None:
        raise RuntimeError("a mistake")

    with attach("xen:demo") as vm:
        tap = vm.breakpoint(symbols()["open_file"], fail)
        begin(vm)
        with pytest.raises(vmitap.HandlerError) as error:
            vm.run(timeout=60)
        assert isinstance(error.value.__cause__, RuntimeError)
        tap.remove()
        vm.run(timeout=0.1)
    assert_ends_well(guest, 3000 * guest.vcpus)


def test_ctrl_c_ends_the_run_and_the_session_and_not_the_guest(start: Start) -> None:
    guest = start_demo(start, HAMMER)
    with attach("xen:demo") as vm:
        vm.breakpoint(symbols()["open_file"])
        begin(vm)
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            vm.run(timeout=60)
    assert_ends_well(guest, 3000 * guest.vcpus)


def test_a_second_session_finds_the_guest_as_the_first_did(start: Start) -> None:
    guest = start_demo(start, "mode=calls calls=100 parts=1")
    for _ in range(3):
        with attach("xen:demo") as vm:
            vm.breakpoint(symbols()["open_file"])
            vm.run(timeout=0.05)
    with attach("xen:demo") as vm:
        tap = vm.breakpoint(symbols()["open_file"])
        assert finish(vm).calls["open_file"] == tap.stats.hits == 100
    assert guest.alive


def test_a_session_that_is_collected_during_the_next_one_leaves_it_alone(start: Start) -> None:
    turn, turns = 12, 20
    guest = start_demo(start, f"mode=calls calls={turn * turns} paced={turn} parts=1 callers=1")
    first = attach("xen:demo")
    first.detach()
    with attach("xen:demo") as vm:
        vm.breakpoint(symbols()["open_file"])
        # Each count of the guest's, and each tick, is a step.
        vm.watch(symbols()["truth"] + 0xF00, 8, vmitap.Access.W)
        begin(vm)
        assert vm.run(timeout=60, max_hits=3).reason == "max_hits"
        del first
        gc.collect()
        assert vm.run(timeout=60, max_hits=turn * guest.vcpus - 3).reason == "max_hits"
        # Both sleep until a tick finds that there is more to do.
        vm.run(timeout=0.2)
        begin(vm, turns)
    assert_ends_well(guest, turn * turns * guest.vcpus)


def test_somebody_else_cannot_attach_meanwhile(start: Start) -> None:
    start_demo(start, "mode=calls calls=1 parts=1")
    with attach("xen:demo"), pytest.raises(vmitap.AttachError, match="alive"):
        attach("xen:demo")


def test_a_guest_that_is_destroyed_during_a_run_is_an_error_that_says_so(start: Start) -> None:
    guest = start_demo(start, "mode=calls calls=100000 parts=1 callers=1 check=0")
    with attach("xen:demo") as vm:
        vm.breakpoint(symbols()["open_file"])
        begin(vm)
        timer = threading.Timer(0.3, guest.destroy)
        timer.start()
        with pytest.raises(vmitap.DomainGoneError):
            vm.run(timeout=60)
        timer.join()
    assert not guest.alive


def test_a_guest_that_crashes_during_a_run_ends_it_at_once(start: Start) -> None:
    start_demo(start, "mode=calls calls=100000 parts=1 callers=1 check=0 paced=20")
    with attach("xen:demo") as vm:
        tap = vm.breakpoint(symbols()["open_file"])
        begin(vm)
        assert vm.run(timeout=60, max_hits=20).reason == "max_hits"
        # The next interrupt finds no gate, nor do the faults it causes: a triple fault.
        vm.write_pa(symbols()["idt"] - KERNEL_WINDOW, bytes(4096))
        begun = time.monotonic()
        assert vm.run(timeout=60).reason == "idle"
        assert time.monotonic() - begun < 30
        assert tap.stats.hits >= 20
    assert re.search(r"demo +\d+ +\d+ +\d+ +--.s", xl("list"))
    with attach("xen:demo") as vm:
        assert vm.read_pa(0, 1)


def test_a_guest_that_is_renamed_during_a_run_stays_tapped(start: Start) -> None:
    start_demo(start, "mode=calls calls=200 parts=1")
    with attach("xen:demo") as vm:
        tap = vm.breakpoint(symbols()["open_file"])
        begin(vm)
        assert vm.run(timeout=60, max_hits=50).reason == "max_hits"
        xl("rename", "demo", "other")
        seen = finish(vm)
        assert tap.stats.hits == seen.calls["open_file"] == 200
    assert_unseen(seen)
    with attach("xen:other") as vm:
        assert truth(vm).finished
    with pytest.raises(vmitap.AttachError):
        attach("xen:demo")


def test_a_guest_that_gives_a_tapped_page_back_comes_to_its_end_and_nothing_is_left(start: Start) -> None:
    """The breakpoint on that page is lost with it (docs/xen.md); those on other pages are as they were."""
    guest = start_demo(start, "mode=probes probes=8 give=1")
    with attach("xen:demo") as vm:
        before = vm.breakpoint(symbols()["probe_cpuid"])
        given = vm.breakpoint(symbols()["probe_page"])
        seen = finish(vm)
        (taken,) = struct.unpack("<q", vm.read_pa(symbols()["probe_results"] - KERNEL_WINDOW + 104, 8))
        assert taken == 1
        assert before.stats.hits == 8
        # Xen tells nobody: it looks as before, and is never hit again.
        assert (given.state, given.stats.hits) == ("active", 0)
        given.remove()
        before.remove()
        assert vm.stats.shadow_frames == 0
    assert_unseen(seen)
    with attach(f"xen:{guest.domid}") as vm:
        assert len(list(vm.views)) == 2
        assert truth(vm).finished
