"""The tool is killed while it taps a domain: its watchdog brings it back, and it comes to its end. By hand: test_kill.py."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

import vmitap
from demo_guest import begin, start_demo, symbols, truth
from domain import Start, attach, wait_for

CALLS = 2000
JOURNALS = Path("/run/vmitap")


def tool(stage: str, writer: int) -> None:
    """Says when it has come to the stage, and goes on until it is killed."""

    def reached() -> None:
        os.write(writer, b"!")

    vm = vmitap.attach("xen:demo")
    hits = 0
    if stage == "attached":
        reached()
        time.sleep(60)

    def each(_: vmitap.Hit) -> vmitap.Verdict | None:
        nonlocal hits
        hits += 1
        if hits == 20 and stage == "hits":
            reached()
        if stage == "held":
            reached()
            time.sleep(60)
        return vmitap.Verdict.step(3) if stage == "steps" else None

    first = vm.breakpoint(symbols()["open_file"], each)
    vm.breakpoint(symbols()["read_file"])
    begin(vm)
    if stage in ("steps", "paused", "removed"):
        vm.run(timeout=60, max_hits=5)
    if stage == "paused":
        with vm.pause():
            reached()
            time.sleep(60)
    if stage == "removed":
        first.remove()
    if stage in ("steps", "removed"):
        reached()
    vm.run(timeout=60)


def kill_a_tool(stage: str) -> None:
    reader, writer = os.pipe()
    # A watchdog that kept it open would keep this process waiting for a tool that is dead.
    os.set_inheritable(writer, False)
    child = os.fork()
    if child == 0:
        try:
            tool(stage, writer)
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


# By hand all of them are tried, and more: test_kill.py.
LONG = [pytest.param(stage, marks=pytest.mark.long) for stage in ("attached", "steps", "paused", "removed")]


@pytest.mark.parametrize("stage", ["hits", "held", *LONG])
@pytest.mark.seconds(2.5)
def test_the_watchdog_brings_a_domain_back_whose_tool_was_killed(start: Start, stage: str) -> None:
    guest = start_demo(start, f"mode=calls calls={CALLS} parts=1 callers=1")
    # A test that failed may have left one.
    before = set(JOURNALS.glob("*"))
    kill_a_tool(stage)
    assert set(JOURNALS.glob("*")) - before
    wait_for("the watchdog", lambda: not set(JOURNALS.glob("*")) - before, limit=60)
    with attach("xen:demo") as vm:
        begin(vm)
    wait_for("the guest's verdict", lambda: "integrity:" in guest.console, limit=60)
    assert ", 0 mismatches" in guest.console
    with attach("xen:demo") as vm:
        assert truth(vm).calls["open_file"] == CALLS * guest.vcpus
