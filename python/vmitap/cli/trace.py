"""`vmitap trace`: one line for each hit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vmitap.cli.options import address, attach, guest_options, json_option, timeout_option
from vmitap.cli.output import Output, microseconds, per_second

if TYPE_CHECKING:
    from vmitap import Hit, RunResult
    from vmitap.cli.output import Json


@click.command(context_settings={"show_default": True})
@click.argument("words", nargs=-1, required=True, metavar="SYMBOL... [TARGET]")
@click.option("--count", type=click.IntRange(min=1), help="Stop after that many hits.")
@timeout_option
@click.option("--args", "arguments", type=click.IntRange(0, 6), default=3, help="How many arguments to show.")
@guest_options
@json_option
def trace(
    words: tuple[str, ...],
    count: int | None,
    timeout: float | None,
    arguments: int,
    memory: int | None,
    vcpus: int | None,
    cmdline: str,
    as_json: bool,
) -> None:
    """Print a line for each time TARGET executes one of the SYMBOLs.

    The last word is taken as TARGET if it is "demo" or contains a colon; otherwise TARGET is "demo". Without --count or
    --timeout it goes on until the guest halts or Ctrl-C.
    """
    *symbols, last = words
    target = last
    if last != "demo" and ":" not in last:
        symbols.append(last)
        target = "demo"
    if not symbols:
        raise click.UsageError("name at least one SYMBOL before the target")
    out = Output(as_json=as_json)
    places = [address(symbol) for symbol in symbols]

    def show(hit: Hit) -> None:
        arg_values = hit.args[:arguments]
        strings = [_peek(hit, value) for value in arg_values]
        out.object(_as_json(hit, arg_values, strings))
        shown = ", ".join(f"{value:#x}" if text is None else repr(text) for value, text in zip(arg_values, strings, strict=True))
        out.text(f"{hit.timestamp:10.6f}  vCPU {hit.vcpu}  ring {hit.ring}  {hit.symbol or hex(hit.address)}({shown})")

    with attach(target, memory, vcpus, cmdline) as vm:
        waiting = [bp.symbol or hex(bp.address) for bp in vm.insert_many(places, show) if bp.state == "pending"]
        if waiting:
            out.object({"pending": list(waiting)})
            out.text(f"{', '.join(waiting)} is not mapped yet: it is planted when the guest maps it", style="dim")
        result = vm.run(timeout=timeout, max_hits=count)
    out.object({"summary": summary(result)})
    out.text(
        f"{result.hits} hits in {result.elapsed:.3f} s ({per_second(result.hits_per_second)}), ended by {result.reason}; "
        f"a hit held its vCPU {microseconds(result.hold_mean)} on average, {microseconds(result.hold_max)} at most",
        style="dim",
    )


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
