"""What inserting many breakpoints costs, taking them out again, and what each holds beside the shadow pages.

`make bench-parts` runs it; by hand: `python benches/python/bench_insertion.py [--turns N] [--json]`. The times are the best of the turns.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import tracemalloc
from pathlib import Path
from time import process_time

import vmitap

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "guests"))
from build import build

PAGES = 25_000
PER_PAGE = 4
MEMORY = 256 << 20
FIRST_PAGE = 0x1000000
"""Physical, and virtual too: the boot tables map the low 4 GiB one to one."""
SECONDS = 1.0
BYTES = 250
"""What it may take: to insert them all, and for each."""


class _Heap(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33 or newer."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def heap() -> int:
    """Bytes that this process has from malloc: what the compiled module keeps. Guest memory and shadow pages are mapped, not in it."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _Heap
    state = ask()
    return int(state.uordblks + state.hblkhd)


def insertion(guest: str, turns: int) -> dict[str, float]:
    """Inserting 100,000 breakpoints into 25,000 pages, taking them out, and what each holds beside the shadow pages."""
    addresses = [FIRST_PAGE + 4096 * page + 1000 * place for page in range(PAGES) for place in range(PER_PAGE)]
    best: dict[str, float] = {}
    for turn in range(turns + 1):
        counting = turn == turns
        with vmitap.attach(f"emu:{guest}", memory=MEMORY) as vm:
            # Guest memory is there only once it has been touched; that must not be measured.
            for page in range(PAGES):
                vm.write_pa(FIRST_PAGE + 4096 * page, bytes(4096))
            gc.collect()
            before = heap()
            if counting:
                tracemalloc.start()
            begin = process_time()
            breakpoints = vm.insert_many(addresses)
            elapsed = process_time() - begin
            if (len(vm.breakpoints), vm.stats.shadow_frames) != (len(addresses), PAGES):
                raise SystemExit(f"{len(vm.breakpoints)} breakpoints in {vm.stats.shadow_frames} shadow pages")
            if any(each.state != "active" for each in breakpoints):
                raise SystemExit("a breakpoint is not active")
            if counting:
                figures = {"bytes_python": tracemalloc.get_traced_memory()[0] / len(addresses)}
                tracemalloc.stop()
            else:
                figures = {"seconds": elapsed, "bytes_rust": (heap() - before) / len(addresses)}
            begin = process_time()
            vm.detach()
            figures["removal_seconds"] = process_time() - begin
        # Else they would be freed while the next turn measures.
        del vm, breakpoints
        best.update({name: min(value, best.get(name, value)) for name, value in figures.items()})
    return {"breakpoints": len(addresses), "pages": PAGES, **best}


def main() -> None:
    """Measures, prints, and says which targets are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3, help="turns that are timed (default %(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = insertion(str(build("calls.S", Path(folder, "calls.elf"))), options.turns)
    if options.json:
        print(json.dumps(figures))
        return
    each = figures["bytes_rust"] + figures["bytes_python"]
    print(
        f"\n{figures['breakpoints']:,.0f} breakpoints into {PAGES:,} pages: {figures['seconds']:.3f} s to insert, "
        f"{figures['removal_seconds']:.3f} s to restore; beside the shadow pages each holds {each:.0f} bytes, "
        f"{figures['bytes_python']:.0f} of them for its Python object and its place in the list of all\n"
        f"{'met' if figures['seconds'] < SECONDS else 'MISSED'}: under {SECONDS:.0f} s wanted; "
        f"{'met' if each < BYTES else 'MISSED'}: under {BYTES} bytes wanted"
    )


if __name__ == "__main__":
    main()
