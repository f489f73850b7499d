"""The peer: the same hidden breakpoint, written in Python with nothing but the package `unicorn`.

Run by bench_dance.py, and by hand: `python benches/python/peer.py calls.elf 20000`. It runs the same image as vmitap does in that benchmark
(tests/guests/calls.S), from `main` on.

The dance is: the INT3 of a page that only execution can reach is hit; a handler looks at one register; the instruction is executed on the
clean page, hidden from nobody; on with the page that has the INT3. Two ways, each as fast as we could make it:

- `Swap` is what one finds in tutorials: the byte is put back, the page is opened, one instruction is executed with the trap flag, the
  INT3 and the protection are put back. One instance.
- `Stepper` is what vmitap itself does, in Python: two instances over the same memory with a translation hook each, which is how a page
  gets two faces. The second one only ever executes single instructions of the clean page.

What the guest reads of the page is checked after the measurement, not trusted: see `Result.seen`.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import dataclass
from struct import unpack_from
from time import process_time
from typing import TYPE_CHECKING

from unicorn import (
    UC_ARCH_X86,
    UC_ERR_READ_PROT,
    UC_ERR_WRITE_PROT,
    UC_HOOK_CODE,
    UC_HOOK_INTR,
    UC_HOOK_TLB_FILL,
    UC_MEM_FETCH,
    UC_MODE_64,
    UC_PROT_ALL,
    UC_PROT_EXEC,
    UC_TLB_VIRTUAL,
    Uc,
    UcError,
)
from unicorn.x86_const import (
    UC_X86_REG_CR0,
    UC_X86_REG_CR3,
    UC_X86_REG_CR4,
    UC_X86_REG_EFLAGS,
    UC_X86_REG_MSR,
    UC_X86_REG_RDI,
    UC_X86_REG_RIP,
    UC_X86_REG_RSP,
)

if TYPE_CHECKING:
    from collections.abc import Callable

KBASE = 0xFFFFFFFF80000000
RAM = 16 << 20
BOOT_INFO = KBASE + 0x1000
COMMAND_LINE = KBASE + 0x1100
STACK = KBASE + 0x80000
TABLES = 0x10000
"""Physical: three pages, which map the memory at KBASE with 2 MiB pages."""
SHADOW = RAM
"""Physical: where the copy with the INT3 is, a page behind the guest's memory."""
TRAP_FLAG = 0x100


class Image:
    """An ELF file of ours: trusted, so nothing is checked."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:  # noqa: PTH123
            self.data = file.read()
        self.symbols = self._symbols()

    def load(self, memory: mmap.mmap) -> None:
        offset, size, count = (*unpack_from("<Q", self.data, 32), *unpack_from("<HH", self.data, 54))
        for at in range(offset, offset + size * count, size):
            kind, _, begin, _, physical, length = unpack_from("<IIQQQQ", self.data, at)
            if kind == 1:
                memory[physical : physical + length] = self.data[begin : begin + length]

    def _symbols(self) -> dict[str, int]:
        """Names and addresses."""
        offset, size, count = (*unpack_from("<Q", self.data, 40), *unpack_from("<HH", self.data, 58))
        sections = [unpack_from("<IIQQQQIIQQ", self.data, offset + n * size) for n in range(count)]
        found = {}
        for section in sections:
            if section[1] == 2:
                names = sections[section[6]][4]
                for at in range(section[4], section[4] + section[5], 24):
                    name, _, _, _, value, _ = unpack_from("<IBBHQQ", self.data, at)
                    end = self.data.index(0, names + name)
                    found[self.data[names + name : end].decode()] = value
        return found


@dataclass(frozen=True)
class Result:
    """One measurement. `seen` is what the guest read of the page that was not as it was built: 0 if the breakpoint is hidden."""

    hits: int
    executed: int
    elapsed: float
    seen: int

    @property
    def microseconds(self) -> float:
        return self.elapsed / self.hits * 1e6


class Machine:
    """Memory with the image in it, and an instance of the emulator that stands before the first call of `f`."""

    def __init__(self, image: Image, calls: int) -> None:
        self.image = image
        self.memory = mmap.mmap(-1, RAM + 4096)
        image.load(self.memory)
        self.f = image.symbols["f"]
        self.page = self.f & ~0xFFF
        self.write(COMMAND_LINE, f"n={calls} every=0".encode() + b"\0")
        self.put(KBASE + TABLES + 8 * 511, TABLES + 0x1003)
        self.put(KBASE + TABLES + 0x1000 + 8 * 510, TABLES + 0x2003)
        for n in range(RAM >> 21):
            self.put(KBASE + TABLES + 0x2000 + 8 * n, n << 21 | 0x83)
        self.put(BOOT_INFO + 32, COMMAND_LINE)
        self.put(image.symbols["boot_info"], BOOT_INFO)
        self.end = image.symbols["halt"] + 1
        self.put(STACK, image.symbols["halt"])
        self.rip = image.symbols["main"]
        self.hits = 0
        self.looked_at = 0

    def instance(self) -> Uc:
        uc = Uc(UC_ARCH_X86, UC_MODE_64)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        uc.mem_map_ptr(0, RAM + 4096, UC_PROT_ALL, address)
        uc.reg_write(UC_X86_REG_MSR, (0xC0000080, 0xD01))  # EFER: NXE, LMA, LME, SCE
        uc.reg_write(UC_X86_REG_CR3, TABLES)
        uc.reg_write(UC_X86_REG_CR4, 0x620)
        uc.reg_write(UC_X86_REG_CR0, 0x80010033)
        return uc

    def start(self, uc: Uc) -> None:
        """The guest computes what its code must look like, and gets to `f`."""
        uc.reg_write(UC_X86_REG_RSP, STACK)
        uc.emu_start(self.rip, self.f)
        self.rip = self.f

    def read(self, at: int, length: int) -> bytes:
        return self.memory[at - KBASE : at - KBASE + length]

    def write(self, at: int, data: bytes) -> None:
        self.memory[at - KBASE : at - KBASE + len(data)] = data

    def put(self, at: int, value: int) -> None:
        self.write(at, value.to_bytes(8, "little"))

    def get(self, symbol: str, index: int = 0) -> int:
        return int.from_bytes(self.read(self.image.symbols[symbol] + 8 * index, 8), "little")

    def result(self, run: Callable[[int], None], hits: int) -> Result:
        """Measures that many hits, then lets the guest come to its end and look at its code."""
        begin = process_time()
        run(hits)
        elapsed = process_time() - begin
        # The call of the last hit is under way and has not been counted by the guest, or the next one is.
        executed = self.get("f_count") + (self.rip != self.f)
        self.finish()
        return Result(self.hits, executed, elapsed, sum(self.get("mismatches", kind) for kind in range(10)))

    def finish(self) -> None:
        raise NotImplementedError


class Swap(Machine):
    """One instance; the byte is swapped at each hit."""

    def __init__(self, image: Image, calls: int) -> None:
        super().__init__(image, calls)
        self.uc = self.instance()
        self.start(self.uc)
        self.original = self.read(self.f, 1)
        self.number = -1
        self.uc.hook_add(UC_HOOK_INTR, self.on_interrupt)
        self.hide()

    def hide(self) -> None:
        self.uc.mem_write(self.f - KBASE, b"\xcc")
        self.uc.mem_protect(self.page - KBASE, 4096, UC_PROT_EXEC)

    def on_interrupt(self, uc: Uc, number: int, _data: object) -> None:
        self.number = number
        uc.emu_stop()

    def run(self, hits: int) -> None:
        uc, f, original = self.uc, self.f, self.original
        physical, page = self.f - KBASE, self.page - KBASE
        while self.hits < hits:
            self.number = -1
            uc.emu_start(self.rip, 0)
            if self.number != 3 or uc.reg_read(UC_X86_REG_RIP) != f + 1:
                return
            self.hits += 1
            self.looked_at = uc.reg_read(UC_X86_REG_RDI)
            uc.mem_protect(page, 4096, UC_PROT_ALL)
            uc.mem_write(physical, original)
            uc.reg_write(UC_X86_REG_EFLAGS, uc.reg_read(UC_X86_REG_EFLAGS) | TRAP_FLAG)
            uc.emu_start(f, 0)
            uc.reg_write(UC_X86_REG_EFLAGS, uc.reg_read(UC_X86_REG_EFLAGS) & ~TRAP_FLAG)
            self.rip = uc.reg_read(UC_X86_REG_RIP)
            uc.mem_write(physical, b"\xcc")
            uc.mem_protect(page, 4096, UC_PROT_EXEC)

    def finish(self) -> None:
        """Reads of the page come here as errors; each is served with the byte put back for one instruction."""
        uc, done = self.uc, self.image.symbols["halt"]
        while self.rip not in (done, self.end):
            self.number = -1
            try:
                uc.emu_start(self.rip, 0)
                where = uc.reg_read(UC_X86_REG_RIP)
                if self.number != 3 or where != self.f + 1:
                    return
                where = self.f
            except UcError as error:
                if error.errno not in (UC_ERR_READ_PROT, UC_ERR_WRITE_PROT):
                    raise
                where = uc.reg_read(UC_X86_REG_RIP)
            uc.mem_protect(self.page - KBASE, 4096, UC_PROT_ALL)
            uc.mem_write(self.f - KBASE, self.original)
            uc.emu_start(where, 0, count=1)
            self.rip = uc.reg_read(UC_X86_REG_RIP)
            self.hide()


class Stepper(Machine):
    """Two instances with two views of the same memory; nothing is swapped."""

    def __init__(self, image: Image, calls: int) -> None:
        super().__init__(image, calls)
        self.main, self.clean = self.instance(), self.instance()
        self.write(KBASE + SHADOW, self.read(self.page, 4096))
        self.write(KBASE + SHADOW + (self.f & 0xFFF), b"\xcc")
        for uc, fill in ((self.main, self.fill_tapped), (self.clean, self.fill_clean)):
            uc.ctl_set_tlb_mode(UC_TLB_VIRTUAL)
            uc.hook_add(UC_HOOK_TLB_FILL, fill)
        self.main.hook_add(UC_HOOK_INTR, self.on_interrupt)
        self.start(self.clean)
        self.state = self.clean.context_save()
        self.main.context_restore(self.state)
        self.number = -1

    def fill_tapped(self, _uc: Uc, va: int, access: int, entry: ctypes.Structure, _data: object) -> bool:
        if va == self.page:
            if access != UC_MEM_FETCH:
                return False
            entry.paddr, entry.perms = SHADOW, UC_PROT_EXEC
        else:
            entry.paddr, entry.perms = va - KBASE, UC_PROT_ALL
        return True

    def fill_clean(self, _uc: Uc, va: int, _access: int, entry: ctypes.Structure, _data: object) -> bool:
        entry.paddr, entry.perms = va - KBASE, UC_PROT_ALL
        return True

    def on_interrupt(self, uc: Uc, number: int, _data: object) -> None:
        self.number = number
        uc.emu_stop()

    def step(self, where: int) -> None:
        main, clean, state = self.main, self.clean, self.state
        main.context_update(state)
        clean.context_restore(state)
        clean.emu_start(where, 0, 0, 1)
        self.rip = clean.reg_read(UC_X86_REG_RIP)
        clean.context_update(state)
        main.context_restore(state)

    def run(self, hits: int) -> None:
        main, f = self.main, self.f
        while self.hits < hits:
            self.number = -1
            main.emu_start(self.rip, 0)
            if self.number != 3 or main.reg_read(UC_X86_REG_RIP) != f + 1:
                return
            self.hits += 1
            self.looked_at = main.reg_read(UC_X86_REG_RDI)
            self.step(f)

    def finish(self) -> None:
        main, done = self.main, self.image.symbols["halt"]
        while self.rip not in (done, self.end):
            self.number = -1
            try:
                main.emu_start(self.rip, 0)
                where = main.reg_read(UC_X86_REG_RIP)
                if self.number != 3 or where != self.f + 1:
                    return
                where = self.f
            except UcError:
                # A read of the page: the translation hook has refused it.
                where = main.reg_read(UC_X86_REG_RIP)
            self.step(where)


class Hook(Machine):
    """No breakpoint: the emulator calls a function before it executes that address. Nothing is changed, so nothing has to be hidden."""

    def __init__(self, image: Image, calls: int) -> None:
        super().__init__(image, calls)
        self.uc = self.instance()
        self.start(self.uc)
        self.wanted = 0
        self.uc.hook_add(UC_HOOK_CODE, self.on_code, begin=self.f, end=self.f)

    def on_code(self, uc: Uc, _address: int, _size: int, _data: object) -> None:
        # Instead of the hit after the last one wanted, the measurement ends.
        if self.hits == self.wanted:
            uc.emu_stop()
            return
        self.hits += 1
        self.looked_at = uc.reg_read(UC_X86_REG_RDI)

    def run(self, hits: int) -> None:
        self.wanted = hits
        self.uc.emu_start(self.rip, 0)
        self.rip = self.uc.reg_read(UC_X86_REG_RIP)

    def finish(self) -> None:
        self.wanted = -1
        hits = self.hits
        self.uc.emu_start(self.rip, self.end)
        self.hits = hits


WAYS: dict[str, type[Swap | Stepper | Hook]] = {"swap": Swap, "stepper": Stepper, "hook": Hook}


def measure(path: str, way: str, hits: int) -> Result:
    """One way, that many hits, on a machine made new."""
    # One call more than hits: so that the guest has not yet ended when the measurement has.
    machine = WAYS[way](Image(path), hits + 1)
    return machine.result(machine.run, hits)


def main() -> None:
    """Measures each way once."""
    path, hits = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20_000
    for way in WAYS:
        result = measure(path, way, hits)
        print(f"{way}: {result}, {result.microseconds:.2f} us a hit")


if __name__ == "__main__":
    main()
