"""The machines of one release: dom0's images, the job, and the boot. Each machine runs a share of the tests."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import bootdisk, job
from .bochs import Bochs
from .guests import demo_image, faults_library, linux_initramfs
from .initramfs import DOM0, initramfs
from .python import byte_code, python
from .root import Root
from .step import LabError, say, step

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from .bootdisk import BootDisk
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


@dataclass(frozen=True)
class Machine:
    """One of those that share the tests of a release."""

    name: str  # "4.20" if it has all tests, or "4.20/1"
    folder: Path
    emulator: Path
    boot: BootDisk
    job: dict[str, bytes]
    limit: float

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def run(self) -> int:
        """The exit status of its tests; the results are in the folder."""
        self.folder.mkdir(exist_ok=True)
        boot, disk = self.boot, self.folder / "job.img"
        if boot.image.parent != self.folder:
            # Bochs locks a disk by its name; nobody writes to this one.
            boot = replace(boot, image=self.folder / boot.image.name)
            boot.image.symlink_to(self.boot.image)
        job.write(disk, self.job)
        with step(f"Xen {self.name}: boot, and the tests in dom0"):
            pc = Bochs(self.emulator, self.folder, boot, disk, job.CYLINDERS, MEMORY)
            up = False
            try:
                for line in pc.output(self.limit):
                    up = up or line == UP
                    if up and (shown := NOISE.sub("", line).rstrip()):
                        say(f"    {pc.elapsed:6.1f}  {shown}")
            finally:
                pc.close()
            status = job.results(disk, self.results)
            if status is None:
                raise LabError(f"no results came back. The serial port's last lines (all are in {self.folder}/serial.log):\n{pc.tail()}")
        say(f"    results, Xen's own log and those of the guests: {self.results}")
        return status


def machines(
    release: Release, packages: Path, linux: Path, emulator: Path, options: argparse.Namespace, cache: Path, parts: int
) -> list[Machine]:
    """Makes the images of a release, and the machines that start from them."""
    folder = cache / f"run-{release.xen}"
    shutil.rmtree(folder, ignore_errors=True)  # the last run may have had more parts
    folder.mkdir()
    with step(f"Xen {release.xen}: images"):
        root = Root(release, packages)
        libraries = python(root, cache)
        guest = {name: linux / name for name in ("vmlinux", "System.map")} | {"linux-guest.cpio": linux_initramfs(folder)}
        boot = bootdisk.make(
            folder,
            xen=root.xen(),
            kernel=(linux / "vmlinux").read_bytes(),
            initramfs=initramfs(root, libraries, {f"boot/{name}": path for name, path in guest.items()}),
            memory=MEMORY,
            xen_line=XEN_LINE,
            kernel_line=KERNEL_LINE,
        )
        files = _job_files(options) | {"libfaults.so": faults_library(folder, release.xen)}
        files |= byte_code(root, libraries, files, folder / "job")
    folders = [folder] if parts == 1 else [folder / str(n) for n in range(1, parts + 1)]
    names = [str(each.relative_to(cache)).removeprefix("run-") for each in folders]
    jobs = [files | {"arguments": _arguments(options, f"{n}/{parts}")} for n in range(1, parts + 1)]
    return [Machine(name, each, emulator, boot, job, options.limit) for name, each, job in zip(names, folders, jobs, strict=True)]


def _job_files(options: argparse.Namespace) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in DOM0.glob("*.py") if path.name != "agent.py"}
    files["vcpus"] = str(options.vcpus).encode()
    files[options.wheel.name] = options.wheel.read_bytes()
    files["demo.elf"] = demo_image(options.wheel)
    return files


def _arguments(options: argparse.Namespace, part: str) -> bytes:
    arguments = [
        *PYTEST.split(),
        *("-p", "parts", "--part", part),
        *shlex.split(options.pytest),
        *([] if options.long else ["-m", "not long"]),
        *(["-k", options.filter] if options.filter else []),
    ]
    return "\0".join([str(options.limit), *arguments]).encode()
