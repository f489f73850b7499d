"""`vmitap report`: a recording as one HTML page that needs nothing else."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from html import escape
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmitap import __version__
from vmitap.cli.options import attach, json_option
from vmitap.cli.output import Output, microseconds, per_second
from vmitap.errors import InvalidArgumentError, NotSupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pyarrow.parquet import ParquetFile

_NEEDED = ("time_ns", "hold_ns", "vcpu", "symbol")
_COLOURS = ("#3b6ea5", "#d1783d", "#4f9d69", "#a14a76", "#8a7f2e", "#5b5ea6", "#2f8f9d", "#b0413e", "#6d6d6d", "#9aa84f")
_BINS = 120
_OTHERS = "others"
_PLACES = b"vmitap.places"
"""Key of the names of addresses in a file's metadata."""
_SCHEMA, _KNOWN = b"vmitap.schema", b"1"
"""Key of the version of a file's columns, and the version that is read here."""
_KEPT_VALUES = 100_000
"""Different values of a column that are counted; what comes then is only counted as others."""


class _Summary:
    """What a page needs, gathered row by row: nothing grows with the number of rows. `name` gives an address's name, if it has one."""

    def __init__(self, name: Callable[[int], str | None]) -> None:
        self.name = name
        self.rows = 0
        self.first: int | None = None
        self.last = 0
        self.symbols: Counter[str] = Counter()
        self.vcpus: Counter[int] = Counter()
        self.times: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self.holds: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self.hold_max: Counter[str] = Counter()
        self.values: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.width = 1_000_000

    def add(self, row: dict[str, Any]) -> None:
        """Counts a row."""
        symbol, time, hold = str(row["symbol"]), int(row["time_ns"]), int(row["hold_ns"])
        self.rows += 1
        self.first = time if self.first is None else min(self.first, time)
        self.last = max(self.last, time)
        self.symbols[symbol] += 1
        self.vcpus[int(row["vcpu"])] += 1
        self.times[symbol][time // self.width] += 1
        self.holds[symbol][hold.bit_length()] += 1
        self.hold_max[symbol] = max(self.hold_max[symbol], hold)
        # Times lie in at most a few thousand bins, however long it took.
        if len(self.times[symbol]) > 4096:
            self.width *= 2
            for name, bins in self.times.items():
                merged: Counter[int] = Counter()
                for index, count in bins.items():
                    merged[index // 2] += count
                self.times[name] = merged
        for name, value in row.items():
            if name in _NEEDED or name in {"breakpoint", "address", "root"} or value is None:
                continue
            self._value(name, value)

    def _value(self, name: str, value: object) -> None:
        if isinstance(value, list):
            shown = (self.name(value[0]) or hex(value[0])) if value and isinstance(value[0], int) else ""
        elif isinstance(value, str):
            shown = value
        else:
            return
        counted = self.values[name]
        if shown and (shown in counted or len(counted) < _KEPT_VALUES):
            counted[shown] += 1
        elif shown:
            counted[_OTHERS] += 1

    @property
    def seconds(self) -> float:
        """From the first row to the last."""
        return (self.last - (self.first or 0)) / 1e9

    def quantile(self, symbol: str, share: float) -> float:
        """Seconds that this share of a symbol's rows do not exceed; at most twice too long."""
        wanted, seen = share * self.symbols[symbol], 0
        for bits, count in sorted(self.holds[symbol].items()):
            seen += count
            if seen >= wanted:
                return min((1 << bits) - 1, self.hold_max[symbol]) / 1e9
        return 0.0


@click.command(context_settings={"show_default": True})
@click.argument("recording", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="The page; default: RECORDING with .html added.")
@click.option("--symbols", metavar="TARGET", help="Take the names of callers from TARGET; a Parquet file has them itself.")
@json_option
def report(recording: Path, output: Path | None, symbols: str | None, as_json: bool) -> None:
    """Turn a RECORDING (.parquet or .jsonl, of `vmitap trace -o`) into one HTML page.

    A Parquet file is read with pyarrow, which has to be installed.
    """
    if symbols is None:
        summary = _Summary(_names(recording).get)
        _read(recording, summary)
    else:
        with attach(symbols, None, None, "") as vm:
            summary = _Summary(vm.symbolize)
            _read(recording, summary)
    page = output or recording.with_name(recording.name + ".html")
    # It holds what the guest holds: a new page is its owner's alone.
    with os.fdopen(os.open(page, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(_page(recording.name, summary))
    out = Output(as_json=as_json)
    out.object({"page": str(page), "rows": summary.rows, "symbols": dict(summary.symbols)})
    out.text(f"{page}: {summary.rows} rows of {len(summary.symbols)} symbols")


def _read(recording: Path, summary: _Summary) -> None:
    for row in _rows(recording):
        summary.add(row)


def _names(path: Path) -> dict[int, str]:
    """The names of addresses that a file of vmitap has in its metadata."""
    if path.suffix != ".parquet":
        return {}
    metadata = _open(path).metadata.metadata or {}
    if not (text := metadata.get(_PLACES)):
        return {}
    try:
        places = json.loads(text)
        return {int(address, 16): str(name) for address, name in places.items()}
    except (ValueError, AttributeError, RecursionError):
        raise InvalidArgumentError("recording", f"{path}: what it says of its addresses makes no sense") from None


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    rows = _parquet(path) if path.suffix == ".parquet" else _lines(path)
    for number, row in enumerate(rows):
        missing = [name for name in _NEEDED if not isinstance(row, dict) or name not in row]
        if missing:
            raise InvalidArgumentError("recording", f"{path}: row {number} has no column {missing[0]!r}: it is no recording of vmitap")
        yield row


def _open(path: Path) -> ParquetFile:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise NotSupportedError("report", "Parquet files without the package pyarrow (pip install pyarrow)") from None
    try:
        return ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise InvalidArgumentError("recording", f"{path} is no Parquet file: {error}") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    file = _open(path)
    import pyarrow

    version = (file.schema_arrow.metadata or {}).get(_SCHEMA, _KNOWN)
    if version != _KNOWN:
        known, found = _KNOWN.decode(), version.decode("utf-8", "replace")
        reason = f"{path} has columns of version {found!r}; vmitap {__version__} reads version {known!r}: take the vmitap that wrote it"
        raise InvalidArgumentError("recording", reason)
    missing = [name for name in _NEEDED if name not in file.schema_arrow.names]
    if missing:
        raise InvalidArgumentError("recording", f"{path} has no column {missing[0]!r}: it is no recording of vmitap")
    try:
        for batch in file.iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InvalidArgumentError("recording", f"{path} is damaged: {error}") from None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise InvalidArgumentError("recording", f"{path}: line {number} is no JSON") from None


# --- the page ---


def _page(name: str, summary: _Summary) -> str:
    symbols = [symbol for symbol, _ in summary.symbols.most_common()]
    shown = symbols[: len(_COLOURS) - 1]
    colours = dict(zip(shown, _COLOURS, strict=False))
    facts = [
        ("rows", f"{summary.rows:,}"),
        ("time", f"{summary.seconds:.3f} s"),
        ("rate", per_second(summary.rows / summary.seconds) if summary.seconds else "-"),
        ("vCPUs", f"{len(summary.vcpus)}"),
        ("symbols", f"{len(symbols)}"),
    ]
    cards = "".join(f"<div class=card><b>{escape(value)}</b><span>{escape(label)}</span></div>" for label, value in facts)
    sections = [
        ("Timeline", _timeline(summary, shown, colours) + _legend(summary, shown, colours)),
        ("How long vCPUs stood still", _hold_chart(summary) + _hold_table(summary, symbols[:50], colours)),
        *((f"Most frequent {_title(column)}", _top(counts)) for column, counts in sorted(summary.values.items()) if counts),
    ]
    body = "".join(f"<section><h2>{escape(title)}</h2>{content}</section>" for title, content in sections)
    return _TEMPLATE.format(title=escape(name), cards=cards, body=body, version=escape(__version__))


def _title(column: str) -> str:
    return "callers" if column == "callers" else f"values of {column}"


def _timeline(summary: _Summary, shown: Sequence[str], colours: dict[str, str]) -> str:
    if not summary.rows:
        return "<p>There are no rows.</p>"
    first, last = (summary.first or 0), summary.last
    span = max(last - first, 1)
    stacks: list[Counter[str]] = [Counter() for _ in range(_BINS)]
    for symbol, bins in summary.times.items():
        key = symbol if symbol in colours else _OTHERS
        for index, count in bins.items():
            middle = min(max(index * summary.width + summary.width // 2, first), last)
            stacks[min((middle - first) * _BINS // span, _BINS - 1)][key] += count
    highest = max(sum(stack.values()) for stack in stacks)
    bars = []
    for place, stack in enumerate(stacks):
        low = 200.0
        for key in [*shown, _OTHERS]:
            if stack[key]:
                height = 190 * stack[key] / highest
                low -= height
                colour = colours.get(key, _COLOURS[-1])
                hint = f"{key}: {stack[key]:,} at {(first + place * span / _BINS) / 1e9:.3f} s"
                shape = f'x="{place * 8}" y="{low:.2f}" width="7" height="{height:.2f}" fill="{colour}"'
                bars.append(f"<rect {shape}><title>{escape(hint)}</title></rect>")
    marks = "".join(
        f'<text x="{960 * part // 4}" y="218" text-anchor="{anchor}">{(first + span * part / 4) / 1e9:.3f} s</text>'
        for part, anchor in enumerate(("start", "middle", "middle", "middle", "end"))
    )
    peak = f'<text x="0" y="8" class="dim">{highest:,} rows in {span / _BINS / 1e6:.3g} ms</text>'
    return f'<svg viewBox="0 0 960 224" role="img" aria-label="rows over time">{"".join(bars)}{marks}{peak}</svg>'


def _legend(summary: _Summary, shown: Sequence[str], colours: dict[str, str]) -> str:
    entries = [(symbol, colours[symbol], summary.symbols[symbol]) for symbol in shown]
    rest = summary.rows - sum(count for *_, count in entries)
    if rest:
        entries.append((_OTHERS, _COLOURS[-1], rest))
    items = "".join(
        f'<li><i style="background:{colour}"></i>{escape(name)} <small>{count:,}</small></li>' for name, colour, count in entries
    )
    return f"<ul class=legend>{items}</ul>"


def _hold_chart(summary: _Summary) -> str:
    total: Counter[int] = Counter()
    for holds in summary.holds.values():
        total.update(holds)
    if not total:
        return ""
    low, high = min(total), max(total)
    width, highest = 960 / (high - low + 1), max(total.values())
    parts = []
    for bits in range(low, high + 1):
        height = 130 * total[bits] / highest
        x = (bits - low) * width
        limit = microseconds(((1 << bits) - 1) / 1e9)
        parts.append(
            f'<rect x="{x:.1f}" y="{140 - height:.2f}" width="{width - 3:.1f}" height="{height:.2f}" fill="{_COLOURS[0]}">'
            f"<title>up to {escape(limit)}: {total[bits]:,} rows</title></rect>"
            f'<text x="{x + width / 2:.1f}" y="158" text-anchor="middle">{escape(limit)}</text>'
        )
    return f'<svg viewBox="0 0 960 164" role="img" aria-label="holding times">{"".join(parts)}</svg>'


def _hold_table(summary: _Summary, symbols: Sequence[str], colours: dict[str, str]) -> str:
    rows = "".join(
        f'<tr><td><i style="background:{colours.get(symbol, _COLOURS[-1])}"></i>{escape(symbol)}</td><td>{summary.symbols[symbol]:,}</td>'
        f"<td>{microseconds(summary.quantile(symbol, 0.5))}</td><td>{microseconds(summary.quantile(symbol, 0.99))}</td>"
        f"<td>{microseconds(summary.hold_max[symbol] / 1e9)}</td></tr>"
        for symbol in symbols
    )
    return f"<table><tr><th>symbol</th><th>rows</th><th>half</th><th>99 of 100</th><th>longest</th></tr>{rows}</table>"


def _top(counts: Counter[str]) -> str:
    highest = max(counts.values())
    rows = "".join(
        f"<tr><td class=value>{escape(value[:120])}</td>"
        f'<td class=bar><div style="width:{100 * count / highest:.1f}%"></div></td><td>{count:,}</td></tr>'
        for value, count in islice(counts.most_common(), 15)
    )
    more = len(counts) - 15
    note = f"<p class=dim>and {more:,} more</p>" if more > 0 else ""
    return f"<table>{rows}</table>{note}"


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>
:root {{ color-scheme: light dark; --ink: #1d2329; --dim: #66717c; --paper: #f6f7f8; --card: #fff; --line: #dde1e5; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e8ec; --dim: #94a0ab; --paper: #15191d; --card: #1e2429; --line: #333b43; }} }}
body {{ margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 64rem; font: 15px/1.5 system-ui, sans-serif; }}
body {{ color: var(--ink); background: var(--paper); }}
h1 {{ font-size: 1.4rem; margin: 0 0 1.2rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1rem; margin: 0 0 .8rem; }}
section, .card {{ background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.2rem; }}
section {{ margin-top: 1rem; }}
.cards {{ display: flex; flex-wrap: wrap; gap: .8rem; }}
.card {{ min-width: 7rem; }} .card b {{ display: block; font-size: 1.25rem; }} .card span, .dim, small {{ color: var(--dim); }}
svg {{ width: 100%; height: auto; display: block; }} svg text {{ font: 10px system-ui, sans-serif; fill: var(--dim); }}
.legend {{ list-style: none; padding: 0; margin: .8rem 0 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }}
i {{ display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .45em; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
td, th {{ text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); }}
td:first-child, th:first-child {{ text-align: left; }}
.value {{ font-family: ui-monospace, monospace; overflow-wrap: anywhere; }}
.bar {{ width: 40%; }} .bar div {{ background: #3b6ea5; height: .7rem; border-radius: 2px; }}
footer {{ margin-top: 1.5rem; color: var(--dim); font-size: .85rem; }}
</style></head><body><h1>{title}</h1><div class="cards">{cards}</div>{body}<footer>vmitap {version}</footer></body></html>
"""
