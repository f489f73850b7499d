"""Ctrl-C ends every wait for a guest, in time, and leaves the session as it was."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

import pytest

from vmitap import aio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from vmitap import Vm


def for_ever(vm: Vm) -> None:
    """Has the guest jump to itself: nothing ends a wait for its hits."""
    vm.write(vm.registers().rip, b"\xeb\xfe")


@contextmanager
def noticed() -> Iterator[Callable[[], None]]:
    """What is waited for inside ends by Ctrl-C, soon after it; the function that is given has it pressed in a moment."""
    pressed: list[float] = []

    def press() -> None:
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.2, press)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield timer.start
        assert time.monotonic() - pressed[0] < 0.3
    finally:
        timer.cancel()
        timer.join()


WAITS: list[Callable[[Vm], object]] = [
    lambda vm: vm.run(),
    lambda vm: vm.run(timeout=30, max_hits=5),
    lambda vm: next(vm.events()),
    lambda vm: list(vm.events(timeout=30)),
    lambda vm: vm.wait_event(),
    lambda vm: vm.wait_event(timeout=30),
]


@pytest.mark.parametrize("wait", WAITS, ids=["run", "run with limits", "next", "events", "wait_event", "wait_event with a limit"])
def test_ctrl_c_ends_every_wait_and_the_guest_is_usable(vm: Vm, wait: Callable[[Vm], object]) -> None:
    for_ever(vm)
    vm.breakpoint("open_file")
    with noticed() as press:
        press()
        wait(vm)
    assert vm.run(timeout=0).reason == "timeout"
    # And once more: what was pressed before is forgotten.
    with noticed() as press:
        press()
        wait(vm)
    spun = vm.breakpoint(vm.registers().rip)
    assert vm.run(timeout=20, max_hits=3).hits == spun.stats.hits == 3


async def pulled(guest: aio.AsyncVm) -> None:
    async with aclosing(guest.events()) as events:
        await anext(events)


async def left_open(guest: aio.AsyncVm) -> None:
    await anext(guest.events())


async def beside_others(guest: aio.AsyncVm) -> None:
    await asyncio.gather(guest.run(), asyncio.sleep(30))


ASYNC_WAITS: list[Callable[[aio.AsyncVm], Awaitable[object]]] = [lambda guest: guest.run(), pulled, left_open, beside_others]


@pytest.mark.parametrize("wait", ASYNC_WAITS, ids=["run", "events", "events left open", "run beside others"])
def test_ctrl_c_ends_a_loop_that_waits_and_restores_the_guest(wait: Callable[[aio.AsyncVm], Awaitable[object]]) -> None:
    opened: list[Vm] = []
    ends: list[str] = []

    async def main(press: Callable[[], None]) -> None:
        async with aio.attach("demo") as guest:
            opened.append(guest.vm)
            for_ever(guest.vm)
            guest.breakpoint("open_file")
            press()
            try:
                await wait(guest)
            except asyncio.CancelledError:
                # The guest can be used before it is left, if nothing else has it.
                if wait not in {left_open, beside_others}:
                    ends.append((await guest.run(timeout=0)).reason)
                ends.append("cancelled")
                raise

    with noticed() as press:
        asyncio.run(main(press))
    assert ends[-1:] == ["cancelled"]
    assert ends[:-1] == ([] if wait in {left_open, beside_others} else ["timeout"])
    assert opened[0].closed
    # A thread that was told to end takes a moment.
    end = time.monotonic() + 5
    while threading.active_count() > 1:
        assert time.monotonic() < end, threading.enumerate()
        time.sleep(0.01)
