"""A call of Xen's libraries fails: the error is typed, the guest runs on, nothing is left in it, and asked again it is done.

The stand-in has every call with every number (tests/rust/xen/faults.rs); here it is real Xen that is called before and after.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, TypeVar

import pytest

import vmitap
from demo_guest import begin, start_demo, symbols
from domain import Start, attach, wait_for
from faults import FAIL, NOTHING, arm, between, state
from outside import Outside

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

TURN = 12
# Numbers with a meaning (no domain, no listener, nothing there, already so, busy, out of memory) and without.
ERRORS = (1, 3, 11, 12, 14, 16, 19, 22, 28, 95)


class Tries:
    """Does everything twice if it fails the first time."""

    def __init__(self) -> None:
        self.failed: list[vmitap.VmitapError] = []

    def __call__(self, what: Callable[[], T]) -> T:
        try:
            return what()
        except vmitap.VmitapError as error:
            self.failed.append(error)
            return what()


def memory() -> int:
    """Bytes that the domain has."""
    return next(domain.memory_size for domain in vmitap.xen_host().domains if domain.name == "demo")


def session(turn: int) -> list[vmitap.VmitapError]:
    """What failed."""
    do = Tries()
    vm = do(lambda: attach("xen:demo"))
    first = do(lambda: vm.breakpoint(symbols()["open_file"]))
    second = do(lambda: vm.breakpoint(symbols()["read_file"]))
    watch = do(lambda: vm.watch(symbols()["truth"] + 0xF00, 8, vmitap.Access.W))
    other = do(vm.views.create)
    do(lambda: vm.breakpoint(symbols()["open_file"], view=other))
    do(lambda: begin(vm, turn))
    do(lambda: vm.run(timeout=5, max_hits=3))
    registers = do(lambda: vm.registers(0))
    do(lambda: vm.translate(symbols()["open_file"], root=registers.cr3))
    pause = vm.pause()
    do(pause.__enter__)
    do(second.remove)
    do(lambda: pause.__exit__(None, None, None))
    do(watch.remove)
    do(lambda: vm.views.switch_to(other))
    do(lambda: vm.run(timeout=5, max_hits=2))
    do(first.remove)
    do(vm.detach)
    return do.failed


def is_typed(error: vmitap.VmitapError, number: int) -> bool:
    match error:
        case vmitap.UndoFailedError():
            return os.strerror(number) in str(error)
        case vmitap.DriverError():
            return error.errno == number
        case vmitap.DomainGoneError():
            return number == 3
        case vmitap.AttachError():
            return bool(error.reason and error.hint)
        case vmitap.TranslationError() | vmitap.OutOfRangeError():
            return number in (3, 22)
        case _:
            return False


@pytest.mark.parametrize(
    "every", [pytest.param(11, marks=pytest.mark.seconds(3)), pytest.param(1, marks=[pytest.mark.long, pytest.mark.seconds(30)])]
)
def test_a_call_that_fails_is_told_and_the_next_try_does_it(start: Start, capsys: pytest.CaptureFixture[str], every: int) -> None:
    most = 400
    guest = start_demo(start, f"mode=calls calls={TURN * most} paced={TURN} parts=1 callers=1")
    turn = 1
    told, silent = 0, Counter[str]()
    outside = Outside(guest)

    def is_over() -> bool:
        return outside.truth().calls["open_file"] == TURN * turn * guest.vcpus

    with between():
        arm(NOTHING, 0)
        assert not session(turn)
        calls = state().calls
        # Not before: the first listener takes the ring's page out of a domain for good (xc_monitor_enable).
        before = memory()
        arm(NOTHING, 0)
        wait_for("the guest's first turn", is_over)
        for at in range(1, min(calls, most - 2), every):
            turn += 1
            number = ERRORS[at // every % len(ERRORS)]
            arm(FAIL, at, number)
            failed = session(turn)
            name = state().failed.decode()
            what = f"call {at}, {name}, failed with {os.strerror(number)}: {failed!r}"
            arm(NOTHING, 0)
            assert len(failed) <= 1, what
            assert all(is_typed(error, number) for error in failed), what
            assert memory() == before, what
            told += len(failed)
            # There may be fewer calls than before: then none has failed.
            if name and not failed:
                silent[name] += 1
            outside.begin(turn)
            wait_for(f"the guest's turn {turn}, after {what}", is_over)
    with capsys.disabled():
        print(f"\n{told + silent.total()} of {calls} calls failed, {told} of them were told")
        print(f"done otherwise, or not needed: {dict(silent)}\n")
    assert told > silent.total()
    outside.begin(most)
    wait_for("the guest's verdict", lambda: "integrity:" in guest.console, limit=60)
    assert ", 0 mismatches" in guest.console
