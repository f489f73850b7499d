"""The tool dies by SIGKILL at calls of Xen's libraries from the first to the last of a session: each time the guest is brought back, and
goes on to the end of its turn. One guest for all of them, as nothing is left in it.
"""

from __future__ import annotations

import mmap
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vmitap
from demo_guest import begin, start_demo, symbols, truth
from domain import Start, attach, wait_for
from faults import KILL_AFTER, KILL_BEFORE, NOTHING, arm, between, state
from outside import Outside
from xentrace import table

if TYPE_CHECKING:
    from collections.abc import Callable

STAGES = ("attach", "insert", "hit", "step", "remove", "detach")
# Calls of the tapped function by each vCPU in one turn: more than the session has hits of.
TURN = 12
# How often it dies in each.
POINTS = {"attach": 8, "insert": 10, "hit": 8, "step": 6, "remove": 8, "detach": 10}
JOURNALS = Path("/run/vmitap")


def session(turn: int, reached: Callable[[str], None]) -> None:
    """Everything that changes a domain."""
    verdicts: list[vmitap.Verdict | None] = [None]
    reached("attach")
    vm = attach("xen:demo")
    reached("insert")
    first = vm.breakpoint(symbols()["open_file"], lambda hit: verdicts[0] if hit.step == 0 else None)
    second = vm.breakpoint(symbols()["read_file"])
    watch = vm.watch(symbols()["truth"] + 0xF00, 8, vmitap.Access.W)
    other = vm.views.create()
    vm.breakpoint(symbols()["open_file"], view=other)
    reached("hit")
    begin(vm, turn)
    vm.run(timeout=5, max_hits=4)
    reached("step")
    verdicts[0] = vmitap.Verdict.step(3)
    vm.run(timeout=5, max_hits=3)
    reached("remove")
    with vm.pause():
        second.remove()
    watch.remove()
    first.remove()
    vm.views.switch_to(other)
    vm.run(timeout=0.01)
    reached("detach")
    vm.detach()


def died(turn: int, reached: Callable[[str], None]) -> bool:
    """Runs a session in a process of its own."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            session(turn, reached)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def calls_of_stages() -> dict[str, int]:
    """How many calls each stage of a session has, from the guest's first turn."""
    begins = memoryview(mmap.mmap(-1, 8 * len(STAGES))).cast("q")

    def reached(stage: str) -> None:
        begins[STAGES.index(stage)] = state().calls

    arm(NOTHING, 0)
    assert not died(1, reached)
    ends = [*begins[1:], state().calls]
    return {stage: end - begin for stage, begin, end in zip(STAGES, begins, ends, strict=True)}


@pytest.mark.seconds(10)
def test_a_tool_that_dies_at_any_call_leaves_a_guest_that_can_be_brought_back(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    turns = 1 + sum(POINTS.values())
    guest = start_demo(start, f"mode=calls calls={TURN * turns} paced={TURN} parts=1 callers=1")

    outside = Outside(guest)

    def is_over(turn: int) -> bool:
        return outside.truth().calls["open_file"] == TURN * turn * guest.vcpus

    deaths: dict[str, list[str]] = {stage: [] for stage in STAGES}
    repairs = 0
    # A test that failed may have left one.
    before = set(JOURNALS.glob("*.journal"))
    with between():
        calls = calls_of_stages()
        arm(NOTHING, 0)
        wait_for("the guest's first turn", lambda: is_over(1))
        points = [(stage, 1 + calls[stage] * n // count) for stage, count in POINTS.items() for n in range(count)]
        for turn, (stage, at) in enumerate(points, start=2):

            def reached(now: str, stage: str = stage, at: int = at, turn: int = turn) -> None:
                if now == stage:
                    arm(KILL_AFTER if turn % 2 else KILL_BEFORE, at)

            if died(turn, reached):
                deaths[stage].append(state().last.decode())
            arm(NOTHING, 0)
            # Before the first change there is no journal, and nothing to be repaired.
            if set(JOURNALS.glob("*.journal")) - before:
                with pytest.raises(vmitap.AttachError, match="killed"):
                    attach("xen:demo")
                assert vmitap.repair("xen:demo") is not None, (stage, at)
                repairs += 1
            assert vmitap.repair("xen:demo") is None
            outside.begin(turn)
            wait_for(f"turn {turn}, after a death at call {at} of {stage}", lambda turn=turn: is_over(turn))  # type: ignore[misc]
    rows: list[tuple[object, ...]] = [(stage, calls[stage], len(deaths[stage]), ", ".join(sorted(set(deaths[stage])))) for stage in STAGES]
    with capsys.disabled():
        print(table("a tool that dies", ["while it comes to", "calls", "deaths", "at"], rows))
    assert repairs >= 40
    assert min(map(len, deaths.values())) >= 5
    with attach("xen:demo") as vm:
        begin(vm, turns)
    wait_for("the guest's verdict", lambda: "integrity:" in guest.console, limit=60)
    assert ", 0 mismatches" in guest.console
    with attach("xen:demo") as vm:
        assert truth(vm).calls["open_file"] == TURN * turns * guest.vcpus
