"""The tool is killed while it taps a domain: the domain is brought back, by the watchdog or by hand, and comes to its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vmitap
from demo_guest import begin, start_demo, truth
from domain import Start, wait_for

CALLS = 2000
JOURNALS = Path("/run/vmitap")
# Says how far it is, and goes on until it is killed.
TOOL = """
import sys, time
import vmitap
from demo_guest import begin, symbols
stage, watchdog = sys.argv[1], sys.argv[2] == "True"
def reached(name):
    if name == stage:
        print("reached", flush=True)
vm = vmitap.attach("xen:demo", watchdog=watchdog)
if stage == "attached":
    reached("attached")
    time.sleep(60)
hits = 0
def each(hit):
    global hits
    hits += 1
    if hits == 20:
        reached("hits")
    if stage == "held":
        reached("held")
        time.sleep(60)
    return vmitap.Verdict.step(3) if stage == "steps" else None
first = vm.breakpoint(symbols()["open_file"], each)
vm.breakpoint(symbols()["read_file"])
begin(vm)
if stage == "steps":
    vm.run(timeout=60, max_hits=5)
    reached("steps")
if stage == "paused":
    vm.run(timeout=60, max_hits=5)
    with vm.pause():
        reached("paused")
        time.sleep(60)
if stage == "removed":
    vm.run(timeout=60, max_hits=5)
    first.remove()
    reached("removed")
vm.run(timeout=60)
time.sleep(60)
"""


def kill_a_tool(stage: str, *, watchdog: bool) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", TOOL, stage, str(watchdog)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as tool:
        assert tool.stdout is not None
        assert tool.stdout.readline() == "reached\n"
        tool.kill()


@pytest.mark.parametrize("by", ["hand", "watchdog"])
@pytest.mark.parametrize("stage", ["attached", "hits", "held", "steps", "paused", "removed"])
def test_a_domain_whose_tool_was_killed_is_brought_back(start: Start, stage: str, by: str) -> None:
    guest = start_demo(start, f"mode=calls calls={CALLS} parts=1 callers=1")
    kill_a_tool(stage, watchdog=by == "watchdog")
    if by == "hand":
        with pytest.raises(vmitap.AttachError, match="killed"):
            vmitap.attach("xen:demo")
        assert vmitap.repair("xen:demo") is not None
        assert vmitap.repair("xen:demo") is None
    else:
        wait_for("the watchdog", lambda: not list(JOURNALS.iterdir()), limit=60)
    with vmitap.attach("xen:demo") as vm:
        begin(vm)
    wait_for("the guest's verdict", lambda: "integrity:" in guest.console, limit=60)
    assert ", 0 mismatches" in guest.console
    with vmitap.attach("xen:demo") as vm:
        assert truth(vm).calls["open_file"] == CALLS * guest.vcpus
