"""An unmodified Linux kernel: hits are what the guest itself counts, and its own code reads as it always did."""

import struct
import time

import pytest

import vmitap
from domain import Start, attach
from linux_guest import CALLS, TAPPED, TRUTH, address, start_linux

MAX_VCPUS = 8


def counters(vm: vmitap.Vm) -> dict[str, list[int]]:
    page = struct.unpack("<36Q", vm.read_pa(TRUTH, 8 * 36))
    assert page[0].to_bytes(8, "little") == b"vmtlinux"
    names = ("rounds", "calls", "checks", "mismatches")
    return {name: list(page[4 + MAX_VCPUS * n :][: vm.vcpus]) for n, name in enumerate(names)}


def work(vm: vmitap.Vm, rounds: int) -> dict[str, list[int]]:
    """Has every vCPU work up to that many rounds."""
    vm.write_pa(TRUTH + 16, rounds.to_bytes(8, "little"))
    end = time.monotonic() + 120
    while (seen := counters(vm))["rounds"] != [rounds] * vm.vcpus:
        assert time.monotonic() < end, (seen, vm.stats)
        vm.run(timeout=0.2)
    return seen


@pytest.mark.seconds(4)
def test_every_call_of_a_kernel_function_is_a_hit_and_linux_sees_nothing(start: Start) -> None:
    start_linux(start)
    paths = set()
    with attach("xen:linux") as vm:
        assert counters(vm)["calls"] == [0] * vm.vcpus
        tap = vm.breakpoint(address(TAPPED))
        seen = work(vm, 1)
        assert tap.stats.hits == sum(seen["calls"]) == CALLS * vm.vcpus
        assert min(seen["checks"]) > 0
        assert seen["mismatches"] == [0] * vm.vcpus
        assert vm.stats.hidden_reads > 0
        tap.remove()

        tap = vm.breakpoint(address(TAPPED), lambda hit: paths.add(hit.vm.read_cstr(hit.args[1])))
        vm.write_pa(TRUTH + 16, (2).to_bytes(8, "little"))
        assert vm.run(timeout=120, max_hits=5).reason == "max_hits"
        assert tap.stats.hits == 5
    assert paths == {"/nothing"}
