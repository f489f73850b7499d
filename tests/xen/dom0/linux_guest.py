"""The Linux guest: Debian's kernel with one program, tests/xen/guests/linux_init.c, which counts what it does in a page of its own."""

from __future__ import annotations

from pathlib import Path

from domain import VCPUS, Domain, Start, wait_for

MEMORY = 64  # MiB
TRUTH = (MEMORY - 1) << 20
KERNEL_WINDOW = 0xFFFFFFFF80000000  # virtual = physical + this, for the kernel's image (Documentation/x86/x86_64/mm.rst)
TAPPED = "do_sys_openat2"
CALLS = 10  # openat calls in a round
CONSOLE = Path("/var/log/xen/console/guest-linux.log")


def address(name: str) -> int:
    """The virtual address of a symbol of the kernel, from its System.map."""
    for line in Path("/boot/System.map").read_text().splitlines():
        value, _, symbol = line.split()
        if symbol == name:
            return int(value, 16)
    raise AssertionError(f"System.map has no {name}")


def start_linux(start: Start) -> Domain:
    """A Linux guest that has come up and waits to be told how many rounds to work."""
    CONSOLE.unlink(missing_ok=True)  # of an earlier guest of the same name
    code = address(TAPPED) - KERNEL_WINDOW
    # lpj: no calibration, it is the speed of the emulated clock (lab/bochs.py) through HZ, which is 100.
    # mem: the kernel leaves the truth page alone.
    words = f"console=hvc0 quiet mitigations=off lpj=2000000 mem={MEMORY - 1}M -- truth={TRUTH:#x} code={code:#x}"
    guest = start("linux", "/boot/vmlinux", words, memory=MEMORY, more='ramdisk="/boot/linux-guest.cpio"')
    wait_for("Linux", lambda: CONSOLE.exists() and f"linux guest: {VCPUS} vCPUs" in CONSOLE.read_text(errors="replace"), limit=60)
    return guest
