"""What a Python handler costs, alone and beside a busy Python thread, and that what needs no handler costs the same beside it.

`make bench-parts` runs it; by hand: `python benches/python/bench_dispatch.py [--hits N] [--turns N] [--json]`. The times are the best of
the turns: compare those of one run. `busy` is the processor time of the thread that runs the guest, `call` the time by the wall clock;
`held` is how long vCPUs stood still for a hit, as vmitap itself measures it.

Hits that follow each other closely keep the interpreter; one that comes alone has to get it back, for which a busy thread makes it wait one
switch interval (`sys.setswitchinterval`, 5 ms unless it is set).
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from dataclasses import asdict, astuple, dataclass
from time import perf_counter, thread_time
from typing import TYPE_CHECKING

import vmitap
from vmitap import Arg, Filter, Reg

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmitap.capture import Capturable

ALONE = 1000
"""Of so many calls one has a handler, where hits come alone."""


@dataclass(frozen=True)
class Cost:
    """Microseconds: of the processor and by the wall clock for a call, and how long half and 99 of 100 of the hits held their vCPU."""

    busy: float
    call: float
    held_p50: float
    held_p99: float


def nothing(hit: vmitap.Hit) -> None:
    """The shortest handler."""


@dataclass(frozen=True)
class Way:
    """What is done with a hit."""

    handler: Callable[[vmitap.Hit], None] | None = None
    where: Filter | None = None
    capture: dict[str, Capturable] | None = None
    budget: vmitap.Budget | None = None


WAYS = {
    "counted": Way(),
    "counted, as an event": Way(budget=vmitap.Budget(per_second=1 << 40)),
    "filtered out": Way(where=Arg(1) == 1 << 63),
    "4 columns captured": Way(capture={"a": Arg(0), "b": Arg(1), "c": Reg.rip, "d": Reg.rsp}),
    "handler, hits in a crowd": Way(nothing),
    "handler, hits one by one": Way(nothing, where=Filter.every(ALONE)),
}
"""What is only counted raises no event, unless there is a budget that is to be charged for it."""


def measure(way: str, hits: int) -> Cost:
    """One way, once."""
    how = WAYS[way]
    with vmitap.attach("demo", cmdline=f"mode=calls calls={hits} check=0") as vm:
        bp = vm.breakpoint("open_file", how.handler, where=how.where, capture=how.capture, budget=how.budget)
        begin, begin_busy = perf_counter(), thread_time()
        result = vm.run(timeout=600)
        elapsed, busy = perf_counter() - begin, thread_time() - begin_busy
        if result.hits + result.filtered != hits or (how.handler is None) != (result.py_calls == 0):
            raise SystemExit(f"{way}: {result}")
        return Cost(busy / hits * 1e6, elapsed / hits * 1e6, bp.stats.hold_p50 * 1e6, bp.stats.hold_p99 * 1e6)


def best_of(hits: int, turns: int) -> dict[str, Cost]:
    """All ways, the best of the turns of each figure."""
    best: dict[str, Cost] = {}
    for _ in range(turns):
        for way in WAYS:
            now = measure(way, hits)
            fields = zip(*(astuple(each) for each in (now, best.get(way, now))), strict=True)
            best[way] = Cost(*(min(pair) for pair in fields))
    return best


def beside(hits: int, turns: int, interval: float) -> dict[str, Cost]:
    """The same beside a thread that never waits."""
    before, ends = sys.getswitchinterval(), threading.Event()

    def spin() -> None:
        while not ends.is_set():
            pass

    busy = threading.Thread(target=spin)
    busy.start()
    sys.setswitchinterval(interval)
    try:
        return best_of(hits, turns)
    finally:
        sys.setswitchinterval(before)
        ends.set()
        busy.join()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hits", type=int, default=50_000, help="calls a turn (default %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="turns, of which the best counts (default %(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    measured = {
        "alone": best_of(options.hits, options.turns),
        "beside a busy thread": beside(options.hits, options.turns, 5e-3),
        "beside it, setswitchinterval(0.0001)": beside(options.hits, options.turns, 1e-4),
    }
    if options.json:
        print(json.dumps({where: {way: asdict(cost) for way, cost in costs.items()} for where, costs in measured.items()}))
        return
    print(f"\n{'us':<40}{'busy':>12}{'call':>12}{'held p50':>12}{'held p99':>12}")
    for where, costs in measured.items():
        print(where)
        for way, cost in costs.items():
            print(f"  {way:<38}{cost.busy:>12.2f}{cost.call:>12.2f}{cost.held_p50:>12.2f}{cost.held_p99:>12.2f}")
    alone = measured["alone"]
    dispatch = alone["handler, hits in a crowd"].busy - alone["counted"].busy
    print(f"a handler: {dispatch:.2f} us beyond the same hit counted; {'met' if dispatch <= 0.5 else 'MISSED'}: at most 0.5 us wanted")


if __name__ == "__main__":
    main()
