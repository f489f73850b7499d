"""`vmitap bench`: what a hit costs on this machine, by what is done with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import click

import vmitap
from vmitap import Arg, Cstr, Filter, Reg
from vmitap.cli import exits
from vmitap.cli.options import json_option
from vmitap.cli.output import Output, per_second

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vmitap.capture import Capturable


@dataclass(frozen=True)
class _Way:
    """Something to do with each hit."""

    name: str
    where: Filter | None = None
    capture: dict[str, Capturable] | None = None
    handler: Callable[[vmitap.Hit], None] | None = None


@dataclass(frozen=True)
class _Cost:
    """Nanoseconds of one call of the tapped function, all in all, and beyond one that is not tapped."""

    way: str
    call_ns: float
    beyond_ns: float


def _nothing(hit: vmitap.Hit) -> None:
    """The shortest handler."""


def _read_path(hit: vmitap.Hit) -> None:
    hit.vm.read_cstr(hit.args[0])


_WAYS = (
    _Way("counted"),
    _Way("filtered out by a register", where=Arg(1) == 1 << 63),
    _Way("filtered out by a string", where=Cstr(Arg(0)).startswith("/nowhere/")),
    _Way("4 registers captured", capture={"a": Arg(0), "b": Arg(1), "c": Reg.rip, "d": Reg.rsp}),
    _Way("a string captured", capture={"path": Cstr(Arg(0))}),
    _Way("a Python handler", handler=_nothing),
    _Way("one that reads a string", handler=_read_path),
)


@click.command()
@click.option("--calls", type=click.IntRange(1000, 100_000_000), default=100_000, show_default=True, help="How many calls a turn.")
@click.option("--turns", type=click.IntRange(1, 100), default=3, show_default=True, help="How many turns; the best of each counts.")
@json_option
def bench(calls: int, turns: int, as_json: bool) -> int:
    """Measure what a hit costs on this machine, by what is done with it.

    The embedded guest calls a function in a loop. Times are the best of the turns: compare them with each other, and with those of
    another machine only with care. The exit code is 0 if every call was accounted for, else 1.
    """
    out = Output(as_json=as_json)
    best: dict[str, float] = {}
    complete = True
    for way in _shown(out, [*[None, *_WAYS] * turns]):
        elapsed, counted = _turn(calls, way)
        complete &= counted
        name = way.name if way else ""
        best[name] = min(best.get(name, elapsed), elapsed)
    untapped = best.pop("") / calls * 1e9
    costs = [_Cost(name, elapsed / calls * 1e9, elapsed / calls * 1e9 - untapped) for name, elapsed in best.items()]
    out.object({"ok": complete, "calls": calls, "turns": turns, "untapped_ns": untapped, "ways": [asdict(cost) for cost in costs]})
    out.line((f"A call that is not tapped takes {untapped:.0f} ns. Each that is:", "bold"))
    rows = [[cost.way, f"{cost.call_ns:.0f}", f"{cost.beyond_ns:.0f}", per_second(1e9 / cost.call_ns)] for cost in costs]
    out.table(["what is done with a hit", "ns a call", "ns for the hit", "calls per second"], rows)
    if not complete:
        out.line(("Calls are missing: ", "bold red"), ("please report it with the output of vmitap doctor.", ""))
    return exits.OK if complete else exits.NO


def _shown(out: Output, ways: Sequence[_Way | None]) -> Iterable[_Way | None]:
    """The ways, with a bar on a terminal."""
    if not out.terminal:
        return ways
    from rich.progress import track

    return track(ways, description="measuring", transient=True, console=out.console)


def _turn(calls: int, way: _Way | None) -> tuple[float, bool]:
    """Seconds for so many calls, and whether each was a hit that was counted or filtered."""
    with vmitap.attach("demo", cmdline=f"mode=calls calls={calls} parts=1 check=0") as vm:
        bp = vm.breakpoint("open_file", way.handler, where=way.where, capture=way.capture) if way else None
        begin = perf_counter()
        ended = vm.run().reason == "idle"
        elapsed = perf_counter() - begin
        return elapsed, ended and (bp is None or bp.stats.hits + bp.stats.filtered == calls)
