"""Policies for writes that look at each write: composed of `OnWrite` and filters, and what is done with the writes of real code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import Access, Arg, Filter, InvalidArgumentError, Mem, OnWrite, Reg, WritePolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmitap import Hit, Vm

PHYSMAP = 0xFFFF_8880_0000_0000
"""Where the demo guest sees all of its memory (guests/demo/kernel.h)."""
YES = Filter.ring(0)
NO = Filter.ring(3)
UNKNOWN = Mem(0x10) == 1
WRITES = 6


def writes(vm: Vm) -> int:
    """Makes the guest store 1 to 6 over a byte 0x80 behind the entry of a function, one after the other, and spin; returns where."""
    target = vm.symbol("open_file+0x80")
    alias = (PHYSMAP + vm.translate(target)).to_bytes(8, "little")
    # MOV RAX, imm64; MOV BYTE PTR [RAX], n; ...; JMP to itself
    stores = b"".join(bytes((0xC6, 0x00, n)) for n in range(1, WRITES + 1))
    vm.write("open_file", b"\x48\xb8" + alias + stores + b"\xeb\xfe")
    vm.write_u8(target, 0x90)
    return target


# What became of the byte, whether the breakpoint is there, and how many writes were asked about.
CASES = [
    (YES, (WRITES, "active", 0)),
    (NO, (0x90, "active", 0)),
    (UNKNOWN, (0x90, "active", 0)),
    (~UNKNOWN, (0x90, "active", 0)),
    (YES & NO, (0x90, "active", 0)),
    (YES | NO, (WRITES, "active", 0)),
    (NO | UNKNOWN | YES, (WRITES, "active", 0)),
    (OnWrite.REMOVE & YES, (WRITES, "removed", 0)),
    (OnWrite.REMOVE & NO, (0x90, "active", 0)),
    (OnWrite.REMOVE | YES, (WRITES, "active", 0)),
    (OnWrite.REMOVE | NO, (WRITES, "removed", 0)),
    (OnWrite.DENY & YES, (0x90, "active", 0)),
    (OnWrite.DENY | NO, (0x90, "active", 0)),
    (OnWrite.DENY | YES, (WRITES, "active", 0)),
    (OnWrite.REAPPLY & YES & YES, (WRITES, "active", 0)),
    (OnWrite.REAPPLY & YES & NO, (0x90, "active", 0)),
    ((OnWrite.DENY | YES) & NO, (0x90, "active", 0)),
    (OnWrite.DENY & YES | YES, (WRITES, "active", 0)),
    # What is asked about is denied here.
    (OnWrite.ASK | ~(Reg.rip == 0), (WRITES, "active", 0)),
    (OnWrite.ASK & YES, (0x90, "active", WRITES)),
    (OnWrite.ASK & NO, (0x90, "active", 0)),
]


@pytest.mark.parametrize(("policy", "expected"), CASES, ids=lambda value: repr(value) if not isinstance(value, tuple) else "")
def test_a_write_is_followed_if_its_policy_follows(policy: Filter | WritePolicy, expected: tuple[int, str, int], vm: Vm) -> None:
    target = writes(vm)
    asked: list[Hit] = []

    def ask(hit: Hit) -> OnWrite:
        asked.append(hit)
        return OnWrite.DENY

    bp = vm.breakpoint(target, on_write=policy, ask=ask if "ASK" in repr(policy) else None)
    result = vm.run(timeout=0.2)
    assert (vm.read_u8(target), bp.state, len(asked)) == expected
    assert result.py_calls == len(asked)
    faults = WRITES if "Mem" in repr(policy) else 0
    assert bp.stats.filter_faults == faults


def test_each_write_is_looked_at_once_and_by_where_it_is_done(vm: Vm) -> None:
    target = writes(vm)
    # The first, third and fifth; of these the ones behind the first instruction: 3 and 5.
    policy = OnWrite.REAPPLY & Filter.every(2) & (Reg.rip > vm.symbol("open_file+10"))
    vm.breakpoint(target, on_write=policy)
    vm.run(timeout=0.2)
    assert vm.read_u8(target) == 6
    assert vm.stats.hidden_writes == WRITES


@pytest.mark.parametrize(
    ("policy", "last"),
    [
        (Filter.every(4), 5),  # the first and the fifth
        (Filter.once(), 1),
        (~Filter.once(), WRITES),
        (OnWrite.REAPPLY & Filter.once(), 1),
        ((OnWrite.DENY | Filter.ring(3)) & Filter.every(2) | Filter.once(), 1),
    ],
    ids=repr,
)
def test_what_counts_counts_each_write_once(policy: Filter | WritePolicy, last: int, vm: Vm) -> None:
    target = writes(vm)
    vm.breakpoint(target, on_write=policy)
    vm.run(timeout=0.2)
    assert vm.read_u8(target) == last


def test_a_write_beside_the_breakpoint_is_nobodys_business(vm: Vm) -> None:
    target = writes(vm)
    beside = vm.breakpoint(target + 1, on_write=Filter.once() & NO)
    vm.run(timeout=0.2)
    assert (vm.read_u8(target), beside.state) == (WRITES, "active")


def test_of_several_breakpoints_under_a_write_one_that_denies_is_enough(vm: Vm) -> None:
    target = writes(vm)
    vm.breakpoint(target, on_write=YES)
    vm.breakpoint(target, on_write=OnWrite.REMOVE & NO, key="other")
    vm.run(timeout=0.2)
    assert vm.read_u8(target) == 0x90


@pytest.fixture(scope="module")
def store_guest(build_guest: Callable[..., str]) -> str:
    return build_guest("policy.S")


# Where it begins, bytes of a round, rounds (0: no string instruction), where the breakpoint is, and whether the store is over it.
STORES = [
    (0x0FE, 4, 0, 0x100, True),
    (0x0FC, 4, 0, 0x100, False),
    (0x101, 4, 0, 0x100, False),
    (0xFFD, 8, 0, 0x1000, True),
    (0xFFD, 8, 0, 0x1005, False),
    (0xFFC, 8, 0, 0xFFF, True),
    (0x0F0, 1, 32, 0x100, True),
    (0x0F0, 1, 16, 0x100, False),
]


@pytest.mark.parametrize("vcpu", [0, 1])
@pytest.mark.parametrize(("at", "size", "rounds", "tapped", "is_over"), STORES)
def test_a_store_of_either_vcpu_follows_the_policy_of_the_bytes_it_is_over(
    store_guest: str, at: int, size: int, rounds: int, tapped: int, is_over: bool, vcpu: int
) -> None:
    length = size * max(rounds, 1)
    cases: list[tuple[OnWrite | WritePolicy, OnWrite | None]] = [
        (OnWrite.REAPPLY, None),
        (OnWrite.REMOVE, None),
        (OnWrite.DENY, None),
        (OnWrite.DENY | Filter.vcpu(1 - vcpu), None),
        (OnWrite.REMOVE & Filter.vcpu(vcpu), None),
        (OnWrite.ASK, OnWrite.REMOVE),
        (OnWrite.ASK, OnWrite.DENY),
    ]
    for policy, answer in cases:
        asked: list[tuple[int, Access]] = []

        def ask(hit: Hit, asked: list[tuple[int, Access]] = asked, answer: OnWrite | None = answer) -> OnWrite:
            asked.append((hit.vcpu, hit.access))
            return answer or OnWrite.REAPPLY

        cmdline = f"at={at} size={size} rounds={rounds} by={vcpu}"
        with vmitap.attach(store_guest, memory=8 << 20, vcpus=2, cmdline=cmdline) as vm:
            area = vm.symbol("area")
            # Both pages are hidden.
            hiding = [vm.breakpoint(area + 8), vm.breakpoint(area + 0x1FF8)]
            bp = vm.breakpoint(area + tapped, on_write=policy, ask=ask if answer else None)
            assert vm.run(timeout=60).reason == "idle"
            said = repr(answer or policy)
            stored = not (is_over and "DENY" in said)
            removed = is_over and "REMOVE" in said
            expected = bytes(0xF8 if stored and at <= n < at + length else 0x90 for n in range(0x1FFF))
            assert vm.read(area, 0x1FFF) == expected, said
            assert (bp.state, bp.stats.hits) == (("removed", 0) if removed else ("active", 1)), said
            assert asked == ([(vcpu, Access.W)] if is_over and answer else []), said
            assert [other.stats.hits for other in hiding] == [1, 1]
            assert vm.stats.removed_by_write == removed


def test_many_breakpoints_have_policies_of_their_own_state(vm: Vm) -> None:
    target = writes(vm)
    vm.insert_many([target, target + 8], on_write=Filter.once())
    vm.run(timeout=0.2)
    assert vm.read_u8(target) == 1


READS = 6
BEYOND = Mem((1 << 64) - 4) == 1
FIRST, LAST = Reg.rdx == 0, Reg.rdx == READS - 1
# Which of the reads, numbered in RDX, a policy lets through.
OF_READS: list[tuple[Filter, list[int]]] = [
    (YES, [0, 1, 2, 3, 4, 5]),
    (NO, []),
    (~NO, [0, 1, 2, 3, 4, 5]),
    (FIRST & LAST, []),
    (FIRST | LAST, [0, 5]),
    (~FIRST & ~LAST, [1, 2, 3, 4]),
    (~(FIRST | LAST), [1, 2, 3, 4]),
    (~(FIRST & YES) | NO, [1, 2, 3, 4, 5]),
    (~FIRST & Filter.every(2), [1, 3, 5]),
    (NO | Filter.every(4), [0, 4]),
    (FIRST | Filter.once(), [0, 1]),
    (BEYOND & YES, []),
    (BEYOND | LAST, [5]),
    (~(BEYOND & LAST) & YES, [0, 1, 2, 3, 4]),
]


def test_a_read_counts_if_its_policy_lets_it(vm: Vm) -> None:
    spot, data = vm.registers().rip, vm.symbol("boot_copy")
    # XOR EDX, EDX; again: MOV RCX, [RBX + 8 * RDX]; INC EDX; CMP EDX, READS; JB again; JMP to itself
    vm.write(spot, b"\x31\xd2\x48\x8b\x0c\xd3\xff\xc2\x83\xfa" + bytes((READS,)) + b"\x72\xf5\xeb\xfe")
    vm.set_registers(0, rbx=data)
    points = [
        vm.watch(data, 8 * READS, vmitap.Access.R, where=policy, capture={str(number): Reg.rdx}, key=number)
        for number, (policy, _) in enumerate(OF_READS)
    ]
    writes = vm.watch(data, 8 * READS, vmitap.Access.W, where=YES | NO, key="writes")
    vm.breakpoint(spot + 13, lambda hit: vmitap.Verdict.pause())
    assert vm.run(timeout=20).reason == "paused"
    table = vm.recording.to_arrow()
    for number, (policy, expected) in enumerate(OF_READS):
        assert table[str(number)].drop_null().to_pylist() == expected, policy
        stats = points[number].stats
        assert (stats.hits, stats.filtered) == (len(expected), READS - len(expected)), policy
    assert [point.stats.filter_faults for point in points] == [READS if "Mem" in repr(policy) else 0 for policy, _ in OF_READS]
    assert (writes.stats.hits, writes.stats.filtered) == (0, 0)


def test_a_policy_is_a_filter_for_hits_too(vm: Vm) -> None:
    policy: vmitap.Policy = Filter.ring(3) | Filter.every(2)
    bp = vm.breakpoint("open_file", where=policy)
    vm.run(timeout=20, max_hits=5)
    assert (bp.stats.hits, bp.stats.filtered) == (5, 4)


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (lambda: OnWrite.ASK & 5, TypeError, r"OnWrite.ASK & 5: a Filter is needed"),  # type: ignore[operator]
        (lambda: OnWrite.ASK | OnWrite.DENY, TypeError, "a Filter is needed on the right side, not OnWrite"),  # type: ignore[operator]
        (lambda: bool(OnWrite.ASK & YES), TypeError, "no truth value"),
        (lambda: 5, TypeError, "on_write is a vmitap.OnWrite, a Filter, or both composed, not int"),
        (lambda: "deny", TypeError, "not str"),
        (lambda: Arg(0), TypeError, "not Arg"),
        (lambda: Filter.predicate(lambda hit: True), InvalidArgumentError, "with ask="),
        (lambda: OnWrite.ASK & YES, InvalidArgumentError, "needs a function to ask"),
    ],
)
def test_what_is_no_policy_is_refused_and_nothing_is_planted(
    policy: Callable[[], object], error: type[Exception], message: str, vm: Vm
) -> None:
    with pytest.raises(error, match=message):
        vm.breakpoint("open_file", on_write=policy())  # type: ignore[arg-type]
    with pytest.raises(error):
        vm.insert_many(["open_file"], on_write=policy())  # type: ignore[arg-type]
    assert len(vm.breakpoints) == 0
    with pytest.raises(InvalidArgumentError, match=r"goes with OnWrite\.ASK only"):
        vm.breakpoint("open_file", on_write=OnWrite.DENY | YES, ask=lambda hit: OnWrite.DENY)


def test_a_policy_prints_as_it_is_written() -> None:
    assert repr((OnWrite.ASK & (YES & ~NO)) | Filter.vcpu(1)) == "(OnWrite.ASK & (Filter.ring(0) & ~Filter.ring(3))) | Filter.vcpu(1)"
