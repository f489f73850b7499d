"""Injection as the guest has it: what its own handlers saw, and that nothing is injected where nothing was asked for."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal, TypedDict

import pytest

import vmitap

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmitap import Hit, Vm

ROUNDS = 10
UNMAPPED = 0x0000_7000_0000_0000


class Injection(TypedDict, total=False):
    vector: int
    kind: Literal["external", "exception", "software"]
    error_code: int
    cr2: int
    insn_len: int


@pytest.fixture(scope="module")
def guest(build_guest: Callable[..., str]) -> str:
    return build_guest("inject.S")


def word(vm: Vm, name: str, index: int = 0) -> int:
    return vm.read_u64(vm.symbol(name) + 8 * index)


def taken(vm: Vm) -> Counter[int]:
    """How often the guest took each vector."""
    counts = Counter({vector: word(vm, "exc_count", vector) for vector in range(256)})
    assert counts.total() == word(vm, "taken")
    return +counts


def finish(vm: Vm) -> None:
    """To the end of the guest, which did all its rounds whatever came between."""
    assert vm.run(timeout=20).reason == "idle"
    assert (word(vm, "done"), word(vm, "rounds"), vm.console) == (1, ROUNDS, "")


INJECTIONS: list[tuple[Injection, dict[str, int]]] = [
    # What it is, and what the guest finds: where from the tapped instruction on it was interrupted, and what it is told.
    ({"vector": 6}, {"at": 0}),
    ({"vector": 0, "kind": "exception"}, {"at": 0}),
    ({"vector": 13, "error_code": 0x18}, {"at": 0, "error": 0x18}),
    ({"vector": 14, "error_code": 6, "cr2": 0x1234_5678_9000}, {"at": 0, "error": 6, "cr2": 0x1234_5678_9000}),
    ({"vector": 0x41, "kind": "external"}, {"at": 0}),
    ({"vector": 3, "kind": "software", "insn_len": 1}, {"at": 1}),
    ({"vector": 0x80, "kind": "software", "insn_len": 2}, {"at": 2}),
]


@pytest.mark.parametrize(("injection", "found"), INJECTIONS, ids=lambda value: str(value.get("vector", "")))
def test_what_a_handler_injects_the_guest_takes_once_and_goes_on(guest: str, injection: Injection, found: dict[str, int]) -> None:
    seen: list[Hit] = []

    def third(hit: Hit) -> None:
        seen.append(hit)
        if len(seen) == 3:
            hit.vm.inject(**injection)

    with vmitap.attach(guest) as vm:
        bp = vm.breakpoint("spot", third)
        finish(vm)
        vector = injection["vector"]
        assert taken(vm) == {vector: 1}
        recorded = {name: word(vm, f"exc_{name}", vector) for name in ("rip", "error", "cr2", "cs", "rflags")}
        interrupted = seen[2].regs
        assert recorded["rip"] == bp.address + found["at"]
        assert (recorded["error"], recorded["cr2"], recorded["cs"]) == (found.get("error", 0), found.get("cr2", 0), interrupted.cs)
        # Its flags were those of the interrupted code, but for RF, and they came back: the carry that was set is seen behind it.
        assert recorded["rflags"] & ~(1 << 16) == interrupted.rflags & ~(1 << 16)
        assert word(vm, "rflags_after") & 1 == 1
        # An instruction that was interrupted before it is executed, and hit, once more.
        assert bp.stats.hits == len(seen) == ROUNDS + (found["at"] == 0)


def test_an_injection_between_two_runs_is_taken_by_the_next(guest: str) -> None:
    with vmitap.attach(guest) as vm:
        vm.breakpoint("spot")
        vm.run(timeout=20, max_hits=4)
        vm.inject(6)
        assert taken(vm) == {}
        finish(vm)
        assert taken(vm) == {6: 1}


def test_an_injection_is_for_the_vcpu_of_the_hit_or_for_the_one_that_is_named(guest: str) -> None:
    for named, expected in ((None, 1), (0, 0)):
        with vmitap.attach(guest, vcpus=2) as vm:
            # vCPU 0 is to be there still.
            vm.write(vm.symbol("spot"), b"\xeb\xfe")

            def once(hit: Hit, named: int | None = named) -> None:
                assert hit.vcpu == 1
                hit.vm.inject(0x41, kind="external", vcpu=named)

            bp = vm.breakpoint("ap_spot", once, once=True)
            while taken(vm) != {0x41: 1}:
                assert vm.run(timeout=0.1).reason == "timeout"
            assert (bp.stats.hits, word(vm, "taken_by")) == (1, expected)
            vm.write(vm.symbol("spot"), b"\x66\x90")
            finish(vm)
            assert taken(vm) == {0x41: 1}


def test_one_at_a_time_is_injected(guest: str) -> None:
    errors: list[vmitap.DriverError] = []

    def twice(hit: Hit) -> None:
        hit.vm.inject(6)
        with pytest.raises(vmitap.DriverError) as caught:
            hit.vm.inject(13, error_code=0)
        errors.append(caught.value)

    with vmitap.attach(guest) as vm:
        vm.breakpoint("spot", twice, once=True)
        finish(vm)
        assert [error.errno for error in errors] == [16]
        assert taken(vm) == {6: 1}


@pytest.mark.parametrize("caught", [True, False])
def test_a_translation_error_of_a_handler_is_no_fault_of_the_guest(guest: str, caught: bool) -> None:
    faults: list[vmitap.TranslationError] = []

    def asks(hit: Hit) -> None:
        for access in (lambda: hit.vm.read(UNMAPPED, 8), lambda: hit.vm.write(UNMAPPED, b"x"), lambda: hit.vm.read_cstr(1 << 47)):
            try:
                access()
            except vmitap.TranslationError as error:
                faults.append(error)
        if not caught:
            hit.vm.read_u64(UNMAPPED)

    with vmitap.attach(guest) as vm:
        bp = vm.breakpoint("spot", asks)
        for _ in range(0 if caught else ROUNDS):
            with pytest.raises(vmitap.HandlerError) as raised:
                vm.run(timeout=20)
            assert isinstance(raised.value.error, vmitap.TranslationError)
            assert raised.value.error.va == UNMAPPED
        finish(vm)
        assert bp.stats.hits == ROUNDS
        assert [error.va for error in faults] == [UNMAPPED, UNMAPPED, 1 << 47] * ROUNDS
        # Nothing was taken, by no vector, and CR2 is what it was.
        assert taken(vm) == {}
        assert {word(vm, "exc_cr2", vector) for vector in range(256)} == {vm.registers(0).cr2} == {0}
