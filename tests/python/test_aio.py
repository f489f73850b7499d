"""Sessions in an asyncio loop: hits, handlers, cancellation, several guests, and no warnings in development mode."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import Arg, Cstr, Filter, Verdict, aio

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from vmitap import Hit

ENDLESS = "mode=calls calls=1000000000000 check=0"


def run(main: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


def test_hits_arrive_in_order_and_the_loop_goes_on_meanwhile() -> None:
    async def main() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticker = asyncio.create_task(tick())
        async with aio.attach("demo") as guest:
            bp = guest.breakpoint("open_file", where=Cstr(Arg(0)).startswith("/etc/"))
            seen = []
            async with aclosing(guest.events(bp, timeout=20)) as events:
                async for hit in events:
                    seen.append(hit.timestamp)
                    if len(seen) == 5:
                        break
                with pytest.raises(vmitap.SessionBusyError):
                    await guest.run()
            assert seen == sorted(seen)
            await guest.run(timeout=0.2)
        ticker.cancel()
        assert ticks > 10

    run(main())


def test_events_end_with_the_guest_and_say_why() -> None:
    async def main() -> None:
        async with aio.attach("demo", cmdline="rounds=3") as guest:
            bp = guest.breakpoint("check_licence")
            events = guest.events(bp)
            hits = [hit async for hit in events]
            assert (len(hits), events.lost) == (3, 0)
            assert events.result is not None
            assert events.result.reason == "idle"

    run(main())


def test_what_finds_no_room_is_counted() -> None:
    async def main() -> None:
        async with aio.attach("demo", cmdline="mode=calls calls=5000 check=0") as guest:
            bp = guest.breakpoint("open_file")
            events = guest.events(bp, queue=10)
            first = await anext(events)
            while events.result is None:
                await asyncio.sleep(0.01)
            rest = [hit async for hit in events]
            assert first.symbol == "open_file"
            assert len(rest) <= 10
            assert 1 + len(rest) + events.lost == 5000

    run(main())


def test_a_coroutine_is_a_handler_and_its_verdict_counts() -> None:
    async def main() -> None:
        loop = threading.get_ident()
        threads: list[int] = []

        async def check(hit: Hit) -> Verdict:
            await asyncio.sleep(0.001)
            threads.append(threading.get_ident())
            assert hit.vm.read_cstr(hit.args[0]).startswith("AAAA")
            return Verdict.return_from_function(1)

        def opened(hit: Hit) -> None:
            threads.append(threading.get_ident())

        async with aio.attach("demo", cmdline="rounds=2") as guest:
            guest.breakpoint("check_licence", check)
            await guest.run(timeout=30)
            assert threads == [loop, loop]
            guest.breakpoint("open_file", opened)
        async with aio.attach("demo", cmdline="rounds=2") as guest:
            guest.breakpoint("open_file", opened)
            await guest.run(timeout=30)
            assert set(threads[2:]).isdisjoint({loop})

    run(main())


def test_an_error_in_a_coroutine_is_a_handler_error() -> None:
    async def main() -> None:
        async def fails(hit: Hit) -> None:
            msg = "no"
            raise ValueError(msg)

        async with aio.attach("demo") as guest:
            guest.breakpoint("open_file", fails)
            with pytest.raises(vmitap.HandlerError, match="no"):
                await guest.run(timeout=20)
            events = guest.events(timeout=20)
            with pytest.raises(vmitap.HandlerError, match="no"):
                async for _ in events:
                    pass

    run(main())


def test_cancelling_stops_the_guest_and_the_session_goes_on() -> None:
    async def main() -> None:
        async with aio.attach("demo", cmdline=ENDLESS) as guest:
            bp = guest.breakpoint("open_file")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(guest.run(), 0.2)
            hits = bp.stats.hits
            await asyncio.sleep(0.1)
            assert bp.stats.hits == hits > 0
            assert (await guest.run(max_hits=5)).reason == "max_hits"
            events = guest.events(bp)
            await anext(events)
            await events.aclose()
            await events.aclose()
            assert (await guest.run(max_hits=5)).hits == 5

    run(main())


def test_leaving_while_it_runs_restores_the_guest() -> None:
    async def main() -> None:
        async with aio.attach("demo", cmdline=ENDLESS) as guest:
            guest.breakpoint("open_file")
            running = asyncio.create_task(guest.run())
            await asyncio.sleep(0.1)
            with pytest.raises(vmitap.SessionBusyError):
                await guest.run()
            await guest.detach()
            assert (await running).reason == "stopped"
            vm = guest.vm
        assert vm.closed

    run(main())


def test_a_task_that_is_cancelled_on_its_way_out_restores_the_guest_first() -> None:
    async def main() -> None:
        opened: list[vmitap.Vm] = []

        async def work() -> None:
            async with aio.attach("demo", cmdline=ENDLESS) as guest:
                opened.append(guest.vm)
                guest.breakpoint("open_file", where=Filter.rate(10))
                await guest.run()

        task = asyncio.create_task(work())
        while not opened:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert opened[0].closed

    run(main())


def test_several_guests_run_in_one_loop() -> None:
    async def main() -> None:
        async def work(rounds: int) -> int:
            async with aio.attach("demo", cmdline=f"rounds={rounds}") as guest:
                bp = guest.breakpoint("check_licence")
                return len([hit async for hit in guest.events(bp)])

        assert await asyncio.gather(*(work(rounds) for rounds in (2, 3, 4))) == [2, 3, 4]

    run(main())


def test_wrong_use_is_a_typed_error() -> None:
    async def main() -> None:
        guest = aio.attach("demo")
        with pytest.raises(vmitap.InvalidArgumentError, match="async with"):
            _ = guest.vm
        async with guest:
            with pytest.raises(vmitap.InvalidArgumentError, match="opened before"):
                await guest.__aenter__()
            with pytest.raises(vmitap.InvalidArgumentError, match="queue"):
                guest.events(queue=0)
        with pytest.raises(vmitap.AttachError):
            async with aio.attach("nothing:at-all"):
                pass

    run(main())


def test_nothing_is_warned_of_in_development_mode() -> None:
    program = """
    import asyncio, vmitap, vmitap.aio
    async def main():
        async def handler(hit):
            await asyncio.sleep(0)
        async with vmitap.aio.attach("demo", cmdline="mode=calls calls=100000000 check=0") as guest:
            bp = guest.breakpoint("open_file", handler)
            events = guest.events(bp)
            async for hit in events:
                break
            await events.aclose()
            try:
                await asyncio.wait_for(guest.run(), 0.2)
            except TimeoutError:
                pass
    asyncio.run(main())
    """
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
