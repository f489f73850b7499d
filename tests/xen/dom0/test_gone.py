"""The domain goes away at any point of a session: one typed outcome, a prompt end, no flood in the log; and who did not go is left alone.

A domain that has only shut down (rebooted, suspended to be saved, crashed) is let go on afterwards, as if it had been brought back: what
the session did to it must be gone by then.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

import vmitap
from demo_guest import begin, start_demo, symbols
from domain import Domain, Start, attach, wait_for, xl
from faults import DESTROYED, NOTHING, RENAMED, SHUTDOWNS, arm, arm_end, between, end_domain, resume_domain, state
from outside import Outside

if TYPE_CHECKING:
    from collections.abc import Callable

STAGES = ("attach", "insert", "in hand", "step", "remove", "detach")
# In these the domain ends inside a handler; in the others at a call of Xen's libraries.
HANDLED = ("in hand", "step")
TURN = 12
PROMPT = 10
QUIET = 3
SMALL = 16  # MiB: several at a time
WAYS = {"destroy": DESTROYED, "rename": RENAMED, **SHUTDOWNS}


class Tries:
    """Goes on when something fails, as a tool does that wants to leave everything tidy."""

    def __init__(self) -> None:
        self.errors: list[vmitap.VmitapError] = []
        self.shutdowns: list[str] = []

    def __call__(self, what: Callable[[], object]) -> object | None:
        try:
            result = what()
        except vmitap.VmitapError as error:
            self.errors.append(error)
            return None
        if isinstance(result, vmitap.RunResult) and result.shutdown:
            assert result.reason == "idle"
            self.shutdowns.append(result.shutdown)
        return result


def session(turn: int, reached: Callable[[str], None]) -> Tries:
    """Everything that changes a domain, each once, whatever becomes of the domain."""
    do = Tries()
    verdicts: list[vmitap.Verdict | None] = [None]

    def handler(hit: vmitap.Hit) -> vmitap.Verdict | None:
        if hit.step == 0 and verdicts[0] is None:
            reached("in hand")
        if hit.step == 1:
            reached("step")
        return verdicts[0] if hit.step == 0 else None

    reached("attach")
    vm = do(lambda: attach("xen:demo"))
    if not isinstance(vm, vmitap.Vm):
        return do
    reached("insert")
    taps = [
        do(lambda: vm.breakpoint(symbols()["open_file"], handler)),
        do(lambda: vm.breakpoint(symbols()["read_file"])),
        do(lambda: vm.watch(symbols()["truth"] + 0xF00, 8, vmitap.Access.W)),
        do(vm.views.create),
    ]
    do(lambda: begin(vm, turn))
    do(lambda: vm.run(timeout=2 * PROMPT, max_hits=3))
    verdicts[0] = vmitap.Verdict.step(3)
    do(lambda: vm.run(timeout=2 * PROMPT, max_hits=6))
    reached("remove")
    for tap in taps:
        if isinstance(tap, vmitap.Breakpoint):
            do(tap.remove)
    # Long enough to notice what has happened; once more, if it happened meanwhile.
    for _ in range(2):
        if do.errors or do.shutdowns:
            break
        do(lambda: vm.run(timeout=0.6))
        if not state().done:
            break
    reached("detach")
    do(vm.detach)
    return do


def calls_of_stages() -> dict[str, int]:
    """How many calls each stage has, from a session in which nothing happens."""
    begins: dict[str, int] = {}

    def reached(stage: str) -> None:
        begins.setdefault(stage, state().calls)

    arm(NOTHING, 0)
    assert not session(1, reached).errors
    ends = [*list(begins.values())[1:], state().calls]
    return {stage: end - begin for (stage, begin), end in zip(begins.items(), ends, strict=True)}


class Ends:
    """Has the domain end in one stage of the next session: in the handler, or at a call so far into the stage."""

    def __init__(self, domid: int, way: int, stage: str, at: int) -> None:
        self.domid, self.way, self.stage, self.at = domid, way, stage, at
        self.is_done = False
        # Nobody is left to be told: it ends while the session does.
        self.is_late = stage == "detach"

    def __call__(self, stage: str) -> None:
        if stage == "detach" and self.is_done and self.stage not in HANDLED and not state().done:
            # A stage does not always have the same number of calls.
            self.is_late = True
        if stage != self.stage or self.is_done:
            return
        self.is_done = True
        if stage in HANDLED:
            end_domain(self.domid, self.way)
        else:
            arm_end(self.domid, self.way, self.at)


def run_one(turn: int, ends: Ends, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Tries:
    """A session in which the domain ends, and that makes no fuss about it."""
    caplog.clear()
    capfd.readouterr()
    arm(NOTHING, 0)
    begun = time.monotonic()
    done = session(turn, ends)
    what = f"{ends.stage} (call {ends.at}, {state().last.decode()}): {done.errors!r} {done.shutdowns!r}"
    took = time.monotonic() - begun
    arm(NOTHING, 0)
    assert ends.is_done, what
    assert took < PROMPT, f"{what}: {took} s"
    assert len(caplog.records) <= QUIET, f"{what}: {caplog.messages}"
    assert capfd.readouterr().err == "", what
    return done


def points_of(calls: dict[str, int], stage: str, points: int) -> list[int]:
    """Calls of a stage, evenly spread; a handler is one point."""
    return [0] if stage in HANDLED else [1 + calls[stage] * (2 * n + 1) // (2 * points) for n in range(points)]


def each(way: str, *stages: str) -> list[tuple[str, str]]:
    return [(way, stage) for stage in stages]


@pytest.mark.parametrize(
    ("ends", "points"),
    [
        pytest.param(each("suspend", "attach", "in hand", "step", "detach"), 1, marks=pytest.mark.seconds(5), id="suspended"),
        pytest.param(
            [("reboot", "insert"), ("crash", "remove"), *each("rename", "attach", "in hand")], 1, marks=pytest.mark.seconds(5), id="others"
        ),
        *[pytest.param(each(way, *STAGES), 8, marks=[pytest.mark.long, pytest.mark.seconds(35)]) for way in (*SHUTDOWNS, "rename")],
    ],
)
def test_a_domain_that_shuts_down_or_is_renamed_during_a_session_is_told_of_and_can_go_on(
    start: Start, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], ends: list[tuple[str, str]], points: int
) -> None:
    turns = 2 + len(ends) * points
    guest = start_demo(start, f"mode=calls calls={TURN * turns} paced={TURN} parts=1 callers=1")
    outside = Outside(guest)

    def is_over(turn: int) -> bool:
        return outside.truth().calls["open_file"] == TURN * turn * guest.vcpus

    caplog.set_level("INFO", "vmitap")
    turn = 1
    with between():
        calls = calls_of_stages()
        wait_for("the guest's first turn", lambda: is_over(1))
        for way, stage in ends:
            for at in points_of(calls, stage, points):
                turn += 1
                end = Ends(guest.domid, WAYS[way], stage, at)
                done = run_one(turn, end, caplog, capfd)
                if way == "rename":
                    refused = [error for error in done.errors if isinstance(error, vmitap.AttachError)]
                    assert done.errors == refused, stage
                    assert stage == "attach" or not refused
                    xl("rename", "renamed", guest.name)
                else:
                    assert done.errors == [], stage
                    assert set(done.shutdowns) == (set() if end.is_late else {way}), stage
                    assert vmitap.repair("xen:demo") is None
                    resume_domain(guest.domid)
                outside.begin(turn)
                wait_for(f"turn {turn}, after {way} in {stage} at call {at}", lambda: is_over(turn))  # noqa: B023
    outside.begin(turns)
    wait_for("the guest's verdict", lambda: "integrity:" in guest.console, limit=60)
    assert ", 0 mismatches" in guest.console


def is_gone(domid: int) -> bool:
    return all(domain.id != domid for domain in vmitap.xen_host().domains)


@pytest.mark.parametrize(
    ("stages", "points"),
    [
        pytest.param(("attach", "in hand", "step", "detach"), 1, marks=pytest.mark.seconds(5), id="some"),
        pytest.param(STAGES, 4, marks=[pytest.mark.long, pytest.mark.seconds(20)], id="each"),
    ],
)
def test_a_domain_that_is_destroyed_during_a_session_is_one_kind_of_error_and_the_next_one_is_left_alone(
    start: Start, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], stages: tuple[str, ...], points: int
) -> None:
    def new(name: str = "demo") -> Domain:
        return start_demo(start, f"mode=calls calls={3 * TURN} paced={TURN} parts=1 callers=1", vcpus=1, name=name, memory=SMALL)

    caplog.set_level("INFO", "vmitap")
    bystander = new("bystander")
    guest = new()
    with between():
        calls = calls_of_stages()
        for stage in stages:
            for at in points_of(calls, stage, points):
                end = Ends(guest.domid, DESTROYED, stage, at)
                done = run_one(2, end, caplog, capfd)
                kinds = {type(error) for error in done.errors}
                if stage == "attach":
                    (error,) = done.errors
                    assert isinstance(error, vmitap.AttachError | vmitap.DomainGoneError)
                elif not end.is_late:
                    assert kinds == {vmitap.DomainGoneError}, done.errors
                    # Told again in the same words.
                    assert len(set(map(str, done.errors))) == 1, done.errors
                else:
                    assert not kinds
                assert done.shutdowns == []
                # No mapping keeps it.
                wait_for(f"the end of the domain, after {stage}", lambda: is_gone(guest.domid))  # noqa: B023
                # Another one under the same name is another one.
                guest = new()
    for left in (guest, bystander):
        with attach(f"xen:{left.name}") as vm:
            assert len(list(vm.views)) == 2
        Outside(left).begin(3)
        wait_for("the verdict", lambda: "integrity:" in left.console, limit=60)  # noqa: B023
        assert ", 0 mismatches" in left.console


@pytest.mark.seconds(3)
def test_a_guest_that_its_toolstack_reboots_comes_back_as_another_which_the_session_does_not_touch(start: Start) -> None:
    guest = start_demo(start, f"mode=calls calls={2 * TURN} paced={TURN} parts=1", vcpus=1, memory=SMALL, managed=True)

    def reboot(hit: vmitap.Hit) -> None:
        end_domain(guest.domid, SHUTDOWNS["reboot"])

    def run_on(vm: vmitap.Vm) -> None:
        # What comes first: that it has shut down, or that xl destroys it, for which it needs the processor.
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert vm.run(timeout=20).shutdown == "reboot"
            time.sleep(0.05)
        pytest.fail("xl does not destroy a domain that has shut down to be started again")

    def other() -> int:
        return int(xl("domid", "demo", check=False) or guest.domid)

    try:
        with attach("xen:demo") as vm:
            vm.breakpoint(symbols()["open_file"], reboot)
            begin(vm)
            with pytest.raises(vmitap.DomainGoneError, match=r"it had shut down \(reboot\)"):
                run_on(vm)
            wait_for("the next domain", lambda: other() != guest.domid)
        guest.domid = other()
        with attach("xen:demo") as vm:
            tap = vm.breakpoint(symbols()["open_file"])
            begin(vm, 2)
            assert vm.run(timeout=20, max_hits=2 * TURN).reason == "max_hits"
            assert tap.stats.hits == 2 * TURN
        wait_for("the verdict", lambda: "integrity:" in guest.console, limit=60)
        assert ", 0 mismatches" in guest.console
    finally:
        xl("destroy", "demo", check=False)
