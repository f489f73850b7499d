"""One run of one release: dom0's images, the job, the boot, and what the tests said."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from . import bootdisk, coverage, job
from .bochs import Bochs
from .guests import demo_image, faults_library, linux_initramfs
from .initramfs import DOM0, initramfs
from .python import python
from .root import Root
from .step import LabError, say, step

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from .release import Release

MEMORY = 512 << 20
DOM0_MEMORY = "400M"
XEN_LINE = (
    f"console=com1 com1=115200,8n1 altp2m=1 apicv=0 loglvl=warning guest_loglvl=all dom0_mem={DOM0_MEMORY},max:{DOM0_MEMORY} "
    "dom0_max_vcpus=1 noreboot bootscrub=0 sched_ratelimit_us=0 spec-ctrl=no xpti=0 pv-l1tf=0"
)
KERNEL_LINE = "console=hvc0 quiet mitigations=off"
UP = "=== dom0 is up"
# What Xen says whenever a guest is made; like what it says about itself at the start, it is in serial.log only.
NOISE = re.compile(r"\(XEN\) HVM.*")
PYTEST = "-v -p no:cacheprovider -o addopts= --strict-markers --color=no --durations=10 --tb=short"


def run(release: Release, packages: Path, linux: Path, emulator: Path, options: argparse.Namespace, cache: Path) -> int:
    """The exit status of the tests."""
    folder = cache / f"run-{release.xen}"
    folder.mkdir(exist_ok=True)
    with step(f"Xen {release.xen}: images"):
        root = Root(release, packages)
        guest = {name: linux / name for name in ("vmlinux", "System.map")} | {"linux-guest.cpio": linux_initramfs(folder)}
        boot = bootdisk.make(
            folder,
            xen=root.xen(),
            kernel=(linux / "vmlinux").read_bytes(),
            initramfs=initramfs(root, python(root, cache), {f"boot/{name}": path for name, path in guest.items()}),
            memory=MEMORY,
            xen_line=XEN_LINE,
            kernel_line=KERNEL_LINE,
        )
        disk, results = folder / "job.img", folder / "results"
        job.write(disk, _job_files(options) | {"libfaults.so": faults_library(folder, release.xen)})
    if options.build_only:
        return 0
    with step(f"Xen {release.xen}: boot, and the tests in dom0"):
        pc = Bochs(emulator, folder, boot, disk, job.CYLINDERS, MEMORY)
        up = False
        try:
            for line in pc.output(options.limit):
                up = up or line == UP
                if up and (shown := NOISE.sub("", line).rstrip()):
                    say(f"    {pc.elapsed:6.1f}  {shown}")
        finally:
            pc.close()
        status = job.results(disk, results)
        if status is None:
            raise LabError(f"no results came back. The serial port's last lines (all are in {folder}/serial.log):\n{pc.tail()}")
    say(f"    results, Xen's own log and those of the guests: {results}")
    if options.coverage:
        with step(f"Xen {release.xen}: coverage"):
            coverage.report(results, options.coverage)
    return verdict(release, status, results / "junit.xml")


def _job_files(options: argparse.Namespace) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in DOM0.glob("*.py") if path.name != "agent.py"}
    arguments = [
        *PYTEST.split(),
        *shlex.split(options.pytest),
        *([] if options.long else ["-m", "not long"]),
        *(["-k", options.filter] if options.filter else []),
    ]
    files["arguments"] = "\0".join([str(options.limit), *arguments]).encode()
    files["vcpus"] = str(options.vcpus).encode()
    files[options.wheel.name] = options.wheel.read_bytes()
    files["demo.elf"] = demo_image(options.wheel)
    return files


def verdict(release: Release, status: int, junit: Path) -> int:
    """A test that was skipped is a failure, and so is a run without tests."""
    if not junit.exists():
        say(f"xen-lab: Xen {release.xen}: pytest left no results, its status was {status}")
        return status or 1
    suite = next(ElementTree.parse(junit).iter("testsuite"))
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    said = ", ".join(f"{number} {name}" for name, number in count.items())
    say(f"xen-lab: Xen {release.xen}: {said}; status {status}")
    if count["skipped"] or not count["tests"]:
        say("xen-lab: every test must run")
        return status or 1
    return status
