"""Attaching to a domain, looking at it, and leaving it as it was."""

import pytest

import vmitap
from demo_guest import KERNEL_WINDOW, begin, start_demo, symbols, truth
from domain import VCPUS, Domain, Start, attach, wait_for


def text(vm: vmitap.Vm) -> bytes:
    first, last = (symbols()[name] - KERNEL_WINDOW for name in ("text_start", "text_end"))
    return vm.read_pa(first, last - first)


@pytest.fixture
def guest(start: Start) -> Domain:
    return start_demo(start, "mode=calls calls=100 parts=1")


@pytest.mark.parametrize("by", ["name", "number"])
def test_a_domain_is_attached_to_by_its_name_or_its_number(guest: Domain, by: str) -> None:
    with attach(f"xen:{guest.name if by == 'name' else guest.domid}") as vm:
        assert (vm.driver, vm.vcpus, vm.info.name) == ("xen", VCPUS, "demo")
        assert vm.info.memory_size >= 64 << 20
        assert vm.caps.views


def test_memory_and_registers_are_the_guests_own(guest: Domain) -> None:
    with attach("xen:demo") as vm:
        assert truth(vm).vcpus == VCPUS
        with vm.pause():
            assert vm.read(symbols()["truth"], 8) == b"vmttruth"
            assert vm.translate(symbols()["open_file"]) == symbols()["open_file"] - KERNEL_WINDOW
            for vcpu in range(VCPUS):
                registers = vm.registers(vcpu)
                assert symbols()["text_start"] <= registers.rip < symbols()["text_end"]
                assert registers.cpl == 0


def test_a_guest_that_was_attached_to_and_left_runs_on_as_if_nothing_had_been(guest: Domain) -> None:
    with attach("xen:demo") as vm:
        before = text(vm)
        vm.breakpoint(symbols()["open_file"])
        assert text(vm) == before
    with attach("xen:demo") as vm:
        assert text(vm) == before
        begin(vm)
    wait_for("the guest's verdict", lambda: "integrity:" in guest.console)
    assert ", 0 mismatches" in guest.console


def test_a_domain_that_is_not_there_is_an_error_with_a_hint() -> None:
    with pytest.raises(vmitap.AttachError, match="no domain has the name") as error:
        attach("xen:nobody")
    assert "vmitap list" in error.value.hint
