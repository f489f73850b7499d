"""Sessions in an asyncio loop: hits, handlers, cancellation, several guests, and no warnings in development mode."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import textwrap
import threading
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import Arg, Cstr, Filter, OnWrite, Reg, Verdict, aio

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

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


def test_what_finds_no_room_is_counted(caplog: pytest.LogCaptureFixture) -> None:
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
            assert events.result.lost == events.lost == guest.vm.stats.lost > 4000

    run(main())
    assert caplog.text.count("10 hits wait in a queue") == 1


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


@pytest.mark.parametrize("end", ["cancelled", "detached"])
def test_a_coroutine_that_is_awaited_is_cancelled_with_its_run(end: str) -> None:
    async def main() -> None:
        begun: list[Hit] = []

        async def endless(hit: Hit) -> None:
            begun.append(hit)
            await asyncio.sleep(1000)

        async with aio.attach("demo", cmdline=ENDLESS) as guest:
            guest.breakpoint("open_file", endless, key=1)
            # At the same event.
            guest.breakpoint("open_file", endless, key=2)
            running = asyncio.create_task(guest.run())
            while not begun:
                await asyncio.sleep(0.01)
            if end == "cancelled":
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running
            else:
                await guest.detach()
                assert (await running).reason == "stopped"
            assert len(begun) == 1

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


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (aio.attach, vmitap.attach),
        (aio.AsyncVm.breakpoint, vmitap.Vm.breakpoint),
        (aio.AsyncVm.run, vmitap.Vm.run),
        (aio.AsyncVm.events, vmitap.Vm.events),
    ],
)
def test_what_is_here_takes_what_its_original_takes(ours: Callable[..., object], theirs: Callable[..., object]) -> None:
    def parameters(function: Callable[..., object]) -> list[tuple[str, str, object]]:
        # Which parameter is `self` is told differently of compiled functions.
        given = inspect.signature(function).parameters.values()
        return [(each.name, each.kind.name, each.default) for each in given if each.name != "self"]

    assert parameters(ours) == parameters(theirs)


def test_a_breakpoint_here_has_all_that_one_has_elsewhere() -> None:
    async def main() -> None:
        asked: list[int] = []

        async def ask(hit: Hit) -> OnWrite:
            await asyncio.sleep(0)
            asked.append(hit.vm.read_u8(hit.address))
            return OnWrite.DENY

        async with aio.attach("demo") as guest:
            spot, target = guest.vm.registers().rip, guest.vm.symbol("boot_copy")
            # MOV BYTE PTR [RBX], 1; MOV BYTE PTR [RBX + 8], 2; MOV BYTE PTR [RBX + 16], 3; NOP; JMP to the NOP
            guest.vm.write(spot, bytes.fromhex("c60301 c6430802 c6431003 90 ebfd"))
            guest.vm.write(target, bytes(24))
            guest.vm.set_registers(0, rbx=target, rcx=1234)
            guest.breakpoint(target, on_write=OnWrite.ASK, ask=ask)
            guest.breakpoint(target + 8, on_write=OnWrite.DENY | Filter.ring(0))
            guest.breakpoint(target + 16, on_write=OnWrite.REMOVE & Filter.ring(3))
            once = guest.breakpoint(spot + 11, once=True)
            ms = guest.breakpoint(spot + 11, abi="ms", where=(Arg(0) == 1234) & (Reg.rcx == 1234) & Filter.once())
            # To the end, and round a second time.
            guest.breakpoint(spot + 12, lambda hit: Verdict.pause(), where=~Filter.once())
            assert (await guest.run(timeout=20)).reason == "paused"
            assert asked == [0]
            assert [guest.vm.read_u8(target + place) for place in (0, 8, 16)] == [0, 2, 0]
            assert (once.state, once.stats.hits, ms.state, ms.stats.hits) == ("removed", 1, "active", 1)
            assert ms.stats.filtered > 0

    run(main())


def test_a_guest_without_a_descriptor_has_a_thread_for_as_long_as_it_is_open() -> None:
    async def are_gone() -> None:
        # One that was told to end takes a moment; it may be that of another test.
        while any(thread.name.startswith("vmitap") for thread in threading.enumerate()):
            await asyncio.sleep(0.01)

    async def main() -> None:
        await are_gone()
        alone = threading.active_count()
        seen: list[int] = []
        for guests in (1, 3):
            async with AsyncExitStack() as stack:
                opened = [await stack.enter_async_context(aio.attach("demo", cmdline=ENDLESS)) for _ in range(guests)]
                for guest in opened:
                    guest.breakpoint("open_file", lambda hit: seen.append(threading.active_count()), where=Filter.every(1000))
                running = [asyncio.create_task(guest.run()) for guest in opened]
                while len(seen) < 10 * guests:
                    await asyncio.sleep(0.01)
                assert threading.active_count() == alone + guests
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
            await are_gone()
            assert threading.active_count() == alone
            assert max(seen) == alone + guests
            seen.clear()

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
