"""Coroutines as handlers of Xen domains, and sessions that are stopped while one is awaited, on the stand-in for Xen's libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stand_in import IN_LOOP, UNTOUCHED, in_loop, run

if TYPE_CHECKING:
    from pathlib import Path


def test_a_coroutine_as_a_handler_of_a_domain_needs_no_thread_and_others_go_on_meanwhile(library: Path) -> None:
    in_loop(
        library,
        """
async def main(guest):
    seen, kept = [], []
    ticks = 0
    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)
    async def look(hit):
        before, events = ticks, guest.vm.stats.events
        await asyncio.sleep(0.01)
        # The event is not answered, and nothing else of the guest is looked at meanwhile.
        assert state("held", hit.vcpu) > 0 and guest.vm.stats.events == events
        seen.append((hit.vm.read_u8(hit.address), ticks > before + 3))
        kept.append(hit.vm)
        try:
            guest.vm.run(timeout=0)
        except SessionBusyError:
            return
        raise AssertionError
    guest.breakpoint(0x8000, look)
    ticking = asyncio.create_task(tick())
    result = await guest.run(timeout=60, max_hits=10)
    ticking.cancel()
    print(result.reason, result.hits, result.py_calls, set(seen), threading.active_count())
    assert 0.009 < result.hold_p50 < 1, result.hold_p50
    try:
        kept[-1].read_u8(0x8000)
    except StaleContextError:
        print("stale")
    # Between two hits: an iteration, and an end in time.
    async for hit in guest.events(timeout=60):
        seen.append(hit)
        break
    print(len(seen))
in_loop(main)
""",
        ["max_hits 10 10 {(85, True)} 1", "stale", "11"],
    )


def test_every_coroutine_of_one_event_is_awaited_and_the_first_verdict_counts(library: Path) -> None:
    program = """
async def main(guest):
    told = []
    def teller(name, verdict=None):
        async def tell(hit):
            await asyncio.sleep(0)
            told.append((name, hit.vcpu))
            return verdict
        return tell
    guest.breakpoint(0x8000, teller("first"), key=1)
    guest.breakpoint(0x8000, lambda hit: told.append(("function", hit.vcpu)), key=2)
    guest.breakpoint(0x8000, teller("pauses", Verdict.pause()), key=3)
    guest.breakpoint(0x8000, teller("last", Verdict.detach()), key=4)
    for _ in range(2):
        print((await guest.run(timeout=60)).reason, told)
in_loop(main)
"""
    awaited = run(library, IN_LOOP + program + UNTOUCHED, options=("-X", "dev"))
    called = run(library, IN_LOOP + program.replace("async def tell", "def tell").replace("await asyncio.sleep(0)", "") + UNTOUCHED)
    assert awaited.stderr == ""
    assert awaited.stdout == called.stdout
    first, second, _ = awaited.stdout.splitlines()
    assert first == f"paused {[(name, 0) for name in ('first', 'function', 'pauses')]}"
    assert second.startswith(f"detached {first[7:-1]}, ('last', 0)"), second


@pytest.mark.parametrize("use", ["await guest.run(timeout=60)", "async for _ in guest.events(timeout=60): pass"])
def test_what_a_coroutine_raises_comes_out_and_its_event_is_answered(library: Path, use: str) -> None:
    expected = ["ValueError 0", "CancelledError 0", "DeadlineExceededError True 0", "TypeError 0"]
    in_loop(
        library,
        f"""
def failer(error):
    async def fail(hit):
        await asyncio.sleep(0)
        raise error
    return fail
async def late(hit):
    await asyncio.sleep(0.05)
async def says_nonsense(hit):
    return 5
HANDLERS = [(failer(ValueError("no")), None), (failer(asyncio.CancelledError()), None), (late, 0.01), (says_nonsense, None)]
async def main(guest):
    for handler, deadline in HANDLERS:
        bp = guest.breakpoint(0x8000, handler, deadline=deadline)
        try:
            {use}
        except HandlerError as error:
            print(type(error.error).__name__, state("held"))
        except DeadlineExceededError as error:
            print(type(error).__name__, error.elapsed >= 0.05, state("held"))
        bp.remove()
in_loop(main)
""",
        expected,
    )


def test_a_write_is_asked_about_by_a_coroutine(library: Path) -> None:
    done = run(
        library,
        IN_LOOP
        + """
async def main(guest):
    # MOV [RBX], AL is 88 03: the byte at 0x8000 is written with what is in AL.
    write(0x8000, bytes.fromhex("555d8803ebfa"))
    asked = []
    async def ask(hit):
        await asyncio.sleep(0)
        asked.append((hit.vm.read_u8(hit.address), str(hit.access)))
        if len(asked) == 5:
            guest.vm.stop()
        return OnWrite.REAPPLY
    for vcpu in range(2):
        fake.fake_regs(vcpu)[RAX] = 0x55
    bp = guest.breakpoint(0x8000, on_write=OnWrite.ASK, ask=ask)
    print((await guest.run(timeout=60)).reason, set(asked), bp.state)
in_loop(main)
write(0x8000, CODE)
"""
        + UNTOUCHED,
        options=("-X", "dev"),
    )
    first, last = done.stdout.splitlines()
    assert (first[:14], first[-7:]) == ("stopped {(85, ", " active"), (done.stdout, done.stderr)
    assert last == "untouched"
    assert done.stderr == ""


@pytest.mark.parametrize(
    "use", ["await guest.run()", "async with aclosing(guest.events()) as events:\n            async for _ in events: pass"]
)
@pytest.mark.parametrize("end", ["cancelled", "detached", "left"])
def test_a_coroutine_that_is_awaited_is_cancelled_with_its_run(library: Path, use: str, end: str) -> None:
    expected = "left" if end == "left" else f"1 {end == 'cancelled'} True 0"
    in_loop(
        library,
        f"""
from contextlib import aclosing
async def main(guest):
    begun, ended = asyncio.Event(), []
    async def endless(hit):
        begun.set()
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(state("held", hit.vcpu))
    # The second is called at the same event.
    guest.breakpoint(0x8000, endless, key=1)
    guest.breakpoint(0x8000, endless, key=2)
    async def waits():
        {use}
    waiting = asyncio.create_task(waits())
    await asyncio.wait_for(begun.wait(), 60)
    if {end!r} == "left":
        return print("left")
    if {end!r} == "cancelled":
        waiting.cancel()
    else:
        await asyncio.wait_for(guest.detach(), 60)
    done, _ = await asyncio.wait([waiting], timeout=60)
    print(len(done), waiting.cancelled(), ended[0] > 0, state("held"))
in_loop(main)
""",
        [expected],
    )


def test_a_coroutine_that_ends_its_own_session_says_so_with_a_verdict(library: Path) -> None:
    expected = ["detach cannot be used while the session is running", "detached True"]
    in_loop(
        library,
        """
async def main(guest):
    async def detaches(hit):
        try:
            await guest.detach()
        except SessionBusyError as error:
            print(error)
        return Verdict.detach()
    guest.breakpoint(0x8000, detaches)
    print((await guest.run(timeout=60)).reason, guest.vm.closed)
in_loop(main)
""",
        expected,
    )


def test_a_domain_and_a_guest_with_a_thread_share_a_loop(library: Path) -> None:
    in_loop(
        library,
        """
async def main(guest):
    async with vmitap.aio.attach("demo") as demo:
        seen = []
        async def look(hit):
            await asyncio.sleep(0)
            seen.append(hit.vm.read_u8(hit.address))
        guest.breakpoint(0x8000, look)
        demo.breakpoint("open_file", look)
        results = await asyncio.gather(guest.run(timeout=60, max_hits=10), demo.run(timeout=60, max_hits=10))
        print([result.hits for result in results], len(seen), 0x55 in seen)
in_loop(main)
""",
        ["[10, 10] 20 True"],
    )


def test_a_handler_whose_guest_is_stopped_before_its_first_step_does_not_hold_it_up(library: Path) -> None:
    in_loop(
        library,
        """
async def main(guest):
    begun = []
    async def endless(hit):
        begun.append(hit)
        await asyncio.sleep(1000)
    # It comes before the first step of the next owner's coroutine.
    guest.breakpoint(0x8000, lambda hit: print(running.cancel()), key=1)
    guest.breakpoint(0x8000, endless, key=2)
    running = asyncio.create_task(guest.run())
    await asyncio.wait([running], timeout=60)
    print(running.cancelled(), len(begun) < 2, state("held"))
in_loop(main)
""",
        ["True", "True True 0"],
    )


@pytest.mark.parametrize("target", ["guest", "demo"])
def test_a_handler_may_return_whatever_can_be_awaited(library: Path, target: str) -> None:
    in_loop(
        library,
        f"""
class Soon:
    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        return Verdict.pause()
async def says(value):
    await asyncio.sleep(0)
    return value
class Handler:
    async def __call__(self, hit):
        return await says(Verdict.pause())
async def main(guest):
    async with vmitap.aio.attach("demo") as demo:
        loop = asyncio.get_running_loop()
        future = lambda hit: asyncio.run_coroutine_threadsafe(says(Verdict.pause()), loop)
        wrapped = lambda hit: asyncio.wrap_future(future(hit), loop=loop)
        for handler in [wrapped, lambda hit: Soon(), lambda hit: says(Verdict.pause()), Handler()]:
            bp = {target}.breakpoint(0x8000 if {target} is guest else "open_file", handler)
            print((await {target}.run(timeout=60)).reason)
            bp.remove()
        bp = {target}.breakpoint(0x8000 if {target} is guest else "open_file", lambda hit: Soon)
        try:
            await {target}.run(timeout=60)
        except HandlerError as error:
            print(type(error.error).__name__, state("held"))
in_loop(main)
""",
        [*["paused"] * 4, "TypeError 0"],
    )


@pytest.mark.parametrize("end", ["waiting.cancel()", "await asyncio.wait_for(guest.detach(), 60)"])
def test_a_question_that_is_cancelled_is_answered_as_if_nobody_had_been_asked(library: Path, end: str) -> None:
    told = "True" if "cancel" in end else "stopped"
    in_loop(
        library,
        f"""
async def main(guest):
    # MOV [RBX], AL, which is 0x55 as the byte there is.
    write(0x8000, bytes.fromhex("555d8803ebfa"))
    for vcpu in range(2):
        fake.fake_regs(vcpu)[RAX] = 0x55
    asked = asyncio.Event()
    async def ask(hit):
        asked.set()
        await asyncio.sleep(1000)
    guest.breakpoint(0x8000, on_write=OnWrite.ASK, ask=ask, deadline=0.01)
    waiting = asyncio.create_task(guest.run())
    await asyncio.wait_for(asked.wait(), 60)
    await asyncio.sleep(0.05)
    {end}
    done, _ = await asyncio.wait([waiting], timeout=60)
    print(len(done), waiting.cancelled() or waiting.result().reason)
in_loop(main)
write(0x8000, CODE)
""",
        [f"1 {told}"],
    )


WAITS_FOR_ITSELF = [
    "guest.detach()",
    "asyncio.wait_for(guest.detach(), 1)",
    "asyncio.gather(guest.detach())",
    "events.aclose()",
    "guest.run()",
    "anext(guest.events())",
]


@pytest.mark.parametrize("wait", WAITS_FOR_ITSELF)
def test_a_handler_that_would_wait_for_itself_is_told_so(library: Path, wait: str) -> None:
    in_loop(
        library,
        f"""
async def main(guest):
    told = []
    async def waits(hit):
        try:
            await {wait}
        except SessionBusyError:
            told.append(hit.vcpu)
    guest.breakpoint(0x8000, waits)
    events = guest.events(timeout=60)
    async for hit in events:
        if len(told) >= 2:
            break
    await events.aclose()
    print(len(told) >= 2)
    await guest.detach()
in_loop(main)
""",
        ["True"],
    )


def test_a_loop_that_ends_in_the_middle_of_a_handler_leaves_nothing_in_the_domain(library: Path) -> None:
    done = run(
        library,
        """
import asyncio, gc, threading, vmitap.aio
async def main():
    guest = await vmitap.aio.attach("xen:guest").__aenter__()
    begun = asyncio.Event()
    async def endless(hit):
        begun.set()
        await asyncio.get_running_loop().create_future()
    guest.breakpoint(0x8000, endless)
    guest.running = asyncio.ensure_future(guest.run())
    await begun.wait()
fake.fake_automatic(50)
loop = asyncio.new_event_loop()
loop.set_exception_handler(lambda loop, context: None)
loop.run_until_complete(main())
loop.close()
del loop
# The one that attached may not have come to its end yet, and has the loop until then.
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join()
gc.collect()
gc.collect()
"""
        + UNTOUCHED,
    )
    assert done.stdout == "untouched\n"


@pytest.mark.parametrize("target", ["xen:guest", "demo"])
def test_a_hit_that_was_told_before_its_handler_raised_is_not_lost(library: Path, target: str) -> None:
    done = run(
        library,
        f"""
import asyncio, vmitap.aio
async def main():
    asyncio.get_running_loop().slow_callback_duration = 60
    async with vmitap.aio.attach({target!r}) as guest:
        def fails(hit):
            raise ValueError("no")
        guest.breakpoint({"0x8000" if target != "demo" else '"open_file"'}, fails)
        got = []
        try:
            async for hit in guest.events(timeout=60):
                got.append(hit)
        except vmitap.HandlerError as error:
            print(len(got), got[0].timestamp == error.hit.timestamp, guest.vm.stats.hits)
fake.fake_automatic(50)
asyncio.run(main())
"""
        + UNTOUCHED,
        options=("-X", "dev"),
    )
    assert done.stdout.splitlines() == ["1 True 1", "untouched"], (done.stdout, done.stderr)
    assert done.stderr == ""


def test_a_task_that_a_handler_returns_cannot_wait_for_itself_either(library: Path) -> None:
    in_loop(
        library,
        """
async def main(guest):
    async def detaches():
        try:
            await guest.detach()
        except SessionBusyError:
            return Verdict.pause()
    guest.breakpoint(0x8000, lambda hit: asyncio.ensure_future(detaches()))
    print((await asyncio.wait_for(guest.run(), 60)).reason)
in_loop(main)
""",
        ["paused"],
    )


def test_a_cancellation_that_comes_with_an_event_is_not_lost(library: Path) -> None:
    in_loop(
        library,
        """
async def main(guest):
    guest.breakpoint(0x8000)
    for steps in range(12):
        for iterates in (False, True):
            fake.fake_automatic(0)
            events = guest.events() if iterates else None
            task = asyncio.ensure_future(anext(events) if iterates else guest.run())
            await asyncio.sleep(0.02)
            for vcpu in range(2):
                fake.fake_run(vcpu, 4)
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=20)
            assert done and (iterates or task.cancelled()), (steps, task)
            if iterates:
                # The guest goes on until the iteration is closed, or the session's end closes it.
                await asyncio.wait_for(events.aclose(), 20)
    print("done")
in_loop(main)
""",
        ["done"],
    )


def test_who_is_cancelled_while_a_session_ends_is_cancelled_once_it_has(library: Path) -> None:
    in_loop(
        library,
        """
async def main(guest):
    begun = asyncio.Event()
    async def slow(hit):
        begun.set()
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(0.3)
    guest.breakpoint(0x8000, slow)
    events = guest.events()
    async def closes():
        await events.aclose()
        print("not reached")
    for ends in (closes, guest.detach):
        begun.clear()
        running = asyncio.create_task(anext(events) if ends is closes else guest.run())
        await begun.wait()
        try:
            async with asyncio.timeout(0.05):
                await ends()
        except TimeoutError:
            print("in time", guest.vm.closed, state("held"))
        await asyncio.wait([running])
    running.result()
    # Who goes on asking is told that there is nothing more.
    print([hit async for hit in events])
in_loop(main)
""",
        ["in time False 0", "in time True 0", "[]"],
    )


def test_after_a_run_that_was_cancelled_handlers_are_called_again(library: Path) -> None:
    in_loop(
        library,
        """
async def main(guest):
    begun = []
    async def look(hit):
        begun.append(hit)
        await asyncio.sleep(0 if len(begun) > 1 else 1000)
    guest.breakpoint(0x8000, look)
    running = asyncio.create_task(guest.run())
    while not begun:
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])
    result = await asyncio.to_thread(guest.vm.run, 60, 5)
    print(result.py_calls, len(begun), (await guest.run(timeout=60, max_hits=5)).py_calls, len(begun))
in_loop(main)
""",
        ["5 6 5 11"],
    )
