"""What handlers are told, and what their verdicts do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import Verdict

if TYPE_CHECKING:
    from vmitap import Hit, Vm


def test_handlers_at_one_address_are_called_in_the_order_of_insertion(vm: Vm) -> None:
    called: list[int] = []
    for number in range(3):

        def handler(hit: Hit, number: int = number) -> None:
            called.append(number)

        vm.breakpoint("open_file", handler)
    result = vm.run(timeout=5, max_hits=3)
    assert (called, result.hits, result.py_calls) == ([0, 1, 2], 3, 3)


def test_what_is_no_verdict_is_a_type_error_with_its_hit(vm: Vm) -> None:
    bp = vm.breakpoint("open_file", lambda hit: 1)  # type: ignore[arg-type,return-value]
    with pytest.raises(vmitap.HandlerError) as caught:
        vm.run(timeout=5)
    assert isinstance(caught.value.error, TypeError)
    assert caught.value.hit.breakpoint is bp
    assert caught.value.__cause__ is caught.value.error


def test_an_error_in_a_handler_answers_the_vcpu_first(vm: Vm) -> None:
    def fails(hit: Hit) -> None:
        msg = "no"
        raise ValueError(msg)

    bp = vm.breakpoint("open_file", fails)
    for _ in range(2):
        with pytest.raises(vmitap.HandlerError, match="the handler at open_file raised ValueError: no"):
            vm.run(timeout=5)
    assert bp.stats.hits == 2


def test_what_is_no_exception_goes_on_as_it_is(vm: Vm) -> None:
    def interrupts(hit: Hit) -> None:
        raise KeyboardInterrupt

    vm.breakpoint("open_file", interrupts)
    with pytest.raises(KeyboardInterrupt):
        vm.run(timeout=5)
    assert vm.run(timeout=5, max_hits=0).reason == "max_hits"


def test_a_handler_that_takes_too_long_is_reported_and_its_verdict_carried_out(vm: Vm) -> None:
    def slow(hit: Hit) -> Verdict:
        time.sleep(0.02)
        return Verdict.pause()

    vm.breakpoint("open_file", slow, deadline=0.001)
    with pytest.raises(vmitap.DeadlineExceededError) as caught:
        vm.run(timeout=5)
    assert caught.value.elapsed > caught.value.deadline == 0.001


def test_steps_call_the_handler_again(vm: Vm) -> None:
    steps: list[tuple[int, int]] = []

    def handler(hit: Hit) -> Verdict | None:
        steps.append((hit.step, hit.address))
        if hit.step == 0:
            return Verdict.step(3)
        return Verdict.pause() if hit.step == 3 else None

    vm.breakpoint("open_file", handler)
    assert vm.run(timeout=5).reason == "paused"
    assert [step for step, _ in steps] == [0, 1, 2, 3]
    assert len({address for _, address in steps}) == 4


def test_a_function_can_be_left_at_once(vm: Vm) -> None:
    seen: list[int] = []

    def entered(hit: Hit) -> Verdict:
        back = hit.vm.read_u64(hit.regs.rsp)
        vm.breakpoint(back, lambda hit: seen.append(hit.regs.rax), key="back")
        return Verdict.return_from_function(0x1234)

    bp = vm.breakpoint("open_file", entered)
    vm.run(timeout=5, max_hits=1)
    bp.remove()
    vm.run(timeout=5, max_hits=1)
    assert seen == [0x1234]


def test_registers_can_be_set_by_verdict_and_through_the_hit(vm: Vm) -> None:
    seen: list[tuple[int, int]] = []

    def entered(hit: Hit) -> Verdict:
        seen.append((hit.regs.r10, hit.regs.r11))
        if len(seen) > 1:
            return Verdict.pause()
        hit.vm.set_registers(r11=0x77)
        return Verdict.set_registers(r10=0x55)

    # The function is a JMP to itself from now on.
    vm.write("open_file", b"\xeb\xfe")
    vm.breakpoint("open_file", entered)
    assert vm.run(timeout=5).reason == "paused"
    assert seen[1] == (0x55, 0x77)


def test_a_pause_keeps_the_vcpu_at_the_breakpoint(vm: Vm) -> None:
    vm.breakpoint("open_file", lambda hit: Verdict.pause())
    for _ in range(2):
        assert vm.run(timeout=5).reason == "paused"
        assert vm.registers(0).rip == vm.symbol("open_file")


@pytest.mark.parametrize("how", ["verdict", "hit.vm", "vm"])
def test_detach_in_a_handler_takes_effect_after_it(vm: Vm, how: str) -> None:
    def handler(hit: Hit) -> Verdict | None:
        if how == "verdict":
            return Verdict.detach()
        (hit.vm if how == "hit.vm" else vm).detach()
        assert not vm.closed
        assert len(hit.vm.read(hit.address, 4)) == 4
        return None

    vm.breakpoint("open_file", handler)
    assert vm.run(timeout=5).reason == "detached"
    assert vm.closed
    vm.detach()
    with pytest.raises(vmitap.StaleContextError):
        vm.run()


def test_hits_that_are_kept_stay_what_they_were(vm: Vm) -> None:
    seen: list[tuple[object, int, int, float]] = []
    kept: list[Hit] = []

    def looks(hit: Hit) -> None:
        facts = (hit.key, hit.regs.rsp, hit.address, hit.timestamp)
        seen.append(facts)
        # Some are kept and some are not, of both owners.
        if len(seen) % 3:
            kept.append(hit)

    for name in ("open_file", "check_licence"):
        vm.breakpoint(name, looks, key=f"{name} 1")
        vm.breakpoint(name, looks, key=f"{name} 2")
    vm.run(timeout=5, max_hits=40)
    expected = [facts for number, facts in enumerate(seen, 1) if number % 3]
    assert len({key for key, *_ in expected}) == 4
    assert [(hit.key, hit.regs.rsp, hit.address, hit.timestamp) for hit in kept] == expected


def test_another_handler_is_called_from_the_next_hit_on(vm: Vm) -> None:
    called: list[str] = []

    def first(hit: Hit) -> None:
        called.append("first")
        hit.breakpoint(lambda hit: called.append("second"))

    vm.breakpoint("open_file", first)
    vm.run(timeout=5, max_hits=3)
    assert called == ["first", "second", "second"]


def test_the_vm_of_a_hit_ends_with_its_handler(vm: Vm) -> None:
    kept: list[tuple[Hit, Vm]] = []
    vm.breakpoint("open_file", lambda hit: kept.append((hit, hit.vm)))
    vm.run(timeout=5, max_hits=1)
    ((hit, live),) = kept
    for use in (lambda: live.read_u8("open_file"), lambda: hit.vm, lambda: live.stats, lambda: live.run()):
        with pytest.raises(vmitap.StaleContextError):
            use()
    assert not vm.closed


def test_no_handler_is_called_from_inside_another(vm: Vm) -> None:
    errors: list[BaseException] = []

    def handler(hit: Hit) -> None:
        for call in (hit.vm.run, vm.run, vm.wait_event, lambda: next(vm.events())):
            with pytest.raises(vmitap.SessionBusyError) as caught:
                call()
            errors.append(caught.value)

    vm.breakpoint("open_file", handler)
    vm.run(timeout=5, max_hits=1)
    assert len(errors) == 4


def test_breakpoints_come_and_go_inside_a_handler(vm: Vm) -> None:
    def handler(hit: Hit) -> None:
        hit.breakpoint.remove()
        vm.breakpoint("check_licence", key="new")

    bp = vm.breakpoint("open_file", handler)
    result = vm.run(timeout=5, max_hits=2)
    assert (bp.state, bp.stats.hits, result.hits) == ("removed", 1, 2)


def test_a_detach_at_an_event_that_was_paused_before_is_the_last_thing_that_happens(vm: Vm) -> None:
    called: list[str] = []

    def first(hit: Hit) -> Verdict:
        called.append("first")
        return Verdict.pause()

    def second(hit: Hit) -> Verdict:
        called.append("second")
        return Verdict.detach()

    for handler in (first, second):
        vm.breakpoint("open_file", handler)
    assert vm.run(timeout=5).reason == "paused"
    assert vm.run(timeout=5).reason == "detached"
    assert called == ["first", "second"]
