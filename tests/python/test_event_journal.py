"""The journal of events: what a killed session leaves of itself, and what the command line shows of that."""

from __future__ import annotations

import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import Arg, EventJournalError, Filter, InvalidArgumentError
from vmitap.cli import exits

if TYPE_CHECKING:
    from pathlib import Path

    from vmitap import Vm

CALLS = "mode=calls calls={} check=0"


def vmitap_command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-m", "vmitap", *words], capture_output=True, text=True, timeout=120)


def killed(script: str, *arguments: object) -> None:
    """Runs a script that kills itself."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_the_event_a_killed_tool_was_at_is_the_last_one_and_the_counts_are_right(tmp_path: Path) -> None:
    path, told = tmp_path / "last.events", tmp_path / "told"
    killed(
        """
        import os, signal, sys, vmitap
        from vmitap import Arg
        calls = 0
        def handler(hit):
            global calls
            calls += 1
            if calls == 100:
                # How many events there were, as this process knows it.
                open(sys.argv[2], "w").write(f"{vm.stats.events} {vm.stats.hits} {hit.timestamp}")
                os.kill(os.getpid(), signal.SIGKILL)
        with vmitap.attach("demo") as vm:
            vm.journal.open(sys.argv[1], events=1 << 20)
            vm.breakpoint("open_file", where=Arg(1) == 0x7fff)
            vm.breakpoint("read_file")
            vm.breakpoint("open_file", handler, key="mine")
            vm.run(timeout=100)
        """,
        path,
        told,
    )
    events, hits, timestamp = told.read_text().split()
    contents = vmitap.read_journal(path)
    assert (contents.closed, contents.torn, contents.room) == (False, 0, 1 << 20)
    assert contents.total == len(contents) == int(events)
    last = contents.events[-1]
    assert (last.outcome, last.symbol, last.breakpoint, last.number) == ("handling", "open_file", 2, int(events))
    assert 0 <= float(timestamp) - last.timestamp < 0.1
    outcomes = [event.outcome for event in contents.events]
    assert outcomes.count("handled") == 99
    counted = [event for event in contents.events if event.outcome == "counted"]
    assert len(counted) == int(hits) - 100
    assert {event.symbol for event in counted} == {"read_file"}
    assert [event.number for event in contents.events] == list(range(1, int(events) + 1))
    times = [event.timestamp for event in contents.events]
    assert times == sorted(times)


def test_a_tool_that_is_killed_at_any_moment_leaves_a_journal_that_can_be_read(tmp_path: Path) -> None:
    # No handler: hits come as fast as they can, and the kill lands anywhere, in the middle of a write too.
    script = """
        import sys, vmitap
        from vmitap import Arg
        with vmitap.attach("demo", cmdline="mode=calls calls=100000000 check=0") as vm:
            vm.journal.open(sys.argv[1], events=50)
            vm.breakpoint("open_file", where=Arg(1) & 1 << 32 != 0)
            print("runs", flush=True)
            vm.run(timeout=100)
    """
    totals = []
    for turn in range(5):
        path = tmp_path / f"{turn}.events"
        with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), path], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "runs\n"
            # Also while it is written it can be read.
            deadline = time.monotonic() + 60
            while vmitap.read_journal(path).total < 20_000 * (turn + 1):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            child.kill()
        contents = vmitap.read_journal(path)
        totals.append(contents.total)
        assert contents.torn in (0, 1)
        assert len(contents) + contents.torn == 50
        numbers = [event.number for event in contents.events]
        assert numbers == list(range(contents.total - 49, contents.total - 49 + len(numbers)))
        # Every other call passes, and the last event may be in hand.
        *answered, last = [event.outcome for event in contents.events]
        assert set(answered) == {"filtered", "counted"}
        assert all(one != other for one, other in itertools.pairwise(answered))
        assert last in {"filtered", "counted", "held"}
    assert all(total >= 20_000 for total in totals)


def test_only_the_last_events_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "last.events"
    with vmitap.attach("demo", cmdline=CALLS.format(5000)) as vm:
        vm.breakpoint("open_file", where=Filter.every(10))
        journal = vm.journal.open(path, events=100)
        size = path.stat().st_size
        vm.run(timeout=60)
        assert (len(journal), journal.total, journal.path) == (100, vm.stats.events, str(path))
        assert journal.total >= 5000
        assert path.stat().st_size == size
    contents = vmitap.read_journal(path)
    assert (contents.closed, contents.target, contents.process) == (True, "demo", os.getpid())
    assert abs(contents.began - time.time()) < 60
    assert [event.number for event in contents.events] == list(range(contents.total - 99, contents.total + 1))
    assert sum(event.outcome == "counted" for event in contents.events) == 10
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_is_no_hit_is_in_it_too(tmp_path: Path) -> None:
    path = tmp_path / "last.events"
    with vmitap.attach("demo") as vm:
        vm.journal.open(path)
        vm.breakpoint("check_licence", lambda hit: vmitap.Verdict.step(2) if hit.step == 0 else None)
        vm.watch("files", 8, vmitap.Access.W)
        vm.run(timeout=20, max_hits=20)
        event = vm.wait_event(timeout=5)
        assert event is not None
        vm.respond(event, vmitap.VmiEventResponse.fast_single_step(vm.views.default))
    seen = {(event.reason, event.outcome) for event in vmitap.read_journal(path).events}
    assert {("breakpoint", "handled"), ("single-step", "handled"), ("memory-access", "answered")} <= seen
    assert any(outcome == "raw" for _, outcome in seen)
    access = next(event for event in vmitap.read_journal(path).events if event.reason == "memory-access")
    assert access.access is not None
    assert access.address is not None
    assert access.value is None


def test_a_journal_is_opened_once_and_a_file_that_is_there_is_kept(vm: Vm, tmp_path: Path) -> None:
    path = tmp_path / "last.events"
    path.write_text("of a crash")
    with pytest.raises(EventJournalError, match="a file is there already") as raised:
        vm.journal.open(path)
    assert (raised.value.path, raised.value.errno) == (str(path), 17)
    assert "replace" in raised.value.hint
    assert path.read_text() == "of a crash"
    assert (vm.journal.path, len(vm.journal), vm.journal.total) == (None, 0, 0)
    vm.journal.open(path, replace=True)
    with pytest.raises(InvalidArgumentError, match="one file at a time"):
        vm.journal.open(tmp_path / "other.events")
    vm.journal.close()
    vm.journal.close()
    vm.journal.open(tmp_path / "other.events").close()
    for wrong in (0, -1, 1 << 40, 1 << 70):
        with pytest.raises((InvalidArgumentError, OverflowError)):
            vm.journal.open(tmp_path / "third.events", events=wrong)
    with pytest.raises(TypeError):
        vm.journal.open(tmp_path / "third.events", events="many")  # type: ignore[arg-type]
    assert not (tmp_path / "third.events").exists()
    vm.detach()
    with pytest.raises(vmitap.StaleContextError):
        vm.journal.open(tmp_path / "third.events")


def test_a_full_disk_is_an_error_before_anything_is_mapped(vm: Vm, tmp_path: Path) -> None:
    # Later it would be a signal that ends the process: every byte of the file has its place from the beginning.
    script = """
        import resource, sys, vmitap
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        with vmitap.attach("demo") as vm:
            try:
                vm.journal.open(sys.argv[1])
            except vmitap.EventJournalError as error:
                print(error.errno)
            print(vm.run(timeout=20, max_hits=0).reason)
    """
    path = tmp_path / "last.events"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), path], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["27", "max_hits"]
    assert not path.exists()


def test_a_hostile_file_is_a_typed_error_and_one_line_on_the_command_line(tmp_path: Path) -> None:
    good = tmp_path / "good.events"
    with vmitap.attach("demo") as vm:
        vm.journal.open(good, events=4)
    data = good.read_bytes()
    for name, content, reason in (
        ("empty", b"", "does not begin"),
        ("undo", b"vmitap journal 1\n", "does not begin"),
        ("short", data[:-1], "cut off"),
        ("new", data[:16] + b"\x09" + data[17:], "version is 9"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(EventJournalError, match=reason):
            vmitap.read_journal(path)
        done = vmitap_command("journal", str(path))
        assert (done.returncode, done.stdout) == (exits.RECORDING, "")
        assert reason in done.stderr
        assert "Traceback" not in done.stderr
    with pytest.raises(EventJournalError) as raised:
        vmitap.read_journal(tmp_path / "nowhere")
    assert raised.value.errno == 2


def test_the_command_line_keeps_and_shows_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "last.events"
    words = ("trace", "open_file", "--where", "Arg(1) >> 32 == 1", "--journal", str(path), "--cmdline", CALLS.format(20))
    assert vmitap_command(*words).returncode == 0
    again = vmitap_command(*words)
    assert (again.returncode, again.stdout) == (exits.RECORDING, "")
    assert "--replace" in again.stderr
    assert vmitap_command(*words, "--replace").returncode == 0
    head, *events = map(json.loads, vmitap_command("journal", str(path), "--last", "15", "--json").stdout.splitlines())
    assert (head["target"], head["closed"], head["torn"], len(events)) == ("demo", True, 0, 15)
    assert events[-1]["number"] == head["total"]
    shown = map(json.loads, vmitap_command("journal", str(path), "--json").stdout.splitlines()[1:])
    assert [event["symbol"] for event in shown if event["outcome"] == "handled"] == ["open_file"] * 10
    lines = vmitap_command("journal", str(path)).stdout.splitlines()
    assert lines[0].split("\t") == ["event", "time", "vCPU", "reason", "place", "outcome"]
    assert any(line.endswith("breakpoint\topen_file\thandled") for line in lines)
    assert lines[-1].endswith("ended in order")


def test_names_of_a_guest_cannot_command_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "last.events"
    with vmitap.attach("demo") as vm:
        vm.journal.open(path, events=4)
        vm.breakpoint("open_file")
        vm.run(timeout=20, max_hits=1)
    data = bytearray(path.read_bytes())
    # The guest's name in the header, and the name of the first breakpoint.
    data[57:61] = b"\x1b[2J"
    data[4096 + 5 : 4096 + 9] = b"\x1b[2J"
    path.write_bytes(data)
    assert vmitap.read_journal(path).events[-1].symbol == "\x1b[2J_file"
    shown = vmitap_command("journal", str(path)).stdout
    assert "\x1b" not in shown
    assert "\\x1b[2J_file" in shown


def test_a_filter_that_keeps_a_hit_back_is_told_with_its_breakpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.events"
    with vmitap.attach("demo", cmdline=CALLS.format(3)) as vm:
        vm.journal.open(path)
        vm.breakpoint("open_file", where=Arg(1) == 1)
        vm.run(timeout=20)
    hits = [event for event in vmitap.read_journal(path).events if event.reason == "breakpoint"]
    assert [(event.outcome, event.symbol) for event in hits] == [("filtered", "open_file")] * 3


def test_what_a_predicate_says_is_what_became_of_the_hit(tmp_path: Path) -> None:
    path = tmp_path / "last.events"
    with vmitap.attach("demo", cmdline=CALLS.format(4)) as vm:
        vm.journal.open(path)
        vm.breakpoint("open_file", where=Filter.predicate(lambda hit: len(vmitap.read_journal(path)) % 2 == 0))
        vm.run(timeout=20)
    hits = [event for event in vmitap.read_journal(path).events if event.reason == "breakpoint"]
    assert {event.outcome for event in hits} == {"counted", "filtered"}
    assert len(hits) == 4
