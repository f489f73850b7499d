"""Runs the project's tests on real Xen: see docs/xen-lab.md, or `make xen-lab`."""

from __future__ import annotations

import argparse
import fcntl
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import bochs, coverage
from .apt import Suite
from .host import check_host
from .kernel import kernel
from .machine import machines
from .release import RELEASES
from .step import begin_lines_with, say, step
from .verdict import verdict

if TYPE_CHECKING:
    from .machine import Machine

# A machine needs half a minute until its first test, and a good 600 MiB.
MOST_PARTS = 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="xen-lab", description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel to install in dom0")
    parser.add_argument("--xen", choices=[*RELEASES, "all"], default="all", help="which release")
    parser.add_argument("--vcpus", type=int, default=2, help="how many vCPUs the guests have")
    parser.add_argument("--parts", type=int, help="machines a release, which share its tests (as many as there are processors for)")
    parser.add_argument("--filter", default="", help="run only these tests (pytest -k)")
    parser.add_argument("--long", action="store_true", help="also the tests that take minutes")
    parser.add_argument("--pytest", default="", help="further arguments for pytest")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where downloads and builds are kept")
    parser.add_argument("--limit", type=float, default=1500, help="seconds that a machine may take")
    parser.add_argument("--coverage", type=Path, help="the instrumented library that the wheel holds, not stripped")
    parser.add_argument("--build-only", action="store_true", help="fetch and build everything, start nothing")
    return parser.parse_args()


def default_cache() -> Path:
    given = os.environ.get("VMITAP_LAB_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmitap-lab"


def main() -> int:
    # Whatever ends this program, it ends its Bochs: the `finally` of machine.run has to be reached.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    options = arguments()
    cache = options.cache.absolute()
    with step("what the lab needs from this machine"):
        check_host()
        cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("    another run uses the cache; waiting for its end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        return run(options, cache)


def run(options: argparse.Namespace, cache: Path) -> int:
    suites = {name: Suite(name, cache / f"apt-{name}") for name in ("bookworm", "trixie")}
    with step("Linux (the first build takes 7 minutes of one processor)"):
        linux = kernel(suites["bookworm"], cache)
    with step("Bochs"):
        packages = [name for line in bochs.PACKAGES.read_text().splitlines() if not line.startswith("#") for name in line.split()]
        emulator = suites[bochs.SUITE].unpack(packages, cache / "bochs")
    wanted = [release for release in RELEASES.values() if options.xen in (release.xen, "all")]
    processors = len(os.sched_getaffinity(0))
    parts = options.parts or min(MOST_PARTS, max(1, processors // len(wanted)))
    made: dict[str, list[Machine]] = {}
    for release in wanted:
        with step(f"Xen {release.xen}: Debian's packages"):
            root = suites[release.suite].unpack(release.packages, cache / f"xen-{release.xen}")
        made[release.xen] = machines(release, root, linux, emulator, options, cache, parts)
    if options.build_only:
        return 0
    everyone = [each for of_one in made.values() for each in of_one]
    together = len(everyone) > 1 and (processors > 1 or parts > 1)
    statuses = iter(side_by_side(everyone) if together else [each.run() for each in everyone])
    found = []
    for xen, of_one in made.items():
        parts_of_one = {each.results: next(statuses) for each in of_one}
        results = cache / f"run-{xen}/results"
        found.append(verdict(xen, parts_of_one, results / "junit.xml"))
        if options.coverage:
            with step(f"Xen {xen}: coverage"):
                coverage.report(list(parts_of_one), results, options.coverage)
    return max(found)


def side_by_side(machines: list[Machine]) -> list[int]:
    """The statuses. Bochs uses one processor: each machine has a process of its own, whose lines begin with its name."""

    def child(machine: Machine) -> None:
        begin_lines_with(f"{machine.name} | ")
        sys.exit(machine.run())

    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=child, args=(each,)) for each in machines]
    try:
        for each in children:
            each.start()
        for each in children:
            each.join()
    finally:
        for each in children:
            each.terminate()
        for each in children:
            each.join()
    return [abs(each.exitcode or 0) for each in children]


sys.exit(main())
