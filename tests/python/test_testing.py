"""What users test their own handlers with."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import vmitap
from vmitap.testing import Answer, Breakpoint, Event, MockVm, Read, Step, Write, mock

DOCS = Path(__file__).parents[2] / "docs" / "testing.md"


def test_a_handler_is_called_with_the_registers_the_script_says(mock_vm: MockVm) -> None:
    seen = []

    def opened(hit: vmitap.Hit) -> None:
        seen.append((hit.vcpu, hit.args[0], hit.vm.read_cstr(hit.args[1]), hit.regs.rip))

    mock_vm.vm.breakpoint("open_file", opened)
    path = mock_vm.put(b"/etc/shadow\0")
    mock_vm.script([Breakpoint("open_file", regs={"rdi": 7, "rsi": path})])
    assert mock_vm.waiting == 1
    result = mock_vm.run()
    assert (result.reason, result.hits, result.py_calls, mock_vm.waiting) == ("idle", 1, 1, 0)
    assert seen == [(0, 7, "/etc/shadow", mock_vm.vm.symbol("open_file"))]
    assert mock_vm.answers == [Answer(0, "step", 0, mock_vm.vm.views.tap.id, {})]


def test_a_verdict_is_recorded_as_what_it_does(mock_vm: MockVm) -> None:
    verdicts = iter(
        [
            vmitap.Verdict.return_from_function(5),
            vmitap.Verdict.set_registers(rbx=9),
            vmitap.Verdict.step(1),
            vmitap.Verdict.continue_(),
        ]
    )
    steps = []

    def handler(hit: vmitap.Hit) -> vmitap.Verdict:
        steps.append(hit.step)
        return next(verdicts)

    mock_vm.vm.breakpoint("open_file", handler)
    mock_vm.script([Breakpoint("open_file", regs={"rbx": 1})] * 3 + [Step("open_file+1")])
    mock_vm.run()
    returned, changed, stepped, done = mock_vm.answers
    registers = mock_vm.vm.registers(0)
    assert returned.action == "continue"
    assert set(returned.registers) == {"rax", "rip", "rsp"}
    assert returned.registers["rax"] == 5
    assert changed == Answer(0, "step", 0, 1, {"rbx": 9})
    assert (stepped.action, done.action, done.view, steps) == ("reported-step", "continue", 1, [0, 0, 0, 1])
    assert registers.rip == mock_vm.vm.symbol("open_file+1")


def test_events_of_several_vcpus_and_places_go_to_their_owners() -> None:
    with mock(vcpus=3) as guest:
        first = guest.vm.breakpoint("open_file", key="first")
        second = guest.vm.breakpoint("open_file", key="second", root=guest.vm.registers(0).cr3)
        other = guest.vm.breakpoint("read_file")
        guest.script([Breakpoint("open_file", vcpu=2), Breakpoint("open_file", vcpu=1, regs={"cr3": 0x5000}), Breakpoint("read_file")])
        guest.run()
        assert (first.stats.hits, second.stats.hits, other.stats.hits) == (2, 1, 1)
        assert [answer.vcpu for answer in guest.answers] == [2, 1, 0]


def test_reads_and_writes_of_hidden_pages_follow_the_policies(mock_vm: MockVm) -> None:
    asked = []

    def ask(hit: vmitap.Hit) -> vmitap.OnWrite:
        asked.append(hit.regs.rip)
        return vmitap.OnWrite.DENY

    mock_vm.vm.breakpoint("open_file", on_write=vmitap.OnWrite.ASK, ask=ask)
    mock_vm.script([Read("open_file"), Write("open_file", rip="read_file", length=1), Write("open_file+9", length=1)])
    mock_vm.run()
    assert [answer.action for answer in mock_vm.answers] == ["emulate", "deny", "reported-step"]
    assert asked == [mock_vm.vm.symbol("read_file")]


def test_a_handler_that_raises_is_told_and_the_event_was_answered(mock_vm: MockVm) -> None:
    def broken(hit: vmitap.Hit) -> None:
        raise KeyError(hit.vcpu)

    mock_vm.vm.breakpoint("open_file", broken)
    mock_vm.script([Breakpoint("open_file")])
    with pytest.raises(vmitap.HandlerError) as caught:
        mock_vm.run()
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(mock_vm.answers) == 1


def test_what_a_script_cannot_mean_is_refused_and_the_rest_of_it_is_taken(mock_vm: MockVm) -> None:
    good = Breakpoint("open_file")
    wrongs: list[tuple[Event, type[Exception]]] = [
        (Breakpoint("opne_file"), vmitap.SymbolNotFoundError),
        (Breakpoint(0x10), vmitap.TranslationError),
        (Breakpoint("open_file", vcpu=1), vmitap.VcpuNotFoundError),
        (Breakpoint("open_file", regs={"eax": 1}), vmitap.InvalidArgumentError),
        (Breakpoint("open_file", regs={"rax": 1 << 64}), vmitap.InvalidArgumentError),
        (Read("open_file", length=4097), vmitap.InvalidArgumentError),
    ]
    for wrong, error in wrongs:
        before = mock_vm.waiting
        with pytest.raises(error):
            mock_vm.script([good, wrong, good])
        assert mock_vm.waiting == before + 1, wrong


def test_memory_for_arguments_ends_somewhere(mock_vm: MockVm) -> None:
    first = mock_vm.put(b"x" * 17)
    assert mock_vm.put(b"y") == first + 32
    assert mock_vm.vm.read(first, 33) == b"x" * 17 + bytes(15) + b"y"
    with pytest.raises(ValueError, match="no room"):
        mock_vm.put(bytes(1 << 20))


def test_the_image_is_in_memory_and_breakpoints_stay_hidden(mock_vm: MockVm) -> None:
    vm = mock_vm.vm
    with vmitap.attach("demo") as running:
        address = running.symbol("open_file")
        assert vm.symbol("open_file") == address
        before = running.read(address, 64)
    vm.breakpoint("open_file")
    assert vm.read(address, 64) == before
    assert before != bytes(64)


def test_it_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMITAP_LIBUNICORN", "/no/such/library")
    with pytest.raises(vmitap.AttachError):
        vmitap.attach("demo")
    with mock() as guest:
        assert (guest.vm.info.driver, guest.run().reason) == ("mock", "idle")


def test_an_image_that_does_not_fit_and_a_guest_that_is_not_there_are_refused() -> None:
    with pytest.raises(vmitap.AttachError, match="does not fit"):
        mock(memory=1 << 20)
    with pytest.raises(vmitap.AttachError):
        mock("emu:/no/such/guest.elf")
    with pytest.raises(vmitap.InvalidArgumentError):
        mock(vcpus=0)


def test_the_tests_of_the_documentation_pass_in_a_project_of_ones_own(tmp_path: Path) -> None:
    conftest, tests, failing = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    tmp_path.joinpath("conftest.py").write_text(conftest)
    tmp_path.joinpath("test_mine.py").write_text(tests)
    tmp_path.joinpath("test_failing.py").write_text(failing)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "3 passed" in done.stdout, done.stdout + done.stderr
