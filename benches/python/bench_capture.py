"""What a filtered hit, a captured row and a written row cost beyond the bare hit, which is counted and stepped over.

`make bench-parts` runs it; by hand: `python benches/python/bench_capture.py [--hits N] [--turns N] [--json]`. Everything is measured in
this one run, in turns, in processor time of all threads together, and the best of the turns counts. Each way must account for every call,
or there is no result.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING

import vmitap
from vmitap import Arg, Cstr, Filter, Reg

if TYPE_CHECKING:
    from vmitap import Filter as _Filter
    from vmitap.capture import Capturable

BARE = "counted only"
NUMBERS: dict[str, Capturable] = {"a": Arg(0), "b": Arg(1), "c": Reg.rip, "d": Reg.rsp}
WAYS: dict[str, tuple[_Filter | None, dict[str, Capturable] | None, str]] = {
    BARE: (None, None, ""),
    "filtered by a number": (Arg(1) >> 32 > 1 << 31, None, ""),
    "filtered by three conditions": (Filter.ring(0) & ~Filter.root(0) & (Arg(0) == 0), None, ""),
    "filtered by a string": (Cstr(Arg(0)) == "/etc/shadow", None, ""),
    "captured: 4 numbers": (None, NUMBERS, ""),
    "captured: 3 numbers, 1 string": (None, {**NUMBERS, "d": Cstr(Arg(0), max=64)}, ""),
    "captured: 4 numbers, to Parquet": (None, NUMBERS, "parquet"),
    "counted, with the journal of events": (None, None, "journal"),
}
FILTER_NS = 50
ROWS_PER_SECOND = 1_000_000


def measure(way: str, hits: int, folder: Path) -> float:
    """Nanoseconds a call."""
    where, capture, written = WAYS[way]
    with vmitap.attach("demo", cmdline=f"mode=calls calls={hits} check=0") as vm:
        vm.breakpoint("open_file", where=where, capture=capture)
        file = vm.record_to(folder / "hits.parquet") if written == "parquet" else None
        if written == "journal":
            vm.journal.open(folder / "last.events", replace=True)
        begin = process_time()
        result = vm.run(timeout=600)
        if file:
            file.close()
        elapsed = process_time() - begin
        rows, lost = vm.recording.rows, vm.recording.lost
    expected = (0, hits, 0, 0) if where is not None else (hits, 0, hits if capture else 0, 0)
    if (result.hits, result.filtered, rows, lost) != expected or result.py_calls:
        raise SystemExit(f"{way}: {result}, {rows} rows, {lost} lost")
    return elapsed / hits * 1e9


def main() -> None:
    """Measures, prints, and says which targets are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hits", type=int, default=200_000, help="calls a turn (default %(default)s)")
    parser.add_argument("--turns", type=int, default=7, help="turns, of which the best counts (default %(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.turns):
            for way in WAYS:
                cost = measure(way, options.hits, Path(folder))
                best[way] = min(cost, best.get(way, cost))
    if options.json:
        print(json.dumps({"nanoseconds": best}))
        return
    print(f"\n{'a call of a tapped function':<40}{'ns':>10}{'ns beyond':>12}{'rows/s beyond':>16}")
    for way, cost in best.items():
        beyond = cost - best[BARE]
        rows = f"{1e9 / beyond:>16,.0f}" if way.startswith("captured") and beyond > 0 else ""
        print(f"{way:<40}{cost:>10.0f}{beyond:>12.0f}{rows}")
    filtered = best["filtered by a number"] - best[BARE]
    captured = best["captured: 4 numbers"] - best[BARE]
    print(f"filtered: {'met' if filtered <= FILTER_NS else 'MISSED'}: at most {FILTER_NS} ns beyond the step wanted")
    print(
        f"captured: {'met' if captured * ROWS_PER_SECOND <= 1e9 else 'MISSED'}: at least {ROWS_PER_SECOND:,} rows/s beyond the step wanted"
    )


if __name__ == "__main__":
    main()
