"""However a session ends, the guest goes on as if nothing had been; and however the guest ends, the session says so."""

import os
import signal
import threading

import pytest

import vmitap
from demo_guest import begin, finish, start_demo, symbols, truth
from domain import Domain, Start, attach, wait_for

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
