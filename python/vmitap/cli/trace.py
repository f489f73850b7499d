"""`vmitap trace`: a line for each hit, or rows in a file."""

from __future__ import annotations

from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING, Literal

import click

from vmitap.cli.options import address, attach, guest_options, json_option, timeout_option
from vmitap.cli.output import Output, harmless, microseconds, per_second

if TYPE_CHECKING:
    from rich.table import Table

    from vmitap import Breakpoint, Filter, Hit, RunResult, Vm
    from vmitap.capture import Capturable
    from vmitap.cli.output import Json

_REFRESH = 0.25
"""Seconds between two looks at the counters."""


@click.command(context_settings={"show_default": True})
@click.argument("words", nargs=-1, required=True, metavar="SYMBOL... [TARGET]")
@click.option("--count", type=click.IntRange(min=1), help="Stop after that many hits.")
@timeout_option
@click.option("--args", "arguments", type=click.IntRange(0, 6), default=3, help="How many arguments to show.")
@click.option("--abi", type=click.Choice(["sysv", "ms"]), default="sysv", help="How the functions get their arguments.")
@click.option("--where", metavar="FILTER", help="Only hits that pass, such as \"Cstr(Arg(0)).startswith('/etc/') and Arg(1) != 0\".")
@click.option("--capture", "captures", multiple=True, metavar="NAME=EXPR", help='A column for -o, such as "path=Cstr(Arg(0))". Repeatable.')
@click.option("--on-return", "returns", multiple=True, metavar="NAME=EXPR", help='A column read at the return, such as "fd=Reg.rax.i32".')
@click.option("-o", "--output", metavar="FILE", help="Write rows to FILE (.parquet, .jsonl) or as JSON lines to standard output (-).")
@click.option("--journal", metavar="FILE", help="Keep the last events in FILE, which outlives this command however it ends.")
@click.option("--replace", is_flag=True, help="Replace the FILE of --journal if it is there.")
@guest_options
@json_option
def trace(
    words: tuple[str, ...],
    count: int | None,
    timeout: float | None,
    arguments: int,
    abi: Literal["sysv", "ms"],
    where: str | None,
    captures: tuple[str, ...],
    returns: tuple[str, ...],
    output: str | None,
    journal: str | None,
    replace: bool,
    memory: int | None,
    vcpus: int | None,
    cmdline: str,
    as_json: bool,
) -> None:
    """Print a line for each time TARGET executes one of the SYMBOLs, or write rows to a file.

    The last word is taken as TARGET if it is "demo" or contains a colon; otherwise TARGET is "demo". Without --count or
    --timeout it goes on until the guest halts or Ctrl-C. With --output nothing is done in Python for a hit.
    """
    from vmitap.where import parse_capture, parse_filter

    *symbols, last = words
    target = last
    if last != "demo" and ":" not in last:
        symbols.append(last)
        target = "demo"
    if not symbols:
        raise click.UsageError("name at least one SYMBOL before the target")
    if (captures or returns) and output is None:
        raise click.UsageError("--capture and --on-return are columns of a file: name it with --output")
    if output == "-" and as_json:
        raise click.UsageError("with --output - standard output has the rows: leave --json out")
    filters = None if where is None else parse_filter(where)
    columns = dict(parse_capture(each) for each in captures)
    results = dict(parse_capture(each, "on_return") for each in returns)
    out = Output(as_json=as_json)
    places = [address(symbol) for symbol in symbols]
    with attach(target, memory, vcpus, cmdline, abi=abi) as vm:
        if journal is not None:
            vm.journal.open(journal, replace=replace)
        if output is None:
            result = _print(vm, out, places, filters, arguments, count, timeout)
        else:
            result = _record(vm, out, places, filters, (columns, results or None), output, count, timeout)
    out.object({"summary": summary(result)})
    if output != "-":
        out.text(
            f"{result.hits} hits in {result.elapsed:.3f} s ({per_second(result.hits_per_second)}), {result.filtered} filtered, "
            f"ended by {result.reason}; a hit held its vCPU {microseconds(result.hold_p50)} in half of the cases, "
            f"{microseconds(result.hold_p99)} in 99 of 100, {microseconds(result.hold_max)} at most",
            style="dim",
        )


def _print(
    vm: Vm, out: Output, places: list[str | int], where: Filter | None, arguments: int, count: int | None, timeout: float | None
) -> RunResult:
    def show(hit: Hit) -> None:
        arg_values = hit.args[:arguments]
        strings = [_peek(hit, value) for value in arg_values]
        out.object(_as_json(hit, arg_values, strings))
        shown = ", ".join(f"{value:#x}" if text is None else repr(text) for value, text in zip(arg_values, strings, strict=True))
        out.text(f"{hit.timestamp:10.6f}  vCPU {hit.vcpu}  ring {hit.ring}  {hit.symbol or hex(hit.address)}({shown})")

    _say_waiting(out, vm.insert_many(places, show, where=where))
    return vm.run(timeout=timeout, max_hits=count)


def _say_waiting(out: Output, points: list[Breakpoint]) -> None:
    """Names the breakpoints whose pages are not there yet."""
    waiting = [point.symbol or hex(point.address) for point in points if point.state == "pending"]
    if waiting:
        out.object({"pending": list(waiting)})
        out.text(f"{', '.join(waiting)}: not mapped yet, to be planted when the guest maps it", style="dim")


def _record(
    vm: Vm,
    out: Output,
    places: list[str | int],
    where: Filter | None,
    columns: tuple[dict[str, Capturable], dict[str, Capturable] | None],
    path: str,
    count: int | None,
    timeout: float | None,
) -> RunResult:
    capture, on_return = columns
    points = vm.insert_many(places, where=where, capture=capture, on_return=on_return)
    if path != "-":
        _say_waiting(out, points)
    with vm.record_to(path) as file:
        result = _watched(vm, points, count, timeout) if out.terminal and path != "-" else vm.run(timeout=timeout, max_hits=count)
    if path != "-":
        lost = f", {vm.recording.lost} lost" if vm.recording.lost else ""
        out.object({"file": path, "rows": file.rows, "lost": vm.recording.lost})
        out.text(f"{file.rows} rows in {path}{lost}")
    return result


def _watched(vm: Vm, points: list[Breakpoint], count: int | None, timeout: float | None) -> RunResult:
    """Runs with a table of rates on the terminal, which a thread of its own keeps up to date."""
    from rich.live import Live

    ended = Event()
    with Live(auto_refresh=False, transient=True) as live:

        def refresh() -> None:
            before, at = [0] * len(points), monotonic()
            while not ended.wait(_REFRESH):
                now, hits = monotonic(), [point.stats.hits for point in points]
                rates = [(count - old) / (now - at) for count, old in zip(hits, before, strict=True)]
                live.update(_table(points, rates), refresh=True)
                before, at = hits, now

        thread = Thread(target=refresh, name="vmitap-trace-table", daemon=True)
        thread.start()
        try:
            return vm.run(timeout=timeout, max_hits=count)
        finally:
            ended.set()
            thread.join()


def _table(points: list[Breakpoint], rates: list[float]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("symbol", "hits", "rate", "filtered", "held p50", "held p99", "state", header_style="bold", border_style="dim")
    for point, rate in zip(points, rates, strict=True):
        stats = point.stats
        cells = (
            point.symbol or hex(point.address),
            f"{stats.hits:,}",
            per_second(rate),
            f"{stats.filtered:,}",
            microseconds(stats.hold_p50),
            microseconds(stats.hold_p99),
            point.state,
        )
        table.add_row(*(Text(harmless(cell)) for cell in cells))
    return table


def summary(result: RunResult) -> dict[str, Json]:
    """What a run was, for JSON."""
    return {
        "reason": result.reason,
        "hits": result.hits,
        "filtered": result.filtered,
        "py_calls": result.py_calls,
        "lost": result.lost,
        "elapsed": result.elapsed,
        "hits_per_second": result.hits_per_second,
        "hold_mean": result.hold_mean,
        "hold_p50": result.hold_p50,
        "hold_p99": result.hold_p99,
        "hold_max": result.hold_max,
    }


def _as_json(hit: Hit, values: tuple[int, ...], strings: list[str | None]) -> dict[str, Json]:
    return {
        "symbol": hit.symbol,
        "address": hit.address,
        "vcpu": hit.vcpu,
        "ring": hit.ring,
        "root": hit.root,
        "timestamp": hit.timestamp,
        "args": list(values),
        "strings": list(strings),
    }


def _peek(hit: Hit, value: int) -> str | None:
    """The text an argument points to, if it does point to a short printable string."""
    from vmitap import VmitapError

    if value < 0x1000:
        return None
    try:
        text = hit.vm.read_cstr(value, 256)
    except VmitapError:
        return None
    return text if len(text) > 1 and text.isprintable() and text.isascii() else None
