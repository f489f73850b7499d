"""What a hit costs, next to the same hidden breakpoint in plain `unicorn` (peer.py).

`make bench-parts` runs it; by hand: `python benches/python/bench_dance.py [--hits N] [--turns N] [--json]`. Everything is measured in
this one run, in turns, and the best of the turns counts: compare the ratios, not the times of two machines. Each way must count every
hit, or there is no result.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING

import peer

import vmitap

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "guests"))
from build import build

if TYPE_CHECKING:
    from collections.abc import Callable


WAYS = ("vmitap, no handler", "vmitap, Python handler", "unicorn, two instances", "unicorn, byte swapped")
PEERS = {"unicorn, two instances": "stepper", "unicorn, byte swapped": "swap"}
TARGETS = {"vmitap, no handler": 45, "vmitap, Python handler": 15}
"""How many times faster than the same in plain unicorn each must be."""


def handler(hit: vmitap.Hit) -> None:
    """Looks at one register, as the peer does."""
    _ = hit.regs.rdi


def ours(guest: str, hits: int, function: Callable[[vmitap.Hit], None] | None) -> float:
    """Microseconds a hit, from the first call on: there the peer begins too. Until then the guest boots, and reads the page to know it."""
    with vmitap.attach(f"emu:{guest}", cmdline=f"n={hits + 2} every=0") as vm:
        vm.breakpoint("f", function)
        vm.run(timeout=600, max_hits=1)
        begin = process_time()
        result = vm.run(timeout=600, max_hits=hits)
        elapsed = process_time() - begin
        executed = vm.read_u64("f_count") + 1
        vm.run(timeout=600)
        seen = sum(vm.read_u64(vm.symbol("mismatches") + 8 * kind) for kind in range(10))
    if (result.hits, executed, seen) != (hits, hits + 1, 0):
        raise SystemExit(f"vmitap: {result.hits} hits of {executed} calls, {seen} mismatches seen by the guest")
    return elapsed / hits * 1e6


def theirs(guest: str, hits: int, way: str) -> float:
    """Microseconds a hit."""
    result = peer.measure(guest, way, hits)
    if (result.hits, result.executed, result.seen) != (hits, hits, 0):
        raise SystemExit(f"unicorn, {way}: {result}")
    return result.microseconds


def dance(guest: str, hits: int, turns: int) -> dict[str, float]:
    """Microseconds a hit for each way; the slow ones get fewer hits."""
    best: dict[str, float] = {}
    for _ in range(turns):
        for way in WAYS:
            if way in PEERS:
                cost = theirs(guest, hits // 20, PEERS[way])
            else:
                cost = ours(guest, hits, handler if way == "vmitap, Python handler" else None)
            best[way] = min(cost, best.get(way, cost))
    return best


def main() -> None:
    """Measures, prints, and says which targets are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hits", type=int, default=100_000, help="hits a turn (default %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="turns, of which the best counts (default %(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        guest = str(build("calls.S", Path(folder, "calls.elf")))
        costs = dance(guest, options.hits, options.turns)
    ratios = {way: {name: costs[name] / costs[way] for name in PEERS} for way in TARGETS}
    if options.json:
        print(json.dumps({"microseconds": costs, "ratios": ratios}))
        return
    print(f"\n{'a hidden breakpoint: hit, step, back':<40}{'us a hit':>10}{'hits/s':>12}", *(f"{f'x {name}':>28}" for name in PEERS))
    for way, cost in costs.items():
        against = (f"{costs[name] / cost:>28.1f}" for name in PEERS)
        print(f"{way:<40}{cost:>10.2f}{1e6 / cost:>12,.0f}", *against)
    for way, target in TARGETS.items():
        for name in PEERS:
            print(f"{way}: {ratios[way][name]:.1f} times {name}; {_met(ratios[way][name] >= target)} {target} wanted")


def _met(good: bool) -> str:
    return "met:" if good else "MISSED:"


if __name__ == "__main__":
    main()
