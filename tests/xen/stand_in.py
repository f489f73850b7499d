"""The stand-in for Xen's libraries (crates/xen-sys/fake), and programs that are run on it: one domain, and vCPUs of a handful of
instructions. Each program is a process of its own, because the library is named in its environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "crates" / "xen-sys" / "fake" / "fake.c"

# A guest that calls 0x8000 in a loop and reads the first byte there each time round; page tables that map every address to itself.
PREPARE = """
import ctypes, os, vmitap
fake = ctypes.CDLL(os.environ["VMITAP_LIBXENCTRL"])
fake.fake_memory.restype = ctypes.c_void_p
fake.fake_knob.restype = ctypes.POINTER(ctypes.c_long)
fake.fake_regs.restype = ctypes.POINTER(ctypes.c_uint64)
fake.fake_state.restype = fake.fake_calls.restype = ctypes.c_long
RAX, RBX, RSP, RIP = 0, 3, 4, 19
CODE = bytes.fromhex("555d8a03ebfa")
def write(address, data):
    ctypes.memmove(fake.fake_memory(address >> 12) + (address & 4095), data, len(data))
def state(what, index=0):
    return fake.fake_state(what.encode(), index)
for table, entry in ((0, 0x1000), (0x1000, 0x2000), (0x2000, 0x3000)):
    write(table, (entry | 7).to_bytes(8, "little"))
for page in range(64):
    write(0x3000 + page * 8, (page << 12 | 7).to_bytes(8, "little"))
write(0x8000, CODE)
fake.fake_knob(b"vcpus")[0] = 2
for vcpu in range(2):
    registers = fake.fake_regs(vcpu)
    registers[RIP], registers[RSP], registers[RBX] = 0x8000, 0x20000 + 0x1000 * vcpu, 0x8000
"""
UNTOUCHED = """
nothing = "maps listening monitors views altp2m pauses held single_step uds exposures".split()
for what, expected in {"populated": 64, **dict.fromkeys(nothing, 0)}.items():
    assert [state(what, vcpu) for vcpu in range(2)] == [expected] * 2, (what, state(what), state(what, 1))
fake.fake_automatic(0)
assert fake.fake_run(0, 100) == 100
print("untouched")
"""
# A loop of its own around a guest that never ends by itself.
IN_LOOP = """
import asyncio, threading, vmitap.aio
from vmitap import DeadlineExceededError, HandlerError, OnWrite, SessionBusyError, StaleContextError, Verdict
def in_loop(main):
    async def around():
        asyncio.get_running_loop().slow_callback_duration = 60
        fake.fake_automatic(50)
        async with vmitap.aio.attach("xen:guest") as guest:
            await main(guest)
    asyncio.run(around())
"""


def build(folder: Path) -> Path:
    """The library, as of Xen 4.17."""
    path = folder / "libxenctrl.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-DVM_EVENT=7", "-DMINOR=17", str(SOURCE), "-o", str(path)], check=True)
    return path


def run(library: Path, code: str, *, check: bool = True, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VMITAP_LIBXENCTRL": str(library)}
    command = [sys.executable, "-W", "error", *options, "-c", PREPARE + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    if check and done.returncode:
        raise AssertionError(f"{done.stdout}\n{done.stderr}")
    return done


def in_loop(library: Path, program: str, expected: list[str]) -> None:
    """Runs a program that has a `main(guest)` and calls `in_loop` with it: what it prints, that it warns of nothing, and leaves nothing."""
    done = run(library, IN_LOOP + program + UNTOUCHED, options=("-X", "dev"))
    assert (done.stdout.splitlines(), done.stderr) == ([*expected, "untouched"], "")


def command(library: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VMITAP_LIBXENCTRL": str(library)}
    command = [sys.executable, "-W", "error", "-m", "vmitap", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
