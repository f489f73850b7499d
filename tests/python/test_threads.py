"""A session that another thread works on while the guest runs."""

from __future__ import annotations

import threading
import time
from collections import deque

import vmitap
from vmitap.cli.truth import READ_KINDS, Truth

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
