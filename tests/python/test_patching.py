"""A kernel that patches its own text, and a code generator, both through another mapping: tests/guests/poke.S, through Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import OnWrite

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 30


@pytest.fixture(scope="module")
def poke_guest(build_guest: Callable[..., str]) -> str:
    return build_guest("poke.S")


def attach(guest: str, vcpus: int) -> vmitap.Vm:
    return vmitap.attach(guest, memory=8 << 20, vcpus=vcpus, cmdline=f"n={ROUNDS}")


def assert_right(vm: vmitap.Vm) -> None:
    names = ("done", "wrong", "unlike")
    assert {name: vm.read_u64(name) for name in names} == {"done": 1, "wrong": 0, "unlike": 0}, vm.console


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_kernel_that_patches_its_text_and_a_code_generator_work_as_ever_and_stay_tapped(poke_guest: str, vcpus: int) -> None:
    with attach(poke_guest, vcpus) as plain:
        assert plain.run(timeout=60).reason == "idle"
        assert_right(plain)
        alone = [plain.read_u64(name) for name in ("site_calls", "int3_calls")]
    seen: list[int] = []
    with attach(poke_guest, vcpus) as vm:
        site, after = vm.breakpoint("site"), vm.breakpoint("site_ret")
        jit = vm.breakpoint("jit", lambda hit: seen.append(hit.vcpu))
        assert vm.run(timeout=60).reason == "idle"
        assert_right(vm)
        calls, int3s = vm.read_u64("site_calls"), vm.read_u64("int3_calls")
        assert (site.stats.hits, after.stats.hits) == (calls, calls)
        assert (jit.stats.hits, vm.read_u64("jit_calls"), seen) == (ROUNDS, ROUNDS, [0] * ROUNDS)
        # The guest's own INT3 at the byte that is tapped went to the guest each time.
        assert int3s >= 20
        assert vm.stats.reinjected == int3s
        assert vm.stats.hidden_writes > 70
        assert vm.stats.removed_by_write == 0
        assert [bp.state for bp in (site, after, jit)] == ["active"] * 3
        if vcpus == 1:
            assert [calls, int3s] == alone


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_string_store_that_comes_to_a_breakpoint_follows_its_policy(poke_guest: str, vcpus: int) -> None:
    """`rep movsb` begins five bytes before `jit_ret`, and leaves the byte as it is."""
    for policy, answer in [
        (OnWrite.REMOVE, None),
        (OnWrite.DENY, None),
        (OnWrite.ASK, OnWrite.REAPPLY),
        (OnWrite.ASK, OnWrite.REMOVE),
        (OnWrite.ASK, OnWrite.DENY),
    ]:
        asked: list[int] = []

        def ask(hit: vmitap.Hit, asked: list[int] = asked, answer: OnWrite | None = answer) -> OnWrite:
            asked.append(hit.vcpu)
            assert answer is not None
            return answer

        with attach(poke_guest, vcpus) as vm:
            bp = vm.breakpoint("jit_ret", on_write=policy, ask=ask if answer else None)
            assert vm.run(timeout=60).reason == "idle"
            said = answer or policy
            if said is OnWrite.DENY:
                assert (vm.read_u64("wrong"), vm.read_u64("unlike")) == (ROUNDS, 0)
            else:
                assert_right(vm)
            removed = said is OnWrite.REMOVE
            assert (bp.state, vm.stats.removed_by_write) == (("removed", 1) if removed else ("active", 0))
            # Every other round the second vCPU generates the code, from the first one on.
            writers = [n % 2 if vcpus == 2 else 0 for n in range(1, ROUNDS + 1)]
            assert asked == (writers[: 1 if removed else ROUNDS] if answer else [])
