"""Bochs: a PC with VMX, EPT, execute-only pages and the monitor trap flag, on a machine that needs none of them."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import time
import tty
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .bootdisk import BootDisk

# 3.0 is the first that Debian ships with the monitor trap flag, without which Xen cannot single-step.
SUITE = "trixie"
PACKAGES = Path(__file__).parents[1] / "bochs-packages.txt"
TAIL_LINES = 40
# Instructions in a second of the emulated clock, by which timer interrupts come: with 60 million, those of a Linux guest with two vCPUs on
# Xen 4.17 left it hardly any time for anything else. `lpj` in dom0/linux_guest.py follows from it.
IPS = 200_000_000
SCREEN = re.compile(r'connected to screen "(.*)"')

CONFIG = """\
plugin_ctrl: biosdev=true, serial=true, unmapped=true, iodebug=false, parallel=false, gameport=false, extfpuirq=false, speaker=false
config_interface: textconfig
display_library: term
cpu: model=corei7_skylake_x, count=1, ips={ips}, reset_on_triple_fault=0, ignore_bad_msrs=1
memory: guest={memory}, host={memory}
romimage: file={root}/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file={root}/usr/share/vgabios/vgabios.bin
optromimage1: file={boot.rom}, address=0xd0000
boot: disk
ata0-master: type=disk, mode=flat, path={boot.image}, cylinders={boot.cylinders}, heads=16, spt=63
ata0-slave: type=disk, mode=flat, path={job}, cylinders={job_cylinders}, heads=16, spt=63
com1: enabled=1, mode=file, dev=serial.raw
log: bochs.log
panic: action=report
error: action=ignore
info: action=ignore
clock: sync=none, time0=1700000000
vga: extension=none, update_freq=1
"""


class Bochs:
    """One run, in a folder that then holds `serial.log`: each line of the serial port with its time in seconds."""

    def __init__(self, root: Path, folder: Path, boot: BootDisk, job: Path, job_cylinders: int, memory: int) -> None:
        self._folder = folder
        self._raw = folder / "serial.raw"
        self._read = 0
        self._line = b""
        self._said = folder / "bochs.err"
        self.lines: list[str] = []
        for stale in [*folder.glob("*.lock"), self._raw]:
            stale.unlink(missing_ok=True)
        config = CONFIG.format(ips=IPS, memory=memory >> 20, root=root, boot=boot, job=job, job_cylinders=job_cylinders)
        (folder / "bochsrc").write_text(config)
        libraries = root / "usr/lib/x86_64-linux-gnu"
        command = [libraries / "ld-linux-x86-64.so.2", "--library-path", libraries, root / "usr/bin/bochs-bin", "-q", "-f", "bochsrc"]
        env = os.environ | {
            "LTDL_LIBRARY_PATH": str(libraries / "bochs/plugins"),
            "BXSHARE": str(root / "usr/share/bochs"),
            "TERM": "xterm",
        }
        self._began = time.monotonic()
        self._log = (folder / "serial.log").open("w")
        # The debugger's terminal, on which "continue" is typed.
        self._terminal, keyboard = pty.openpty()
        self._screen: int | None = None
        words = [str(word) for word in command]
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                words, cwd=folder, stdin=keyboard, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True, env=env
            )
        os.close(keyboard)
        os.write(self._terminal, b"c\n")  # this build has the debugger, which waits for "continue"

    def output(self, limit: float) -> Iterator[str]:
        """The lines of the serial port as they come, until the machine is switched off or `limit` seconds are over."""
        while True:
            over = self._process.poll() is not None or time.monotonic() - self._began > limit
            self._look_at_screen()
            yield from self._new_lines()
            if over:
                return
            time.sleep(0.05)

    def _look_at_screen(self) -> None:
        """Throws away what is shown. Bochs makes a terminal of its own for it, says which, and stops when that is full."""
        if self._screen is None and (name := SCREEN.search(self._said.read_text(errors="replace"))):
            self._screen = os.open(name[1], os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
            tty.setraw(self._screen)
        try:
            while self._screen is not None and os.read(self._screen, 1 << 16):
                pass
        except OSError:  # there is no more; or, once Bochs has ended, no other side
            pass

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def close(self) -> None:
        """Ends this Bochs, if it is still there."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for terminal in (self._terminal, self._screen):
            if terminal is not None:
                os.close(terminal)
        self._log.close()

    def tail(self) -> str:
        if not self.lines:
            return f"(none; Bochs itself says:)\n{self._said.read_text(errors='replace')}"
        lines = [line for line in [*self.lines, self._line.decode("utf-8", errors="replace")] if "(XEN) HVM" not in line]
        return "\n".join(lines[-TAIL_LINES:])

    def _new_lines(self) -> Iterator[str]:
        if not self._raw.exists():
            return
        with self._raw.open("rb") as raw:
            raw.seek(self._read)
            new = raw.read()
        self._read += len(new)
        self._line += new.replace(b"\0", b"").replace(b"\r", b"")
        *lines, self._line = self._line.split(b"\n")
        for line in lines:
            text = line.decode("utf-8", errors="replace")
            self._log.write(f"{self.elapsed:7.1f} {text}\n")
            self.lines.append(text)
            yield text
        self._log.flush()
