"""A session that another thread works on while the guest runs."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import Arg, Cstr, Filter, _native
from vmitap.cli.truth import READ_KINDS, Truth
from vmitap.testing import Breakpoint, mock

if TYPE_CHECKING:
    from vmitap.capture import Capturable

PAIRS = 10_000
JUMP_TO_ITSELF = b"\xeb\xfe"


def looks(vm: vmitap.Vm) -> int:
    """How often the second vCPU has read all code."""
    checks = Truth.read(vm).vcpu_checks
    return checks[1] if len(checks) > 1 else 0


def test_readers_see_nothing_of_ten_thousand_inserts_and_removes_by_another_thread() -> None:
    with vmitap.attach("demo", vcpus=2, cmdline="rounds=1000000") as vm:
        # The guest has taken its reference, and its second vCPU reads all the time.
        while looks(vm) == 0:
            assert vm.run(timeout=0.05).reason == "timeout"
        before = Truth.read(vm)
        assert all(before.golden.values())
        failed: list[BaseException] = []
        done = threading.Event()

        def work() -> None:
            try:
                pairs = 0
                planted: deque[vmitap.Breakpoint] = deque()
                # Until the guest has looked many times, however fast this thread is.
                while pairs < PAIRS or looks(vm) < before.vcpu_checks[1] + 10:
                    for symbol in ("open_file", "read_file", "timer_tick"):
                        planted.append(vm.breakpoint(symbol))
                        if len(planted) > 2:
                            planted.popleft().remove()
                            pairs += 1
                for left in planted:
                    left.remove()
            except BaseException as error:
                failed.append(error)
            finally:
                done.set()
                vm.stop()

        worker = threading.Thread(target=work)
        worker.start()
        runs = 0
        while not done.is_set():
            assert vm.run(timeout=60).reason == "stopped"
            runs += 1
        worker.join()
        after = Truth.read(vm)
        assert not failed
        assert len(vm.breakpoints) == 0
        assert after.mismatches == dict.fromkeys(READ_KINDS, 0)
        assert not any(after.vcpu_mismatches)
        assert not after.tampering_seen
        assert vm.stats.hits > 0
        assert vmitap.VmiCore(vm).frames_in_use == 0


def test_another_thread_gets_its_turn_between_hits_that_come_in_crowds(vm: vmitap.Vm) -> None:
    vm.write("open_file", JUMP_TO_ITSELF)
    begun = threading.Event()
    vm.breakpoint("open_file", lambda _: begun.set())
    seen: list[int] = []

    def look() -> None:
        begun.wait(20)
        end = time.monotonic() + 3
        while time.monotonic() < end and len(seen) < 10:
            seen.append(vm.stats.hits)
            time.sleep(0.001)
        vm.stop()

    thread = threading.Thread(target=look)
    thread.start()
    result = vm.run(timeout=60)
    thread.join()
    assert result.reason == "stopped"
    assert len(seen) == 10
    assert result.hits > seen[0]


def test_a_busy_guest_does_not_keep_others_waiting(vm: vmitap.Vm) -> None:
    vm.write("open_file", JUMP_TO_ITSELF)
    waited: list[float] = []

    def reader() -> None:
        for _ in range(10):
            time.sleep(0.02)
            begun = time.monotonic()
            vm.read("open_file", 8)
            waited.append(time.monotonic() - begun)
        vm.stop()

    thread = threading.Thread(target=reader)
    thread.start()
    assert vm.run(timeout=10).reason == "stopped"
    thread.join()
    assert sorted(waited)[5] < 0.05


@pytest.mark.parametrize(
    ("where", "capture", "handled"),
    [
        (Arg(1) == 1 << 63, None, 0),
        (None, {"n": Arg(1), "path": Cstr(Arg(0), max=32)}, 0),
        (Arg(1) >> 32 == 7, {"n": Arg(1)}, 0),
        (Arg(1) >> 32 == 7, None, 10),
    ],
    ids=["filtered", "captured", "filtered and captured", "handled where the filter passes"],
)
def test_what_no_handler_is_called_for_never_waits_for_the_interpreter(
    where: Filter | None, capture: dict[str, Capturable] | None, handled: int
) -> None:
    # Counted and not timed: how often the loop let go of the interpreter, for which it has to wait then. Beside a thread that never waits
    # that takes the interpreter's switch interval each time.
    ends = threading.Event()
    with vmitap.attach("demo", cmdline="mode=calls calls=200000 check=0") as vm:
        bp = vm.breakpoint("open_file", (lambda hit: None) if handled else None, where=where, capture=capture)

        def spin() -> None:
            while not ends.is_set():
                pass

        busy = threading.Thread(target=spin)
        busy.start()
        before = _native._let_go()  # type: ignore[attr-defined]
        result = vm.run(timeout=120)
        let_go = _native._let_go() - before  # type: ignore[attr-defined]
        ends.set()
        busy.join()
        assert (bp.stats.hits + bp.stats.filtered, result.py_calls) == (200_000, handled)
        assert capture is None or vm.recording.rows == bp.stats.hits
    # It comes back each 0.1 s to look at signals, and lets others have their turn then.
    assert let_go <= 10 + 2 * result.elapsed / 0.1 + 2 * handled
    assert let_go < 2_000


def test_of_two_threads_that_answer_each_event_exactly_one_does_while_a_third_waits_for_the_next() -> None:
    events = 3_000
    go_on = vmitap.VmiEventResponse.continue_()
    interval = sys.getswitchinterval()
    with mock() as guest:
        guest.script([Breakpoint("open_file")] * events)
        queues: list[SimpleQueue[vmitap.VmiEvent | None]] = [SimpleQueue(), SimpleQueue()]
        answered: list[list[int]] = [[], []]
        failed: list[BaseException] = []

        def answer(own: SimpleQueue[vmitap.VmiEvent | None], done: list[int]) -> None:
            number = 0
            while (event := own.get()) is not None:
                try:
                    guest.vm.respond(event, go_on)
                    done.append(number)
                except vmitap.NoPendingEventError:
                    pass
                except BaseException as error:
                    failed.append(error)
                number += 1

        threads = [threading.Thread(target=answer, args=each) for each in zip(queues, answered, strict=True)]
        for thread in threads:
            thread.start()
        sys.setswitchinterval(1e-6)
        try:
            taken, end = 0, time.monotonic() + 60
            while taken < events and time.monotonic() < end:
                # Idle as long as the one vCPU is held.
                if (event := guest.vm.wait_event(timeout=0)) is not None:
                    taken += 1
                    for queue in queues:
                        queue.put(event)
        finally:
            sys.setswitchinterval(interval)
            for queue in queues:
                queue.put(None)
            for thread in threads:
                thread.join()
        assert not failed
        assert taken == events, "an event was never answered"
        assert sorted(answered[0] + answered[1]) == list(range(events))
        assert len(guest.answers) == events
