"""Xen domains in an asyncio loop, on the stand-in for Xen's libraries (stand_in.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stand_in import UNTOUCHED, run

if TYPE_CHECKING:
    from pathlib import Path


def test_an_asyncio_loop_waits_for_the_event_channel_and_needs_no_thread(library: Path) -> None:
    done = run(
        library,
        """
import asyncio, threading, vmitap.aio
from vmitap import SessionBusyError
async def main():
    asyncio.get_running_loop().slow_callback_duration = 60
    async with vmitap.aio.attach("xen:guest") as guest:
        vm = guest.vm
        assert vm.fileno() >= 0 and vm.fileno() == vm.fileno()
        threads = set()
        bp = guest.breakpoint(0x8000, lambda hit: threads.add(threading.current_thread().name))
        ticks = 0
        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)
        ticking = asyncio.create_task(tick())
        fake.fake_automatic(50)
        result = await guest.run(timeout=60, max_hits=50)
        assert (result.reason, result.hits, result.py_calls) == ("max_hits", 50, 50), result
        assert threads == {"MainThread"}, threads
        # Nothing to be done: it waits, others go on, and it ends in time.
        fake.fake_automatic(0)
        before = ticks
        result = await guest.run(timeout=0.3)
        assert result.reason == "timeout" and 0.25 < result.elapsed < 2, result
        assert ticks > before + 20, (before, ticks)
        # Hits one by one; the first iteration ends early.
        fake.fake_automatic(50)
        hits = []
        events = guest.events(bp, timeout=60)
        async for hit in events:
            hits.append((hit.vcpu, hit.regs.rip))
            if len(hits) == 20:
                break
        with_busy = asyncio.create_task(guest.run(timeout=60))
        try:
            await with_busy
        except SessionBusyError:
            print("busy")
        await events.aclose()
        assert {rip for _, rip in hits} == {0x8000}
        # Cancelled while it waits: no event is left unanswered.
        waiting = asyncio.create_task(guest.run())
        await asyncio.sleep(0.05)
        waiting.cancel()
        try:
            await waiting
        except asyncio.CancelledError:
            print("cancelled", state("held"))
        # stop() from anywhere wakes it, through the descriptor.
        fake.fake_automatic(0)
        looks, vmitap.aio._LOOK = vmitap.aio._LOOK, 60
        waiting = asyncio.create_task(guest.run())
        await asyncio.sleep(0.05)
        vm.stop()
        print((await asyncio.wait_for(waiting, 20)).reason)
        vmitap.aio._LOOK = looks
        # What a handler raises comes out, with the event answered.
        def fails(hit):
            raise ValueError("no")
        guest.breakpoint(0x8000, fails, key="fails")
        fake.fake_automatic(50)
        try:
            await guest.run(timeout=60)
        except vmitap.HandlerError as error:
            print(error.error, state("held"))
        ticking.cancel()
        assert threading.active_count() == 1, threading.enumerate()
asyncio.run(main())
"""
        + UNTOUCHED,
        options=("-X", "dev"),
    )
    assert done.stdout.splitlines() == ["busy", "cancelled 0", "stopped", "no 0", "untouched"], (done.stdout, done.stderr)
    assert done.stderr == ""


def test_leaving_a_loops_session_ends_what_still_runs_in_it(library: Path) -> None:
    done = run(
        library,
        """
import asyncio, vmitap.aio
async def main():
    asyncio.get_running_loop().slow_callback_duration = 60
    for use in (lambda guest: guest.run(), lambda guest: anext(guest.events())):
        async with vmitap.aio.attach("xen:guest") as guest:
            guest.breakpoint(0x8000)
            running = asyncio.ensure_future(use(guest))
            await asyncio.sleep(0.1)
        try:
            print((await asyncio.wait_for(running, 20)).reason)
        except StopAsyncIteration:
            print("no more")
asyncio.run(main())
"""
        + UNTOUCHED,
        options=("-X", "dev"),
    )
    assert done.stdout.splitlines() == ["stopped", "no more", "untouched"], (done.stdout, done.stderr)
    assert done.stderr == ""


@pytest.mark.parametrize("way", ["gone", "dying"])
@pytest.mark.parametrize("use", ["guest.run()", "anext(guest.events())"])
def test_a_domain_that_goes_away_is_noticed_by_a_loop_that_waits_for_it(library: Path, way: str, use: str) -> None:
    done = run(
        library,
        f"""
import asyncio, time, vmitap.aio
async def main():
    asyncio.get_running_loop().slow_callback_duration = 60
    async with vmitap.aio.attach("xen:guest") as guest:
        guest.breakpoint(0x8000)
        waiting = asyncio.ensure_future({use})
        await asyncio.sleep(0.2)
        assert not waiting.done()
        fake.fake_knob({way!r}.encode())[0] = 1
        before = time.monotonic()
        try:
            await asyncio.wait_for(waiting, 20)
        except vmitap.DomainGoneError:
            print("gone", time.monotonic() - before)
asyncio.run(main())
""",
        options=("-X", "dev"),
    )
    word, seconds = done.stdout.split()
    assert (word, float(seconds) < 1) == ("gone", True), (done.stdout, done.stderr)
    assert all(line.startswith("the guest is gone: ") for line in done.stderr.splitlines()), done.stderr


def test_what_an_asyncio_loop_has_no_room_for_is_counted_everywhere_and_said_once(library: Path) -> None:
    done = run(
        library,
        """
import asyncio, logging, vmitap.aio
logging.basicConfig(format="%(message)s")
async def main():
    async with vmitap.aio.attach("xen:guest") as guest:
        bp = guest.breakpoint(0x8000)
        fake.fake_automatic(50)
        events = guest.events(bp, timeout=2, queue=10)
        first = await anext(events)
        while events.result is None:
            await asyncio.sleep(0.01)
        rest = [hit async for hit in events]
        assert len(rest) == 10, len(rest)
        assert 11 + events.lost == bp.stats.hits > 20, (events.lost, bp.stats.hits)
        print(events.result.lost == events.lost == guest.vm.stats.lost)
asyncio.run(main())
"""
        + UNTOUCHED,
    )
    assert done.stdout.splitlines() == ["True", "untouched"], (done.stdout, done.stderr)
    assert done.stderr.count("10 hits wait in a queue") == 1, done.stderr
