"""Runs the project's tests on real Xen: see docs/xen-lab.md, or `make xen-lab`."""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
from pathlib import Path

from . import bochs, machine
from .apt import Suite
from .host import check_host
from .kernel import kernel
from .release import RELEASES
from .step import say, step


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="xen-lab", description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel to install in dom0")
    parser.add_argument("--xen", choices=[*RELEASES, "all"], default="all", help="which release")
    parser.add_argument("--vcpus", type=int, default=2, help="how many vCPUs the guests have")
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
    worst = 0
    for release in RELEASES.values():
        if options.xen not in (release.xen, "all"):
            continue
        with step(f"Xen {release.xen}: Debian's packages"):
            root = suites[release.suite].unpack(release.packages, cache / f"xen-{release.xen}")
        worst = max(worst, machine.run(release, root, linux, emulator, options, cache))
    return worst


sys.exit(main())
