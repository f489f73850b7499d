"""Breakpoints whose pages come and go, through Python: the session's own, and those of a loop of one's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import VmiEventResponse

if TYPE_CHECKING:
    from collections.abc import Callable

# The addresses of tests/guests/paging.S.
TARGET, FIRST, ROLE1, ROLE3 = 0x80_0020_5040, 0x80_0020_0040, 0x80_0060_0040, 0x100_0000_3040
UNMAPPED = 0x7000_0000_0000


@pytest.fixture(scope="module")
def paging_guest(build_guest: Callable[..., str]) -> str:
    return build_guest("paging.S")


def words(vm: vmitap.Vm, *names: str) -> list[int]:
    return [vm.read_u64(name) for name in names]


@pytest.mark.parametrize("vcpus", [1, 2])
def test_hits_are_the_calls_that_happened_while_the_page_was_mapped(paging_guest: str, vcpus: int) -> None:
    states: list[str] = []
    with vmitap.attach(paging_guest, memory=8 << 20, vcpus=vcpus) as vm:
        target, first, role1, role3 = vm.insert_many([TARGET, FIRST, ROLE1, ROLE3])
        assert {bp.state for bp in vm.breakpoints} == {"pending"}
        vm.breakpoint("mark", lambda hit: states.append(target.state))
        assert vm.run(timeout=60).reason == "idle"
        assert words(vm, "done", "wrong", "mismatches") == [1, 0, 0]
        made1, made2, made_first, made_role1, made_role3 = words(vm, "made_1", "made_2", "made_first", "made_role1", "made_role3")
        assert [bp.stats.hits for bp in (target, first, role1, role3)] == [made1 + made2, made_first, made_role1, made_role3]
        assert made1 > 30
        assert vm.stats.page_ins > 30
        assert vm.stats.page_outs > 30
        assert vm.stats.table_writes > 60
    assert (states[0], states[1], len(states), states[-1]) == ("pending", "active", 17, "pending")


def test_a_root_bound_breakpoint_sees_only_its_own_tables(paging_guest: str) -> None:
    with vmitap.attach(paging_guest, memory=8 << 20) as vm:
        bound: dict[str, vmitap.Breakpoint] = {}

        @vm.breakpoint("ready")
        def _(hit: vmitap.Hit) -> None:
            for name in ("root1", "root2", "root3"):
                bound[name] = hit.vm.breakpoint(TARGET, root=hit.vm.read_u64(name))

        vm.run(timeout=60)
        made1, made2 = words(vm, "made_1", "made_2")
        assert {name: bp.stats.hits for name, bp in bound.items()} == {"root1": made1, "root2": made2, "root3": 0}


def test_programs_of_the_demo_guest_are_tapped_before_there_are_any() -> None:
    with vmitap.attach("demo", cmdline="rounds=6") as vm:
        app, implant = vm.breakpoint("app_main"), vm.breakpoint("steal")
        logs = vm.breakpoint("write_log")
        assert vm.run(timeout=60).reason == "idle"
        assert (app.stats.hits, logs.stats.hits, implant.stats.hits > 0) == (1, 6, True)
        assert " checks, 0 mismatches" in vm.console


def test_an_unmapped_address_is_pending_and_costs_nothing_once_it_is_removed(vm: vmitap.Vm) -> None:
    root = vm.registers().root
    bp = vm.breakpoint(UNMAPPED, root=root)
    assert (bp.state, bp.enabled, repr(bp).endswith("pending>")) == ("pending", True, True)
    # The low addresses once more, from outside the guest.
    vm.write_pa(root + 224 * 8, vm.read_pa(root, 8))
    states = [bp.state]
    vm.write_pa(root + 224 * 8, bytes(8))
    states.append(bp.state)
    bp.disable()
    states.append(bp.state)
    bp.enable()
    states.append(bp.state)
    assert states == ["active", "pending", "disabled", "pending"]
    bp.remove()
    assert (bp.state, vm.stats.shadow_frames) == ("removed", 0)
    core = vmitap.VmiCore(vm)
    assert core.memory_access(root >> 12, vm.views.tap) == vmitap.Access.R | vmitap.Access.W | vmitap.Access.X


def test_the_example_of_the_page_about_paging_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "paging.md").read_text()
    example = re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert example
    subprocess.run([sys.executable, "-c", "import vmitap\n" + example[1]], check=True, timeout=60)


def test_a_watch_that_outlives_the_root_it_was_put_in_under_is_enabled_again(build_guest: Callable[..., str]) -> None:
    with vmitap.attach(build_guest("roots.S"), memory=8 << 20, cmdline="n=20") as vm:
        calls: list[vmitap.Breakpoint] = []

        @vm.breakpoint("f")
        def _(hit: vmitap.Hit) -> None:
            if not calls:
                calls.append(hit.vm.watch("f_calls", 8, vmitap.Access.W))
                calls[0].disable()
            elif vm_calls := hit.vm.read_u64("f_calls"):
                # The root of the first call is given up, and its pages hold something else.
                calls[0].enable() if vm_calls == 30 else None

        assert vm.run(timeout=60).reason == "idle"
        assert words(vm, "done", "wrong", "f_calls") == [1, 0, 60]
        assert calls[0].stats.hits == 30


def test_a_watch_needs_its_pages(vm: vmitap.Vm) -> None:
    with pytest.raises(vmitap.TranslationError):
        vm.watch(UNMAPPED, 8, vmitap.Access.W)


def test_a_loop_of_ones_own_follows_the_page_tables(paging_guest: str) -> None:
    with vmitap.attach(paging_guest, memory=8 << 20) as vm:
        controller = vmitap.BreakpointController(vm)
        manager = vmitap.BreakpointManager(vm, controller)
        monitor = vmitap.PageTableMonitor(vm, controller)
        view, default = vm.views.tap, vm.views.default
        step, look = VmiEventResponse.fast_single_step(default).in_view(view), VmiEventResponse.single_step(default)
        assert manager.insert(vm.symbol("ready"), vm.registers().root, view, key="ready", is_global=True)
        hits = 0
        kinds: list[str] = []
        while (event := vm.wait_event(timeout=60)) is not None:
            answer = step
            if manager.contains_by_event(event, "ready"):
                root = vm.read_u64("root1")
                assert manager.insert(TARGET, root, view, key="target", tag=[1])
                assert monitor.monitor(TARGET, root) is None
                assert (len(monitor), monitor.tables) == (1, 1)
            elif (found := manager.get_by_event(event, "target")) is not None:
                assert (found.address, found.tag, found.pa) == (TARGET, [1], event.pa)
                hits += 1
            elif event.reason == "breakpoint" and controller.is_breakpoint(event):
                answer = VmiEventResponse.reinject()
            elif event.reason == "single-step":
                told = monitor.process(event)
                kinds += [each.kind for each in told]
                assert all((each.address, each.root) == (TARGET, root) for each in told)
                manager.handle_page_table_events(told)
                answer = VmiEventResponse.continue_().in_view(view)
            elif monitor.mark_dirty(event):
                answer = look
            vm.respond(event, answer)
        assert words(vm, "done", "wrong", "mismatches") == [1, 0, 0]
        assert hits == vm.read_u64("made_1")
        assert kinds.count("page-in") == kinds.count("page-out") > 20
        assert [each.pa for each in manager if each.key == "target"] == [None]
        assert monitor.unmonitor(TARGET, root)
        assert not monitor.unmonitor(TARGET, root)
        assert (len(monitor), monitor.tables) == (0, 0)


def test_a_monitor_refuses_what_makes_no_sense(vm: vmitap.Vm) -> None:
    with pytest.raises(vmitap.DefaultViewError):
        vmitap.PageTableMonitor(vm, views=[vm.views.default])
    monitor = vmitap.PageTableMonitor(vm)
    with pytest.raises(vmitap.TranslationError):
        monitor.monitor(1 << 47, vm.registers().root)
    with vmitap.attach("demo") as other, pytest.raises(vmitap.InvalidArgumentError):
        vmitap.PageTableMonitor(vm, vmitap.BreakpointController(other))
    monitor.monitor(UNMAPPED, vm.registers().root)
    monitor.clear()
    assert monitor.tables == 0


def test_trace_says_what_waits_for_its_page(paging_guest: str) -> None:
    command = [sys.executable, "-m", "vmitap", "trace", hex(TARGET), "mark", paging_guest, "--count", "1"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, timeout=60)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0] == {"pending": [hex(TARGET)]}
    plain = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert f"{TARGET:#x}: not mapped yet" in plain.stdout + plain.stderr
