"""`Vm.monitor_events`: what the guest announces, on real instructions of the demo guest (guests/demo/probe.c)."""

from __future__ import annotations

import pickle
import struct
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import pytest

import vmitap
from vmitap import Access, Budget, Filter, HandlerError, InvalidArgumentError, NotSupportedError, Reg, StaleContextError, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmitap import Hit

ROUNDS = 10
KERNEL_GS_BASE = 0xC000_0102
TSD = 1 << 2
PWT = 1 << 3
CPUID_HYPERVISOR = 0x4000_0000


class Results(NamedTuple):
    """`probe_results` of guests/demo/probe.c."""

    rounds: int
    eax: int
    ebx: int
    ecx: int
    edx: int
    msr: int
    cr4_before: int
    cr4_after: int
    cr3_before: int
    cr3_after: int

    @classmethod
    def read(cls, vm: vmitap.Vm) -> Results:
        return cls(*struct.unpack("<10Q", vm.read("probe_results", 80)))


@pytest.fixture
def guest() -> Iterator[vmitap.Vm]:
    with vmitap.attach("demo", vcpus=2, cmdline=f"mode=probes probes={ROUNDS}") as vm:
        yield vm


def finish(vm: vmitap.Vm) -> Results:
    """To the guest's end, with its own checks clean."""
    assert vm.run(timeout=30).reason == "idle"
    assert "0 mismatches" in vm.console
    found = Results.read(vm)
    assert found.rounds == ROUNDS
    return found


def test_every_kind_of_event_is_told_before_it_takes_effect(guest: vmitap.Vm) -> None:
    told: list[tuple[str, object, object, object]] = []

    def tell(hit: Hit) -> None:
        event = hit.event
        assert (event.vcpu, event.registers.rip, hit.access, hit.pa) == (hit.vcpu, hit.address, Access(0), 0)
        if event.reason == "write-control-register":
            told.append((event.reason, event.register, event.old, event.new))
            assert getattr(hit.vm.registers(hit.vcpu), str(event.register)) == event.old
        elif event.reason == "write-msr":
            told.append((event.reason, event.register, event.old, event.new))
            assert hit.symbol is not None
            assert hit.symbol.startswith("probe_registers+")
        else:
            told.append((event.reason, event.leaf, event.subleaf, event.insn_len))
            assert (hit.regs.rax, hit.regs.rcx) == (event.leaf, event.subleaf)

    # Those at the beginning, which set the guest up, are others.
    setup = guest.breakpoint("probe_cpuid", once=True)
    guest.run(timeout=30, max_hits=1)
    bp = guest.monitor_events(tell, cr=["cr3", "cr4"], msr=[KERNEL_GS_BASE, 0x10], cpuid=True)
    found = finish(guest)
    assert setup.state == "removed"
    expected = []
    # As they were before the first round, which is an even number of rounds ago.
    cr4, cr3 = found.cr4_after, found.cr3_after
    for number in range(1, ROUNDS + 1):
        expected += [
            ("cpuid", CPUID_HYPERVISOR, 0, 2),
            ("write-msr", KERNEL_GS_BASE, number - 1, number),
            ("write-control-register", "cr4", cr4, cr4 ^ TSD),
            ("write-control-register", "cr3", cr3, cr3 ^ PWT),
        ]
        cr4, cr3 = cr4 ^ TSD, cr3 ^ PWT
    assert told == expected
    assert (bp.stats.hits, bp.stats.py_calls) == (4 * ROUNDS, 4 * ROUNDS)
    assert (found.msr, found.cr4_after ^ found.cr4_before) == (ROUNDS, TSD)


@pytest.mark.parametrize("kind", ["msr", "cr"])
def test_what_is_denied_has_no_effect_and_counts_as_executed(guest: vmitap.Vm, kind: str) -> None:
    guest.monitor_events(
        lambda _: Verdict.deny(),
        msr=KERNEL_GS_BASE if kind == "msr" else (),
        cr="cr4" if kind == "cr" else None,
        where=Filter.ring(0),
    )
    # Only the boot writes CR4 before, and it gets by without.
    found = finish(guest)
    assert (found.msr == 0) == (kind == "msr")
    assert (found.cr4_before == found.cr4_after) == (kind == "cr")
    assert found.cr3_before != found.cr3_after


def test_a_handler_answers_cpuid_itself(guest: vmitap.Vm) -> None:
    told = 0

    def hide(hit: Hit) -> Verdict:
        nonlocal told
        told += 1
        length = hit.event.insn_len
        assert length is not None
        return Verdict.set_registers(rax=1, rbx=2, rcx=3, rdx=4, rip=hit.regs.rip + length)

    bp = guest.monitor_events(hide, cpuid=True)
    found = finish(guest)
    assert found[1:5] == (1, 2, 3, 4)
    assert told == bp.stats.hits == ROUNDS


def test_a_handler_cannot_change_what_is_written(guest: vmitap.Vm) -> None:
    # The low half of what WRMSR writes is in RAX.
    guest.monitor_events(lambda hit: Verdict.set_registers(rax=hit.regs.rax + 0x1000), msr=KERNEL_GS_BASE, where=Reg.rax == 3)
    with pytest.raises(InvalidArgumentError):
        guest.run(timeout=30)
    assert finish(guest).msr == ROUNDS


def test_steps_from_an_event_begin_behind_its_instruction(guest: vmitap.Vm) -> None:
    seen: list[tuple[int, int, str]] = []

    def walk(hit: Hit) -> Verdict | None:
        seen.append((hit.step, hit.address, hit.event.reason))
        return Verdict.step(2) if hit.step == 0 else None

    guest.monitor_events(walk, cpuid=True, msr=KERNEL_GS_BASE, where=Filter.once())
    finish(guest)
    first = seen[0]
    assert [(step, reason) for step, _, reason in seen] == [(0, first[2]), (1, "single-step"), (2, "single-step")]
    assert seen[1][1] == first[1] + 2
    assert seen[2][1] > seen[1][1]


def test_a_walk_goes_on_over_an_instruction_that_somebody_monitors(guest: vmitap.Vm) -> None:
    steps: list[int] = []

    def walk(hit: Hit) -> Verdict | None:
        steps.append(hit.step)
        return Verdict.step(30) if hit.step == 0 else None

    guest.breakpoint("probe_registers", walk, where=Filter.once())
    counted = guest.monitor_events(cr=("cr3", "cr4"), msr=KERNEL_GS_BASE)
    before = guest.monitor_events(cr="cr3")
    found = finish(guest)
    assert steps == list(range(31))
    assert counted.stats.hits >= 3 * ROUNDS
    assert before.stats.hits >= ROUNDS
    assert found.msr == ROUNDS


def place(vm: vmitap.Vm, function: str, code: str) -> int:
    """Where an instruction is in a function."""
    start = vm.symbol(function)
    return start + vm.read(start, 0x80).index(bytes.fromhex(code))


@pytest.mark.parametrize("first", [True, False])
def test_a_walk_gets_past_an_instruction_that_is_tapped_and_monitored(guest: vmitap.Vm, first: bool) -> None:
    wrmsr = place(guest, "probe_registers", "0f30")
    seen: list[tuple[int, int]] = []

    def walk(hit: Hit) -> Verdict | None:
        seen.append((hit.step, hit.address))
        return Verdict.step(20) if hit.step == 0 else None

    # It begins at the instruction, or comes to it.
    guest.breakpoint(wrmsr if first else "probe_registers", walk, where=Filter.once())
    tapped = guest.breakpoint(wrmsr)
    monitored = guest.monitor_events(msr=KERNEL_GS_BASE, cr=("cr3", "cr4"), where=Reg.rip >= guest.symbol("probe_cpuid"))
    found = finish(guest)
    assert [step for step, _ in seen] == list(range(21))
    assert len({address for _, address in seen}) == 21
    assert (tapped.stats.hits, monitored.stats.hits, found.msr) == (ROUNDS, 3 * ROUNDS, ROUNDS)


def test_what_is_behind_an_answered_instruction_is_hit(guest: vmitap.Vm) -> None:
    cpuid = place(guest, "probe_cpuid", "0fa2")
    taps = [guest.breakpoint(cpuid), guest.breakpoint(cpuid + 2)]
    guest.monitor_events(lambda hit: Verdict.set_registers(rbx=9, rip=hit.regs.rip + 2), cpuid=True)
    found = finish(guest)
    assert [tap.stats.hits for tap in taps] == [ROUNDS, ROUNDS]
    assert found.ebx == 9


def test_after_rip_was_set_in_the_handler_the_next_instruction_is_told(guest: vmitap.Vm) -> None:
    guest.monitor_events(lambda hit: hit.vm.set_registers(hit.vcpu, rip=hit.regs.rip + 2), cpuid=True)
    written = guest.monitor_events(msr=KERNEL_GS_BASE, where=Reg.rip >= guest.symbol("probe_cpuid"))
    finish(guest)
    assert written.stats.hits == ROUNDS


TRACED = 112  # the offset of `traced` in `probe_results`
STEPS = 6
"""Debug exceptions of one `probe_trace`: behind each instruction that begins with the trap flag on."""


@pytest.mark.parametrize("kept", [True, False])
def test_debug_exceptions_of_the_guest_are_told_and_delivered_or_kept_from_it(kept: bool) -> None:
    seen: list[int] = []

    def tell(hit: Hit) -> Verdict | None:
        seen.append(hit.address)
        assert (hit.event.reason, hit.event.pending) == ("debug-exception", 1 << 14)
        return Verdict.deny() if kept else None

    with vmitap.attach("demo", cmdline=f"mode=probes probes={ROUNDS} trace=1") as vm:
        tapped = vm.breakpoint(place(vm, "probe_trace", "909090") + 1)
        bp = vm.monitor_events(tell, debug=True)
        finish(vm)
        assert vm.read_u64(vm.symbol("probe_results") + TRACED) == (0 if kept else STEPS * ROUNDS)
        assert (bp.stats.hits, tapped.stats.hits, len(set(seen))) == (STEPS * ROUNDS, ROUNDS, STEPS)
        start = vm.symbol("probe_trace")
        assert all(start < address < start + 0x40 for address in seen)


def test_a_debug_exception_is_not_delivered_where_the_handler_has_moved_rip() -> None:
    with vmitap.attach("demo", cmdline="mode=probes probes=1 trace=1") as vm:
        nops = place(vm, "probe_trace", "909090")
        # Behind the first NOP; to the third.
        bp = vm.monitor_events(lambda hit: hit.vm.set_registers(hit.vcpu, rip=nops + 2), debug=True, where=Reg.rip == nops + 1)
        assert vm.run(timeout=30).reason == "idle"
        # Not the one that was moved away from, and the second NOP was not executed.
        assert (bp.stats.hits, vm.read_u64(vm.symbol("probe_results") + TRACED)) == (1, STEPS - 2)


def test_filters_captures_events_budgets_and_states_work_as_for_breakpoints(guest: vmitap.Vm) -> None:
    odd = guest.monitor_events(msr=KERNEL_GS_BASE, where=Reg.rax % 2 == 1, capture={"low": Reg.rax}, key="k", tag="t")
    again = guest.monitor_events(msr=KERNEL_GS_BASE, key="k")
    starved = guest.monitor_events(cpuid=True, budget=Budget(per_second=1))
    assert (odd.key, odd.tag, odd.length, odd.access, odd.address, odd.symbol) == ("k", "t", 0, Access(0), 0, None)
    assert repr(odd) == f"<Breakpoint msr {KERNEL_GS_BASE:#x}, active>"
    assert list(guest.breakpoints) == [odd, again, starved]
    assert guest.breakpoints.at(0) == guest.breakpoints.on_page(0) == []
    again.disable()
    assert (again.state, odd.state) == ("disabled", "active")
    events = guest.events(odd, timeout=30)
    hits = [next(events) for _ in range(2)]
    events.close()
    assert [hit.event.new for hit in hits] == [1, 3]
    again.enable()
    finish(guest)
    table = guest.recording.to_arrow()
    assert table["low"].to_pylist() == [1, 3, 5, 7, 9]
    assert set(table["symbol"].to_pylist()) == {f"msr {KERNEL_GS_BASE:#x}"}
    assert (odd.stats.hits, again.stats.hits) == (5, ROUNDS - 3)
    assert starved.state == "disabled"
    assert starved.stats.over_budget
    for bp in (odd, again):
        bp.remove()
    assert odd.state == "removed"
    kept = pickle.loads(pickle.dumps(hits[0]))
    with pytest.raises(StaleContextError):
        _ = kept.event


def test_nothing_is_told_after_the_monitor_is_gone(guest: vmitap.Vm) -> None:
    stopped = guest.monitor_events(lambda _: Verdict.pause(), cpuid=True)
    other = guest.monitor_events(cpuid=True)
    assert guest.run(timeout=30).reason == "paused"
    events = guest.stats.events
    stopped.remove()
    guest.run(timeout=30, max_hits=1)
    assert (stopped.stats.hits, other.stats.hits) == (1, 2)
    other.remove()
    finish(guest)
    assert (other.stats.hits, guest.stats.events) == (2, events + 1)


def test_a_verdict_that_does_not_fit_is_an_error_of_the_handler(guest: vmitap.Vm) -> None:
    guest.breakpoint("probe_cpuid", lambda _: Verdict.deny(), once=True)
    guest.monitor_events(lambda _: Verdict.deny(), cpuid=True, where=Filter.once())
    for _ in range(2):
        with pytest.raises(InvalidArgumentError):
            guest.run(timeout=30)
    assert finish(guest).msr == ROUNDS


def test_an_error_of_the_handler_lets_the_instruction_happen(guest: vmitap.Vm) -> None:
    @guest.monitor_events(msr=KERNEL_GS_BASE)
    def fails(hit: Hit) -> None:
        if hit.event.new == 3:
            raise ValueError("on purpose")

    with pytest.raises(HandlerError) as raised:
        guest.run(timeout=30)
    assert raised.value.hit.event.new == 3
    assert finish(guest).msr == ROUNDS


def test_what_cannot_be_monitored_is_refused_and_nothing_changes(guest: vmitap.Vm) -> None:
    # What a type checker refuses, too: so that it does not here.
    wrong = cast("Literal['cr0']", "cr8")
    calls: list[Callable[[], object]] = [
        lambda: guest.monitor_events(msr=None),
        lambda: guest.monitor_events(msr=()),
        lambda: guest.monitor_events(cr=wrong),
        lambda: guest.monitor_events(cr=["cr3", wrong]),
        lambda: guest.monitor_events(msr=1 << 32),
        lambda: guest.monitor_events(msr=range(9)),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError):
            call()
    for descriptors in (True, False):
        with pytest.raises(NotSupportedError):
            guest.monitor_events(cpuid=True, descriptors=descriptors, requests=not descriptors)
    with pytest.raises(TypeError):
        guest.monitor_events(cast("Callable[[Hit], None]", 3), cpuid=True)
    assert list(guest.breakpoints) == []
    finish(guest)
    assert guest.stats.events == 0


def test_leaving_in_the_middle_leaves_the_guest_alone() -> None:
    with vmitap.attach("demo", cmdline=f"mode=probes probes={ROUNDS}") as vm:
        vm.monitor_events(lambda _: Verdict.pause(), cpuid=True, cr=("cr0", "cr3", "cr4"), msr=KERNEL_GS_BASE)
        assert vm.run(timeout=30).reason == "paused"
