"""Random sessions on the embedded driver for as long as is asked, watching for what grows: `make soak SECONDS=120`.

Each session attaches to a guest, puts taps of every kind in and out at random while it runs, writes to it, raises in handlers, now and then
leaves in the middle, and otherwise lets the guest come to its end, where its own checks must be clean and no frame may be left. What the
process holds at the least in the last fifth of the time is compared with the second fifth; in the first, caches fill. One arena of the
allocator (MALLOC_ARENA_MAX=1) makes that a matter of what is held, and not of which thread asked first.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import vmitap
from vmitap import Access, Arg, Budget, Cstr, Filter, OnWrite, Reg, Verdict
from vmitap.cli.truth import Truth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vmitap.filters import Number, Text

GUESTS = Path(__file__).resolve().parent.parent / "guests"
# The addresses of tests/guests/paging.S that come and go.
PAGED = (0x80_0020_5040, 0x80_0020_0040, 0x80_0060_0040, 0x100_0000_3040)
NEVER_MAPPED = 0x7000_0000_0000
CONTROL_REGISTERS: tuple[Literal["cr0", "cr3", "cr4"], ...] = ("cr0", "cr3", "cr4")

# What the process may grow by. The allocator's own ups and downs were seen to be 9 MiB in two minutes; in an hour, 1.5 KiB lost in
# each session is more than this.
MEMORY_LIMIT = 24 << 20


# Seconds for a guest to come to its end. A watch on what it reads byte by byte takes it a few, on a machine that has nothing else to do.
TIME_TO_END = 300


class OnPurposeError(Exception):
    """What handlers raise."""


@dataclass(frozen=True)
class Guest:
    """A guest, what in it can be tapped, and how it says that nothing was seen and all went well."""

    target: str
    memory: int | None
    code: tuple[str | int, ...]
    data: str
    cmdline: str
    is_well: Callable[[vmitap.Vm], bool]
    vcpus: int = 3


def demo_is_well(vm: vmitap.Vm) -> bool:
    truth = Truth.read(vm)
    return truth.finished and not truth.tampering_seen and not any(truth.mismatches.values())


def zero(*names: str) -> Callable[[vmitap.Vm], bool]:
    return lambda vm: [vm.read_u64(name) for name in ("done", *names)] == [1, *[0] * len(names)]


def guests(folder: Path) -> list[Guest]:
    def build(name: str) -> str:
        path = folder / f"{name}.elf"
        subprocess.run([sys.executable, str(GUESTS / "build.py"), f"{name}.S", str(path)], check=True, timeout=60)
        return f"emu:{path}"

    kernel = ("open_file", "read_file", "write_file", "close_file", "check_licence", "send_packet", "timer_tick", "check_integrity")
    corners = ("copy_user_move", "copy_user_load", "trap_iret", "syscall_return", "syscall_entry")
    return [
        Guest("demo", None, kernel + corners + ("app_main", "steal"), "boot_copy", "rounds=6", demo_is_well),
        Guest(build("paging"), 8 << 20, PAGED, "made_1", "", zero("wrong", "mismatches")),
        Guest(build("roots"), 8 << 20, ("f", 0x80_0000_0040), "f_calls", "n=30", zero("wrong", "mismatches"), vcpus=1),
        Guest(build("patch"), 8 << 20, ("f_entry", "f"), "wrong_results", "n=300", zero("wrong_results"), vcpus=1),
        # It shakes hands with one other vCPU and no more.
        Guest(build("poke"), 8 << 20, ("site",), "site_calls", "n=12", zero("wrong", "unlike"), vcpus=2),
    ]


@dataclass
class Session:
    """One attachment, from its beginning to its end."""

    rng: random.Random
    guest: Guest
    folder: Path
    done: Counter[str]
    taps: list[vmitap.Breakpoint] = field(default_factory=list)

    def handler(self) -> Callable[[vmitap.Hit], Verdict | None] | None:
        rng = self.rng

        def handle(hit: vmitap.Hit) -> Verdict | None:
            self.done["handled"] += 1
            chance = rng.random()
            if chance < 0.01:
                raise OnPurposeError
            if chance < 0.03:
                return Verdict.pause()
            if chance < 0.05:
                hit.vm.read_u64(self.guest.data)
            if chance < 0.06 and self.taps:
                rng.choice(self.taps).remove()
            return Verdict.step(rng.randrange(1, 5)) if chance > 0.95 else None

        return handle if rng.random() < 0.5 else None

    def filter(self) -> Filter | None:
        rng = self.rng
        choices: list[Callable[[], Filter | None]] = [
            lambda: None,
            lambda: Arg(0) > rng.randrange(1 << 32),
            lambda: Cstr(Arg(0)).startswith("/etc/") | Filter.vcpu(0),
            lambda: ~Filter.ring(3) & Filter.every(rng.randrange(1, 9)),
            lambda: Filter.predicate(lambda hit: hit.args[0] % 2 == 0),
        ]
        return rng.choice(choices)()

    def tap(self, vm: vmitap.Vm) -> None:
        rng = self.rng
        capture: dict[str, Number | Text] | None = (
            {"first": Arg(0), "text": Cstr(Arg(1), max=rng.choice([8, 64]))} if rng.random() < 0.3 else None
        )
        budget = Budget(per_second=rng.choice([10, 1000])) if rng.random() < 0.2 else None
        # REMOVE and DENY would change what guests that patch themselves do.
        place = rng.choice((*self.guest.code, NEVER_MAPPED))
        once, where = rng.random() < 0.1, self.filter()
        self.taps.append(
            vm.breakpoint(place, self.handler(), where=where, capture=capture, budget=budget, once=once, on_write=OnWrite.REAPPLY)
        )

    def returning(self, vm: vmitap.Vm) -> None:
        place = self.rng.choice(self.guest.code)
        self.taps.append(vm.breakpoint(place, capture={"first": Arg(0)}, on_return={"result": Reg.rax}))

    def many(self, vm: vmitap.Vm) -> None:
        self.taps += vm.insert_many([*self.guest.code, *(NEVER_MAPPED + 0x400 * at for at in range(self.rng.randrange(40)))])

    def watch(self, vm: vmitap.Vm) -> None:
        access = self.rng.choice([Access.R, Access.W, Access.R | Access.W])
        self.taps.append(vm.watch(self.guest.data, self.rng.choice([1, 8, 64]), access, self.handler()))

    def monitor(self, vm: vmitap.Vm) -> None:
        rng = self.rng
        cr = rng.sample(CONTROL_REGISTERS, rng.randrange(3))
        # The EOI and the timer's count: what guests write all the time.
        msr = rng.sample([0x80B, 0x838, 0xC000_0102], rng.randrange(3))
        self.taps.append(vm.monitor_events(self.handler(), cr=cr, msr=msr, cpuid=True, debug=rng.random() < 0.5, where=self.filter()))

    def remove(self, vm: vmitap.Vm) -> None:
        for tap in self.rng.sample(self.taps, min(len(self.taps), 3)):
            tap.remove()
        self.taps = [tap for tap in self.taps if tap.state != "removed"]

    def toggle(self, vm: vmitap.Vm) -> None:
        for tap in self.rng.sample(self.taps, min(len(self.taps), 3)):
            if tap.state != "removed":
                tap.disable() if tap.enabled else tap.enable()

    def write(self, vm: vmitap.Vm) -> None:
        with vm.pause():
            vm.write(self.guest.data, vm.read(self.guest.data, 64))

    def record(self, vm: vmitap.Vm) -> None:
        if len(vm.recording.columns) > 0:
            with vm.record_to(self.folder / "rows.parquet"):
                self.go(lambda: vm.run(timeout=0.01))

    def listen(self, vm: vmitap.Vm) -> None:
        def listen() -> None:
            events = vm.events(timeout=0.01, queue=self.rng.choice([1, 100]))
            for _ in events:
                pass
            events.close()

        self.go(listen)

    def refused(self, vm: vmitap.Vm) -> None:
        """Calls that are errors."""
        for call in (
            lambda: vm.breakpoint("no_such_symbol"),
            lambda: vm.read(NEVER_MAPPED, 8),
            lambda: vm.breakpoint(0x8000_0000_0000_0000),
            lambda: vm.views.destroy(vm.views.default),
        ):
            try:
                call()
            except vmitap.VmitapError:
                continue
            raise AssertionError("not refused")

    def go(self, run: Callable[[], object]) -> object:
        try:
            return run()
        except vmitap.HandlerError as error:
            if not isinstance(error.__cause__, OnPurposeError):
                raise
            self.done["raised"] += 1
            return None

    def play(self) -> None:
        rng = self.rng
        actions = [
            self.tap,
            self.tap,
            self.returning,
            self.many,
            self.watch,
            self.monitor,
            self.remove,
            self.toggle,
            self.write,
            self.record,
        ]
        actions += [self.listen, self.refused]
        vcpus = rng.randrange(1, self.guest.vcpus + 1)
        with vmitap.attach(self.guest.target, memory=self.guest.memory, vcpus=vcpus, cmdline=self.guest.cmdline) as vm:
            for _ in range(rng.randrange(1, 25)):
                try:
                    rng.choice(actions)(vm)
                except vmitap.TranslationError:
                    # Its page-table entry makes no sense just then (it points beyond memory), or a watch has no page.
                    self.done["not mapped"] += 1
                limit = rng.choice([None, 1, 50])
                timeout = rng.choice([0.0, 0.001, 0.02])
                result = self.go(partial(vm.run, timeout=timeout, max_hits=limit))
                if isinstance(result, vmitap.RunResult) and result.reason == "idle":
                    break
            if rng.random() < 0.2:
                self.done["left early"] += 1
                self.done["hits"] += vm.stats.hits
                return
            if rng.random() < 0.5:
                for tap in list(vm.breakpoints):
                    tap.remove()
                frames = vm.stats.shadow_frames
                if frames:
                    raise AssertionError(f"{frames} frames are in use without a breakpoint")
            while True:
                result = self.go(partial(vm.run, timeout=TIME_TO_END))
                if isinstance(result, vmitap.RunResult) and result.reason in ("idle", "timeout"):
                    break
            if result.reason != "idle" or not self.guest.is_well(vm):
                raise AssertionError(f"{result.reason}; the guest's own checks failed: {vm.console}")
            self.done["hits"] += vm.stats.hits
            self.done["page-ins"] += vm.stats.page_ins
            self.done["hidden writes"] += vm.stats.hidden_writes


@dataclass(frozen=True)
class Use:
    """What the process holds, `at` seconds after the beginning; memory in bytes."""

    at: float
    memory: int
    descriptors: int
    threads: int

    @classmethod
    def sample(cls, at: float) -> Use:
        gc.collect()
        # What the allocator keeps for later is not held: it was seen to be 80 MB, and 35 MB more after an hour, with as many bytes in use.
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(round(at), pages * 4096, len(list(Path("/proc/self/fd").iterdir())), threading.active_count())

    @classmethod
    def least(cls, samples: Iterable[Use]) -> Use:
        """The least of each: what a session holds for a while, or the allocator keeps, is in some samples and not in others."""
        each = list(samples)
        return cls(each[0].at, *(min(getattr(use, name) for use in each) for name in ("memory", "descriptors", "threads")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=None, help="begin with this session")
    options = parser.parse_args()
    seed = random.randrange(1 << 30) if options.seed is None else options.seed
    # Budgets are used up all the time.
    logging.getLogger("vmitap").setLevel(logging.ERROR)
    begin = time.monotonic()
    samples: list[Use] = []
    done: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = guests(folder)
        while (now := time.monotonic() - begin) < options.seconds:
            if not samples or now > samples[-1].at + options.seconds / 200:
                samples.append(Use.sample(now))
            rng = random.Random(seed)
            guest = rng.choice(known)
            try:
                Session(rng, guest, folder, done).play()
            except BaseException:
                print(f"the session of --seed {seed} on {guest.target} failed", file=sys.stderr)
                raise
            done["sessions"] += 1
            seed += 1
    samples.append(Use.sample(time.monotonic() - begin))
    early = Use.least(use for use in samples if 0.2 <= use.at / options.seconds <= 0.4)
    late = Use.least(use for use in samples if use.at / options.seconds >= 0.8)
    print(json.dumps({**done, "early": asdict(early), "late": asdict(late)}))
    if late.memory > early.memory + MEMORY_LIMIT or late.descriptors > early.descriptors or late.threads > early.threads:
        print("something grows", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
