"""Calling conventions, on code a compiler made: handlers, filters, captures and return values find the same arguments."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Literal

import pytest

import vmitap
from vmitap import Arg, Reg, StaleContextError, TranslationError
from vmitap.testing import Breakpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmitap import Hit
    from vmitap.testing import MockVm

    Abi = Literal["sysv", "ms"]

FUNCTIONS: list[tuple[str, Abi]] = [("sysv_eight", "sysv"), ("ms_eight", "ms")]
CALLS = [(n, 2, 3, 4, 5, 6, 7, 8) for n in (1, 2, 3)]
"""What conventions.c calls each of them with."""


@pytest.fixture(scope="module")
def guest(build_guest: Callable[..., str]) -> str:
    return build_guest("conventions.S", "conventions.c")


@pytest.mark.parametrize(("function", "abi"), FUNCTIONS)
@pytest.mark.parametrize("of_session", [True, False])
def test_a_handler_sees_what_the_function_was_called_with(guest: str, function: str, abi: Abi, of_session: bool) -> None:
    seen: list[tuple[int, ...]] = []
    hits: list[Hit] = []

    def look(hit: Hit) -> None:
        assert tuple(hit.arg(n) for n in range(6)) == hit.args
        seen.append((*hit.args, hit.arg(6), hit.arg(7)))
        hits.append(hit)

    other: Abi = "ms" if abi == "sysv" else "sysv"
    with vmitap.attach(guest, abi=abi if of_session else other) as vm:
        vm.breakpoint(function, look, abi=None if of_session else abi)
        vm.run(timeout=20)
        assert seen == CALLS
        # The vCPU has gone on: the six are kept, the stack is not what it was.
        assert [hit.args for hit in hits] == [call[:6] for call in CALLS]
        assert [hit.arg(5) for hit in hits] == [6] * 3
        with pytest.raises(StaleContextError):
            hits[0].arg(6)
        for wrong in (-1, 64, 1 << 70):
            with pytest.raises((vmitap.InvalidArgumentError, OverflowError)):
                hits[0].arg(wrong)
    again = pickle.loads(pickle.dumps(hits[2]))
    assert (again.args, again.arg(4)) == (CALLS[2][:6], 5)
    with pytest.raises(StaleContextError):
        again.arg(7)


@pytest.mark.parametrize(("function", "abi"), FUNCTIONS)
def test_filters_captures_events_and_returns_see_the_same(guest: str, function: str, abi: Abi) -> None:
    with vmitap.attach(guest, abi=abi) as vm:
        names = {f"a{n}": Arg(n) for n in range(8)}
        bp = vm.breakpoint(function, where=(Arg(0) != 2) & (Arg(7) == 8), capture=names, on_return={"result": Reg.rax})
        hits = list(vm.events(bp, timeout=20))
        rows = [tuple(row[name] for name in names) for row in vm.recording.to_arrow().to_pylist()]
        results = vm.recording.to_arrow()["result"].to_pylist()
        expected = [call for call in CALLS if call[0] != 2]
        assert rows == expected
        assert [hit.args for hit in hits] == [call[:6] for call in expected]
        assert results == [sum(value * 10**place for place, value in enumerate(call)) for call in expected]
        assert (bp.stats.filtered, vm.stats.returns_lost) == (1, 0)
        assert vm.read_u64(function.replace("eight", "result")) == 87654323


def test_return_values_of_a_recursion_belong_to_their_calls(guest: str) -> None:
    with vmitap.attach(guest, abi="ms") as vm:
        vm.breakpoint("ms_deep", capture={"depth": Arg(0), "sum": Arg(4)}, on_return={"result": Reg.rax})
        vm.run(timeout=20)
        rows = [(row["depth"], row["sum"], row["result"]) for row in vm.recording.to_arrow().to_pylist()]
        # The innermost returns first.
        assert rows == [(0, 110, 110), (1, 109, 111), (2, 107, 112), (3, 104, 113), (4, 100, 114)]
        assert vm.read_u64("deep_result") == 114


def test_leaving_a_function_of_either_convention_leaves_its_caller_intact(guest: str) -> None:
    with vmitap.attach(guest) as vm:
        vm.breakpoint("sysv_eight", lambda hit: vmitap.Verdict.return_from_function(hit.arg(7) + hit.args[0]))
        vm.breakpoint("ms_eight", lambda hit: vmitap.Verdict.return_from_function(hit.arg(7) + hit.args[0]), abi="ms")
        assert vm.run(timeout=20).reason == "idle"
        assert (vm.read_u64("sysv_result"), vm.read_u64("ms_result"), vm.read_u64("deep_result")) == (11, 11, 114)


def test_predicates_see_them_too(guest: str) -> None:
    with vmitap.attach(guest, abi="ms") as vm:
        bp = vm.breakpoint("ms_eight", where=vmitap.Filter.predicate(lambda hit: hit.args[0] == 3 and hit.arg(6) == 7))
        vm.run(timeout=20)
        assert (bp.stats.hits, bp.stats.filtered) == (1, 2)


def test_a_stack_that_cannot_be_read_is_an_error_for_who_asks_for_it(mock_vm: MockVm) -> None:
    raised: list[TranslationError] = []

    def asks(hit: Hit) -> None:
        for ask in (lambda: hit.args, lambda: hit.arg(4), lambda: hit.arg(6)):
            with pytest.raises(TranslationError) as error:
                ask()
            raised.append(error.value)

    mock_vm.vm.breakpoint("check_licence", asks, abi="ms")
    sysv: list[tuple[int, ...]] = []
    mock_vm.vm.breakpoint("check_licence", lambda hit: sysv.append(hit.args), key="sysv")
    hits: list[Hit] = []
    mock_vm.vm.breakpoint("check_licence", hits.append, abi="ms", key="kept")
    mock_vm.script([Breakpoint("check_licence", regs={"rsp": 0x10, "r9": 8})])
    assert mock_vm.run().py_calls == 3
    assert [error.va for error in raised] == [0x38, 0x38, 0x48]
    assert sysv[0][5] == 8
    with pytest.raises(TranslationError):
        _ = hits[0].args
    with pytest.raises(StaleContextError):
        _ = pickle.loads(pickle.dumps(hits[0])).args


def test_trace_takes_the_convention(guest: str) -> None:
    words = ("trace", "ms_eight", guest, "--abi", "ms", "--args", "6", "--json")
    done = subprocess.run([sys.executable, "-m", "vmitap", *words], capture_output=True, text=True, timeout=60, check=True)
    hits = [json.loads(line) for line in done.stdout.splitlines()]
    assert [hit["args"] for hit in hits if "args" in hit] == [list(call[:6]) for call in CALLS]


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_call_that_never_returns_has_a_row_without_results_and_is_counted(vcpus: int) -> None:
    # Each vCPU ends in halt_forever. What calls open_file comes back, and so does a task that schedule has put aside for others, on
    # whichever vCPU; but for those that are aside when the guest ends.
    with vmitap.attach("demo", vcpus=vcpus, cmdline="rounds=3") as vm:
        opens = vm.breakpoint("open_file", capture={"n": Arg(0)}, on_return={"back": Reg.rax})
        switches = vm.breakpoint("schedule", on_return={"back": Reg.rax})
        ends = vm.breakpoint("halt_forever", on_return={"back": Reg.rax})
        assert vm.run(timeout=60).reason == "idle"
        assert (ends.stats.hits, vm.stats.returns_lost) == (vcpus, 0)

        def backs(symbol: str) -> list[object]:
            return [row["back"] for row in vm.recording.to_arrow().to_pylist() if row["symbol"] == symbol]

        assert len(backs("open_file")) == opens.stats.hits > 10
        assert 20 < len(backs("schedule")) < switches.stats.hits
        assert None not in backs("open_file") + backs("schedule")
        assert backs("halt_forever") == []
        ends.remove()
        assert (backs("halt_forever"), vm.stats.returns_lost) == ([None] * vcpus, vcpus)
        switches.remove()
        assert len(backs("schedule")) == switches.stats.hits
        opens.remove()
        # And the breakpoints at return addresses are gone.
        assert vm.stats.shadow_frames == 0
