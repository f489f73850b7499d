"""Instructions that are hard to step over, tapped from Python: each hit is there, and the guest computes what it computes untapped.

The guest (tests/guests/insns.S) executes every case twice, in ring 0 and in ring 3, and notes what each leaves and what its exception
handler saw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import Filter, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmitap import Hit, Vm

USER = 0x100_0000_0000
"""Where the guest maps its page for ring 3."""
IN_USER = {"t_syscall", "t_user_int3", "t_user_nop", "t_user_out"}
OWN_INT3 = {"t_int3", "t_int3_long", "t_user_int3"}
FAULTS = {"t_page_fault": 14, "t_page_fault_write": 14, "t_non_canonical": 13, "t_div": 0, "t_ud2": 6, "t_int80": 0x80, "t_user_out": 0x80}
"""Those that an exception handler is entered from, and its vector."""
JUMPS = {"t_first": "tapped_start+5", "t_call": "t_call+6", "t_indirect": "t_indirect+4", "t_syscall": "on_syscall"}
"""Those that lead somewhere else, and where."""


@pytest.fixture(scope="module")
def guest(build_guest: Callable[..., str]) -> str:
    return build_guest("insns.S")


def truth(vm: Vm) -> dict[str, bytes | str]:
    """All that the guest leaves: what it computed, what it read of its own code, and what its exception handler saw."""
    sizes = {"results": 64 * 3 * 2, "hash_now": 10, "mismatches": 10}
    sizes |= dict.fromkeys(("rounds", "int3_seen", "user_rcx", "user_r11", "user_flags", "buffer", "done"), 1)
    sizes |= {f"exc_{name}": 256 for name in ("count", "error", "rip", "cs", "rflags", "rsp", "ss", "cr2")}
    return {"console": vm.console, **{name: vm.read(name, 8 * words) for name, words in sizes.items()}}


@pytest.fixture(scope="module")
def untapped(guest: str) -> dict[str, bytes | str]:
    with vmitap.attach(guest) as vm:
        assert vm.run(timeout=60).reason == "idle"
        assert (vm.read_u64("done"), vm.read_u64("rounds"), vm.read_u64("int3_seen")) == (1, 2, 6)
        return truth(vm)


@pytest.fixture(scope="module")
def names(guest: str) -> list[str]:
    with vmitap.attach(guest) as vm:
        found = [symbol.name for symbol in vm.symbols if symbol.name.startswith("t_")]
    assert len(found) > 50
    return found


def place(vm: Vm, name: str) -> int:
    """Where an instruction is executed."""
    return USER + vm.symbol(name) % 4096 if name in IN_USER else vm.symbol(name)


def executions(name: str) -> int:
    return 6 if name in {"t_loop", "t_branch"} else 2


def finish(vm: Vm, untapped: dict[str, bytes | str]) -> None:
    assert vm.run(timeout=120).reason == "idle"
    found = truth(vm)
    assert [name for name in untapped if found[name] != untapped[name]] == []


def stepping(hit: Hit) -> Verdict | None:
    return Verdict.step(2) if hit.step == 0 else None


WAYS: dict[str, tuple[Callable[[Hit], Verdict | None] | None, Filter | None]] = {
    "handled": (lambda hit: None, None),
    "only counted": (None, None),
    "filtered": (None, Filter.ring(2)),
    "stepped behind": (stepping, None),
}


@pytest.mark.parametrize("way", WAYS)
def test_all_of_them_are_hit_in_one_run_and_the_guest_sees_nothing(
    way: str, guest: str, names: list[str], untapped: dict[str, bytes | str]
) -> None:
    handler, where = WAYS[way]
    with vmitap.attach(guest) as vm:
        points = {name: vm.breakpoint(place(vm, name), handler, where=where) for name in names}
        # The user's page is mapped later.
        assert {name for name, point in points.items() if point.state == "pending"} == IN_USER
        finish(vm, untapped)
        counts = {name: point.stats.hits if where is None else point.stats.filtered for name, point in points.items()}
        assert counts == {name: executions(name) for name in names}
        assert vm.stats.reinjected == vm.read_u64("int3_seen") == 6


def test_two_on_one_instruction_and_its_neighbours_are_each_their_own(guest: str, untapped: dict[str, bytes | str]) -> None:
    with vmitap.attach(guest) as vm:
        last = vm.symbol("t_last")
        assert last % 4096 == 4095
        # The last byte of a page, the first of the next, and two owners of each.
        points = [vm.breakpoint(at, lambda hit: None, key=key) for at in (last, last + 1) for key in (1, 2)]
        finish(vm, untapped)
        assert [point.stats.hits for point in points] == [2] * 4


def test_each_alone_is_hit_and_stepped_behind_to_where_it_leads(guest: str, names: list[str], untapped: dict[str, bytes | str]) -> None:
    wrong: dict[str, object] = {}
    for name in names:
        hits: list[tuple[int, int]] = []

        def follow(hit: Hit, hits: list[tuple[int, int]] = hits) -> Verdict | None:
            hits.append((hit.step, hit.regs.rip))
            return stepping(hit)

        with vmitap.attach(guest) as vm:
            at = place(vm, name)
            point = vm.breakpoint(at, follow)
            finish(vm, untapped)
            steps = [step for step, _ in hits]
            # An INT3 of the guest's own is delivered, which ends the steps.
            expected = [0] if name in OWN_INT3 else [0, 1] if name == "t_sysretq" else [0, 1, 2]
            first = {rip for step, rip in hits if step == 1}
            if name in FAULTS:
                # Its stubs are 16 bytes each; some push an error code first.
                leads = first == {vm.symbol("stubs") + 16 * FAULTS[name]}
            elif name in JUMPS:
                leads = first == {vm.symbol(JUMPS[name])}
            elif name == "t_branch":
                leads = first == {vm.symbol("t_loop"), vm.symbol("t_branch") + 2}
            elif name in {"t_ret", "t_iretq", "t_sysretq"}:
                leads = first == {{"t_ret": vm.symbol("t_call") + 5, "t_iretq": USER, "t_sysretq": USER + 7}[name]}
            else:
                leads = all(at < rip <= at + 9 for rip in first) and len(first) == (name not in OWN_INT3)
            if steps != expected * executions(name) or point.stats.hits != executions(name) or not leads:
                wrong[name] = (point.stats.hits, [(step, vm.symbolize(rip)) for step, rip in hits])
    assert wrong == {}
