"""One table: what a hit costs with vmitap, with plain `unicorn` scripts, and with what else taps a function from Python.

`make bench-table` runs it; by hand: `python benches/python/bench_table.py [--turns N] [--calls N] [--markdown]`. Everything is measured
in this one run, in turns, in the processor time of all that take part, and the best of the turns counts: compare the ratios, not the
times of two machines. Each way must count every call, or there is no result. `--peers PYTHON` is an interpreter that has what is to be
compared (`pip install frida qiling python-ptrace`), if this one has not; what is missing is said in its row.

The tapped function is the same in all rows: it adds its argument up, counts, and returns. vmitap and the unicorn scripts call it in a
guest with page tables (tests/guests/calls.S), the others in an ordinary process (peers/process.c).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING

import peer
from rich.console import Console
from rich.table import Table

import vmitap
from vmitap import Arg, Reg

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests" / "guests"))
from build import build

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmitap.capture import Capturable

COLUMNS: dict[str, Capturable] = {"a": Arg(0), "b": Arg(1), "rip": Reg.rip, "rsp": Reg.rsp}


@dataclass(frozen=True)
class Measured:
    """One measurement: microseconds a hit, and whether the tapped code can see that it is tapped; None: it does not look."""

    microseconds: float
    seen: bool | None


@dataclass
class Way:
    """One row. `group` is what is done at a hit; the first row of a group is what the others are compared with."""

    name: str
    group: str
    calls: int
    measure: Callable[[int], Measured]
    command: str
    best: Measured | None = None
    missing: str = ""

    def turn(self) -> None:
        """Measures once more."""
        if self.missing:
            return
        try:
            now = self.measure(self.calls)
        except UnavailableError as error:
            self.missing = str(error)
            return
        if self.best is None or now.microseconds < self.best.microseconds:
            self.best = now


class UnavailableError(Exception):
    """A peer is not installed here, or does not work."""


def ours(guest: str, calls: int, **options: object) -> Measured:
    """Taps the guest with vmitap; measured from the first hit to the last."""
    with vmitap.attach(f"emu:{guest}", cmdline=f"n={calls + 2} every=0") as vm:
        filtered = options.pop("filtered", False)
        # The first call and the last pass, so that the same is measured.
        where = (Arg(0) == 0) | (Arg(0) == calls + 1) if filtered else None
        vm.breakpoint("f", where=where, **options)
        vm.run(timeout=600, max_hits=1)
        begin = process_time()
        result = vm.run(timeout=600, max_hits=1 if filtered else calls)
        elapsed = process_time() - begin
        if (result.hits, result.filtered) != ((1, calls) if filtered else (calls, 0)):
            raise SystemExit(f"vmitap: {result}")
        vm.run(timeout=600)
        seen = sum(vm.read_u64(vm.symbol("mismatches") + 8 * kind) for kind in range(10))
        if vm.read_u64("f_count") != calls + 2:
            raise SystemExit(f"vmitap: {vm.read_u64('f_count')} calls")
    return Measured(elapsed / calls * 1e6, seen > 0)


def look(hit: vmitap.Hit) -> None:
    """Looks at one register, as every peer does."""
    _ = hit.regs.rdi


def unicorn(guest: str, way: str, calls: int) -> Measured:
    """A script with nothing but the package unicorn."""
    result = peer.measure(guest, way, calls)
    if (result.hits, result.executed) != (calls, calls):
        raise SystemExit(f"unicorn, {way}: {result}")
    return Measured(result.microseconds, result.seen > 0)


class Process:
    """The ordinary process, built twice: as usual, and static without PIE."""

    def __init__(self, folder: Path) -> None:
        self.usual, self.fixed = folder / "process", folder / "process_static"
        for program, options in ((self.usual, ["-rdynamic"]), (self.fixed, ["-static", "-no-pie"])):
            subprocess.run(["gcc", "-O1", *options, "-o", program, HERE / "peers" / "process.c"], check=True)
        symbols = subprocess.run(["nm", self.fixed], check=True, capture_output=True, text=True).stdout
        self.address = next(f"0x{line.split()[0]}" for line in symbols.splitlines() if line.endswith(" f"))
        self.code = {program: self._output([program, "1"])["code"] for program in (self.usual, self.fixed)}

    @staticmethod
    def _output(command: list[str | Path]) -> dict[str, int]:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        values = {name: int(value) for name, value in re.findall(r"(hits|called|ns|busy|code) (\d+)", done.stdout)}
        if "code" not in values:
            raise UnavailableError(((done.stderr or done.stdout).strip().splitlines() or ["it printed nothing"])[-1])
        return values

    def measure(self, command: list[str], program: Path, calls: int) -> Measured:
        """Runs a peer on it; the process measures itself, and a peer outside of it itself too."""
        values = self._output([word.format(program=program, calls=calls, address=self.address) for word in command])
        # The process calls f once before it begins to count.
        if (values["hits"], values["called"]) != (calls + 1, calls):
            raise SystemExit(f"{command}: {values}")
        return Measured((values["ns"] + values.get("busy", 0)) / calls / 1e3, values["code"] != self.code[program])


def python_peer(python: str, package: str, install: str) -> str:
    """Why a peer cannot be measured; empty if it can."""
    done = subprocess.run([python, "-c", f"import {package}"], capture_output=True, check=False)
    return "" if done.returncode == 0 else f"not installed: pip install {install}"


@dataclass
class Rows:
    """All rows."""

    ways: list[Way] = field(default_factory=list)

    def add(self, name: str, group: str, calls: int, measure: Callable[[int], Measured], command: str, missing: str = "") -> None:
        """One more."""
        self.ways.append(Way(name, group, calls, measure, command, missing=missing))


NATIVE, PYTHON = "counted or recorded, no Python", "a Python function looks at a register"


def rows(guest: str, process: Process, python: str) -> list[Way]:
    """What is measured, in the order of the table."""
    made = Rows()
    here = "python benches/python/bench_table.py"
    for name, options in (
        ("vmitap, counted", {}),
        ("vmitap, filtered out", {"filtered": True}),
        ("vmitap, 4 columns captured", {"capture": COLUMNS}),
    ):
        made.add(name, NATIVE, 40_000, lambda calls, options=options: ours(guest, calls, **dict(options)), here)
    frida_missing = python_peer(python, "frida", "frida")

    def frida(way: str) -> tuple[Callable[[int], Measured], str]:
        command = [python, str(HERE / "peers" / "frida_peer.py"), way, "{program}", "{calls}"]
        return lambda calls: process.measure(command, process.usual, calls), f"python peers/frida_peer.py {way} process CALLS"

    for way, name, group, calls in (
        ("c", "Frida, a counter in C", NATIVE, 100_000),
        ("js", "Frida, a function in JavaScript", NATIVE, 20_000),
    ):
        made.add(name, group, calls, *frida(way), frida_missing)
    made.add("vmitap, handler", PYTHON, 20_000, lambda calls: ours(guest, calls, handler=look), here)
    for way, name, calls in (
        ("hook", "unicorn, code hook", 10_000),
        ("stepper", "unicorn, two instances", 2_000),
        ("swap", "unicorn, byte swapped", 1_000),
    ):
        made.add(name, PYTHON, calls, lambda calls, way=way: unicorn(guest, way, calls), f"python peer.py calls.elf CALLS  # {way}")
    for name, package, install, script, calls in (
        ("Qiling, hook_address", "qiling", "qiling", "qiling_peer.py", 8_000),
        ("python-ptrace, breakpoint", "ptrace", "python-ptrace", "ptrace_peer.py", 500),
    ):
        command = [python, str(HERE / "peers" / script), "{program}", "{calls}", "{address}"]
        measure = lambda calls, command=command: process.measure(command, process.fixed, calls)  # noqa: E731
        made.add(name, PYTHON, calls, measure, f"python peers/{script} process_static CALLS ADDRESS", python_peer(python, package, install))
    debugger = shutil.which("gdb")
    command = ["gdb", "-nx", "-batch", "-x", str(HERE / "peers" / "gdb_peer.py"), "--args", "{program}", "{calls}"]
    made.add(
        "gdb, Python breakpoint",
        PYTHON,
        300,
        lambda calls: process.measure(command, process.usual, calls),
        "gdb -nx -batch -x peers/gdb_peer.py --args process CALLS",
        "" if debugger else "not installed: apt install gdb",
    )
    made.add("Frida, Python function waited for", PYTHON, 200, *frida("python"), frida_missing)
    return made.ways


def cells(ways: list[Way]) -> list[tuple[str, ...]]:
    """The table's lines: name, us a hit, hits a second, how many times as long as the first of its group, seen."""
    first: dict[str, float] = {}
    lines = []
    for way in ways:
        if way.best is None:
            lines.append((way.name, way.missing or "not measured", "", "", ""))
            continue
        cost = way.best.microseconds
        first.setdefault(way.group, cost)
        ratio = cost / first[way.group]
        wins = ratio < 0.995 and not way.name.startswith("vmitap")
        times = f"{ratio:.2f}, wins" if wins else f"{ratio:.1f}"
        lines.append((way.name, f"{cost:.2f}", f"{1e6 / cost:,.0f}", times, "yes" if way.best.seen else "no"))
    return lines


HEADS = ("", "us a hit", "hits/s", "x vmitap", "code sees it")


def show(ways: list[Way], *, markdown: bool) -> None:
    """Prints the table, and the commands."""
    lines = cells(ways)
    groups = [way.group for way in ways]
    if markdown:
        print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    table = Table(*HEADS, title="What a hit costs", title_justify="left")
    for index, (line, group) in enumerate(zip(lines, groups, strict=True)):
        if index == 0 or groups[index - 1] != group:
            if markdown:
                print(f"| **{group}** | | | | |")
            table.add_section()
            table.add_row(f"[bold]{group}[/bold]")
        if markdown:
            print(f"| {' | '.join(line)} |")
        table.add_row(*line)
    if not markdown:
        Console(width=None if sys.stdout.isatty() else 120).print(table)
        print("\nThe commands, from benches/python; process and calls.elf are built by this script:")
        for way in ways:
            print(f"  {way.name:<36}{way.command}")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="measurements of each, of which the best counts (default %(default)s)")
    parser.add_argument("--calls", type=int, help="calls of the function in a measurement, at most (default: as many as each takes well)")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="the interpreter that has the peers")
    parser.add_argument("--markdown", action="store_true", help="for docs/benchmarks.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        guest = str(build("calls.S", Path(folder, "calls.elf")))
        ways = rows(guest, Process(Path(folder)), options.peers)
        for way in ways:
            way.calls = min(way.calls, options.calls or way.calls)
        for _ in range(options.turns):
            for way in ways:
                way.turn()
        show(ways, markdown=options.markdown)


if __name__ == "__main__":
    main()
