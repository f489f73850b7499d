"""What a handler keeps of a hit stays as it was, however little it is; what it does not keep may be the next hit's."""

from __future__ import annotations

import asyncio
import pickle
import queue
import threading
from typing import TYPE_CHECKING, Any

import pytest

import vmitap
from vmitap import aio

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from vmitap import Hit, Registers, Vm

HITS = 60
"""f(i) is called with i from 0 on, so the argument says which hit it was."""


@pytest.fixture(scope="module")
def calls(build_guest: Callable[..., str]) -> str:
    return build_guest("calls.S")


def facts(hit: Hit) -> tuple[Any, ...]:
    place = (hit.vcpu, hit.address, hit.pa, hit.view.id, hit.step, hit.access, hit.symbol, hit.root, hit.ring)
    event = hit.event
    return (
        *place,
        (event.reason, event.gfn, event.vcpu, event.registers),
        hit.args,
        hit.arg(0),
        hit.timestamp,
        hit.hold,
        hit.regs.to_dict(),
        repr(hit),
    )


def a_generator(hit: Hit) -> Generator[Hit, None, None]:
    yield hit
    yield hit


def a_traceback(hit: Hit) -> ValueError:
    try:
        raise ValueError
    except ValueError as error:
        return error


def started(hit: Hit) -> Generator[Hit, None, None]:
    generator = a_generator(hit)
    next(generator)
    return generator


def of_traceback(error: ValueError) -> Hit:
    assert error.__traceback__ is not None
    hit: Hit = error.__traceback__.tb_frame.f_locals["hit"]
    return hit


WAYS: dict[str, tuple[Callable[[Hit], Any], Callable[[Any], Hit]]] = {
    "itself": (lambda hit: hit, lambda kept: kept),
    "in a tuple": (lambda hit: (hit,), lambda kept: kept[0]),
    "a method of it": (lambda hit: hit.arg, lambda kept: kept.__self__),
    "a closure": (lambda hit: lambda: hit, lambda kept: kept()),
    "a generator that stands": (started, next),
    "an error's traceback": (a_traceback, of_traceback),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_hit_that_is_kept_in_any_way_stays_as_it_was(calls: str, way: str, every: int) -> None:
    keep, of = WAYS[way]
    kept: list[tuple[int, tuple[Any, ...], Any]] = []
    seen: list[int] = []

    def handler(hit: Hit) -> None:
        seen.append(hit.args[0])
        if len(seen) % every == 0:
            kept.append((hit.args[0], facts(hit), keep(hit)))

    with vmitap.attach(calls, cmdline=f"n={HITS} every=0") as vm:
        vm.breakpoint("f", handler)
        vm.run(timeout=60)
        assert seen == list(range(HITS))
        assert len(kept) == HITS // every
        for number, then, what in kept:
            hit = of(what)
            assert (hit.args[0], hit.regs.rdi) == (number, number)
            assert facts(hit) == then


def test_the_registers_of_a_hit_can_be_kept_without_it(calls: str) -> None:
    kept: list[Registers] = []
    with vmitap.attach(calls, cmdline=f"n={HITS} every=0") as vm:
        vm.breakpoint("f", lambda hit: kept.append(hit.regs))
        vm.run(timeout=60)
    assert [registers.rdi for registers in kept] == list(range(HITS))
    assert len(set(kept)) == HITS


def test_what_is_got_from_a_hit_is_no_part_of_it(calls: str) -> None:
    kept: list[tuple[dict[str, int], tuple[int, ...], vmitap.VmiEvent, bytes]] = []

    def handler(hit: Hit) -> None:
        kept.append((hit.regs.to_dict(), hit.args, hit.event, pickle.dumps(hit)))

    with vmitap.attach(calls, cmdline=f"n={HITS} every=0") as vm:
        vm.breakpoint("f", handler)
        vm.run(timeout=60)
        for number, (registers, args, event, pickled) in enumerate(kept):
            assert (registers["rdi"], args[0], event.registers.rdi) == (number, number, number)
            assert pickle.loads(pickled).args[0] == number


def test_the_live_guest_of_a_hit_ends_with_its_handler_also_where_nothing_else_was_kept(calls: str) -> None:
    kept: list[Vm] = []
    with vmitap.attach(calls, cmdline=f"n={HITS} every=0") as vm:
        vm.breakpoint("f", lambda hit: kept.append(hit.vm))
        vm.run(timeout=60)
        for scoped in kept:
            with pytest.raises(vmitap.StaleContextError):
                scoped.read("f", 1)


def test_hits_of_several_breakpoints_and_vcpus_by_turns_are_told_apart(calls: str) -> None:
    """f and h of vCPU 0, and what vCPU 1 runs meanwhile."""
    told: list[tuple[str | None, object, int, int]] = []

    def handler(hit: Hit) -> None:
        told.append((hit.symbol, hit.tag, hit.address, hit.regs.rip))

    with vmitap.attach(calls, cmdline=f"n={HITS} every=3", vcpus=2) as vm:
        for name in ("f", "h"):
            vm.breakpoint(name, handler, tag=name)
        vm.run(timeout=60)
        addresses = {name: vm.symbol(name) for name in ("f", "h")}
        assert vm.read_u64("h_count") == sum(name == "h" for name, *_ in told) > 1
    assert sum(name == "f" for name, *_ in told) == HITS
    for symbol, tag, address, rip in told:
        assert symbol is not None
        assert symbol == tag
        assert addresses[symbol] == address == rip


def test_another_thread_can_read_a_hit_while_the_guest_goes_on(calls: str) -> None:
    waiting: queue.SimpleQueue[Hit | None] = queue.SimpleQueue()
    read: list[int] = []

    def reads() -> None:
        while (hit := waiting.get()) is not None:
            read.append(hit.args[0])

    thread = threading.Thread(target=reads)
    thread.start()
    try:
        with vmitap.attach(calls, cmdline=f"n={50 * HITS} every=0") as vm:
            vm.breakpoint("f", waiting.put)
            vm.run(timeout=60)
    finally:
        waiting.put(None)
        thread.join()
    assert read == list(range(50 * HITS))


def test_hits_that_wait_in_a_queue_are_not_those_a_handler_is_called_with_next(calls: str) -> None:
    seen: list[int] = []
    with vmitap.attach(calls, cmdline=f"n={HITS} every=0") as vm:
        bp = vm.breakpoint("f", lambda hit: seen.append(hit.args[0]))
        queued = list(vm.events(bp, timeout=60))
    assert [hit.args[0] for hit in queued] == seen == list(range(HITS))


def test_a_coroutine_has_its_hit_as_it_was_after_it_has_waited(calls: str) -> None:
    seen: list[int] = []

    async def handler(hit: Hit) -> None:
        before = facts(hit)
        await asyncio.sleep(0)
        assert facts(hit) == before
        seen.append(hit.regs.rdi)

    async def main() -> None:
        async with aio.attach(calls, cmdline=f"n={HITS} every=0") as guest:
            guest.breakpoint("f", handler)
            await guest.run(timeout=60)

    asyncio.run(main())
    assert seen == list(range(HITS))


def test_the_steps_after_a_hit_are_told_from_it_and_from_each_other(calls: str) -> None:
    told: list[tuple[int, str, int]] = []

    def handler(hit: Hit) -> vmitap.Verdict | None:
        told.append((hit.step, hit.event.reason, hit.regs.rip - hit.breakpoint.address))
        return vmitap.Verdict.step(2) if hit.step == 0 else None

    with vmitap.attach(calls, cmdline=f"n={HITS} every=0") as vm:
        vm.breakpoint("f", handler)
        vm.run(timeout=60)
    assert [step for step, _, _ in told] == [0, 1, 2] * HITS
    assert {reason for step, reason, _ in told if step} == {"single-step"}
    assert {reason for step, reason, _ in told if not step} == {"breakpoint"}
    assert all((offset == 0) == (step == 0) for step, _, offset in told)
