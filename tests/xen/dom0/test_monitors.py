"""What vCPUs announce on real Xen: each event of guests/demo/probe.c is told once, in order, and answered as the handler says."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

import vmitap
from demo_guest import KERNEL_WINDOW, assert_unseen, finish, start_demo, symbols
from domain import Start, attach, release
from vmitap import Filter, Verdict

if TYPE_CHECKING:
    from vmitap import Hit

ROUNDS = 8
KERNEL_GS_BASE = 0xC000_0102
CONSOLE = 0xE9
TSD = 1 << 2
PWT = 1 << 3
HYPERVISOR_LEAF = 0x4000_0000
XEN = b"XenVMMXenVMM"


def results(vm: vmitap.Vm) -> tuple[int, ...]:
    """`probe_results`: rounds, EAX to EDX, the MSR, CR4 before and after, CR3 before and after, two limits, the request."""
    return struct.unpack("<12Qq", vm.read_pa(symbols()["probe_results"] - KERNEL_WINDOW, 104))


def start_probes(start: Start, options: str = "") -> None:
    start_demo(start, f"mode=probes probes={ROUNDS} {options}")


def test_each_event_is_told_once_and_in_order(start: Start) -> None:
    told: list[tuple[object, ...]] = []

    def tell(hit: Hit) -> None:
        event = hit.event
        where = {"cpuid": "probe_cpuid", "guest-request": "probe_request"}.get(event.reason, "probe_registers")
        assert symbols()[where] <= event.registers.rip < symbols()[where] + 0x80
        if event.reason == "cpuid":
            told.append((event.reason, event.leaf, event.subleaf, event.insn_len))
            assert (event.registers.rax, event.registers.rcx) == (event.leaf, event.subleaf)
        elif event.reason == "guest-request":
            told.append((event.reason,))
        else:
            told.append((event.reason, event.register, event.old, event.new))

    start_probes(start, "requests=1")
    with attach("xen:demo") as vm:
        bp = vm.monitor_events(tell, cr=("cr3", "cr4"), msr=KERNEL_GS_BASE, cpuid=True, requests=True)
        seen = finish(vm)
        rounds, eax, ebx, ecx, edx, msr, cr4_before, cr4_after, cr3_before, cr3_after, *_, requested = results(vm)
    assert_unseen(seen)
    assert rounds == msr == ROUNDS
    assert (eax >= HYPERVISOR_LEAF, struct.pack("<3I", ebx, ecx, edx)) == (True, XEN)
    assert (cr4_before ^ cr4_after, cr3_before ^ cr3_after, requested) == (TSD, PWT, 0)
    expected: list[tuple[object, ...]] = []
    # As they were before the first round, which is an even number of rounds ago.
    cr4, cr3 = cr4_after, cr3_after
    for number in range(1, ROUNDS + 1):
        expected += [
            ("cpuid", HYPERVISOR_LEAF, 0, 2),
            ("write-msr", KERNEL_GS_BASE, number - 1, number),
            ("write-control-register", "cr4", cr4, cr4 ^ TSD),
            ("write-control-register", "cr3", cr3, cr3 ^ PWT),
            ("guest-request",),
        ]
        cr4, cr3 = cr4 ^ TSD, cr3 ^ PWT
    assert told == expected
    assert bp.stats.hits == len(told)


def test_accesses_to_ports_are_told_and_done(start: Start) -> None:
    written: list[int] = []

    def tell(hit: Hit) -> None:
        event = hit.event
        assert (event.port, event.port_bytes, event.is_port_read) == (CONSOLE, 1, False)
        written.append(event.registers.rax & 0xFF)

    start_probes(start)
    with attach("xen:demo") as vm:
        if release() < (4, 18):
            with pytest.raises(vmitap.NotSupportedError):
                vm.monitor_events(tell, ports=True)
            finish(vm)
            return
        vm.monitor_events(tell, ports=True)
        seen = finish(vm)
    assert_unseen(seen)
    assert bytes(written) == b"integrity: 2 checks, 0 mismatches\n"


def test_what_is_denied_has_no_effect(start: Start) -> None:
    start_probes(start)
    with attach("xen:demo") as vm:
        bp = vm.monitor_events(lambda _: Verdict.deny(), cr=("cr3", "cr4"), msr=KERNEL_GS_BASE)
        seen = finish(vm)
        rounds, *_, msr, cr4_before, cr4_after, cr3_before, cr3_after = results(vm)[:10]
    assert_unseen(seen)
    assert (rounds, bp.stats.hits, msr) == (ROUNDS, 3 * ROUNDS, 0)
    assert (cr4_before, cr3_before) == (cr4_after, cr3_after)


def test_a_handler_answers_cpuid_itself_and_leaves_writes_out(start: Start) -> None:
    def answer(hit: Hit) -> Verdict:
        if hit.event.reason == "cpuid":
            return Verdict.set_registers(rax=1, rbx=2, rcx=3, rdx=4, rip=hit.regs.rip + (hit.event.insn_len or 0))
        # WRMSR is two bytes long.
        return Verdict.set_registers(rip=hit.regs.rip + 2)

    start_probes(start)
    with attach("xen:demo") as vm:
        bp = vm.monitor_events(answer, msr=KERNEL_GS_BASE, cpuid=True)
        seen = finish(vm)
        rounds, *registers, msr = results(vm)[:6]
    assert_unseen(seen)
    assert (rounds, bp.stats.hits) == (ROUNDS, 2 * ROUNDS)
    assert (registers, msr) == ([1, 2, 3, 4], 0)


def test_registers_that_are_set_while_a_write_is_held_do_not_repeat_it(start: Start) -> None:
    def touch(hit: Hit) -> None:
        hit.vm.set_registers(hit.vcpu, r15=hit.regs.r15)

    start_probes(start)
    with attach("xen:demo") as vm:
        bp = vm.monitor_events(touch, msr=KERNEL_GS_BASE, cr="cr4")
        seen = finish(vm)
        rounds, *_, msr = results(vm)[:6]
    assert_unseen(seen)
    assert (rounds, msr, bp.stats.hits) == (ROUNDS, ROUNDS, 2 * ROUNDS)


def test_a_walk_over_everything_that_is_told_comes_to_its_end(start: Start) -> None:
    steps: list[tuple[int, int]] = []
    told: list[str] = []

    def walk(hit: Hit) -> Verdict | None:
        steps.append((hit.step, hit.address))
        return Verdict.step(60) if hit.step == 0 else None

    start_probes(start, "requests=1")
    with attach("xen:demo") as vm:
        vm.breakpoint(symbols()["probe_cpuid"], walk, where=Filter.once())
        vm.monitor_events(
            lambda hit: told.append(hit.event.reason), cr=("cr3", "cr4"), msr=KERNEL_GS_BASE, cpuid=True, descriptors=True, requests=True
        )
        seen = finish(vm)
        rounds, eax, ebx, ecx, edx, msr, cr4_before, cr4_after, cr3_before, cr3_after, gdt, idt, _ = results(vm)
    assert_unseen(seen)
    assert (rounds, msr) == (ROUNDS, ROUNDS)
    # Stores of descriptor tables are told and done.
    assert (gdt % 8, idt) == (7, 256 * 16 - 1)
    assert struct.pack("<3I", ebx, ecx, edx) == XEN
    assert eax >= HYPERVISOR_LEAF
    assert (cr4_before ^ cr4_after, cr3_before ^ cr3_after) == (TSD, PWT)
    assert [step for step, _ in steps] == list(range(61))
    assert len({address for _, address in steps}) > 50
    kinds = ["cpuid", "write-msr", *["write-control-register"] * 2, *["descriptor-access"] * 2, "guest-request"]
    assert told == kinds * ROUNDS


def test_registers_that_are_set_while_a_request_is_held_are_its_answer(start: Start) -> None:
    start_probes(start, "requests=1")
    with attach("xen:demo") as vm:
        bp = vm.monitor_events(lambda hit: hit.vm.set_registers(hit.vcpu, rax=0x1234), requests=True)
        seen = finish(vm)
        *_, requested = results(vm)
    assert_unseen(seen)
    assert (bp.stats.hits, requested) == (ROUNDS, 0x1234)


@pytest.mark.parametrize("kept", [True, False])
def test_debug_exceptions_of_the_guest_are_told_and_delivered_or_kept_from_it(start: Start, kept: bool) -> None:
    seen: list[int] = []

    def tell(hit: Hit) -> Verdict | None:
        seen.append(hit.address - symbols()["probe_trace"])
        return Verdict.deny() if kept else None

    start_probes(start, "trace=1")
    with attach("xen:demo") as vm:
        bp = vm.monitor_events(tell, debug=True)
        seen_by_guest = finish(vm)
        (traced,) = struct.unpack("<Q", vm.read_pa(symbols()["probe_results"] - KERNEL_WINDOW + 112, 8))
    assert_unseen(seen_by_guest)
    each = len(set(seen))
    assert (bp.stats.hits, seen) == (each * ROUNDS, seen[:each] * ROUNDS)
    assert each == 6
    assert traced == (0 if kept else len(seen))


def test_nobody_is_told_once_the_session_has_ended(start: Start) -> None:
    start_probes(start, "requests=1")
    with attach("xen:demo") as vm:
        bp = vm.monitor_events(lambda _: Verdict.pause(), cr=("cr0", "cr3", "cr4"), msr=KERNEL_GS_BASE, cpuid=True)
        vm.write_pa(symbols()["truth"] - KERNEL_WINDOW + 0x98, b"\x01\0")
        assert vm.run(timeout=60).reason == "paused"
        assert bp.stats.hits == 1
    with attach("xen:demo") as vm:
        seen = finish(vm)
        rounds, *_, requested = results(vm)
        assert vm.stats.events == 0
    assert_unseen(seen)
    assert (rounds, requested) == (ROUNDS, 0)
