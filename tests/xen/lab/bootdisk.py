"""The boot disk: Xen, dom0's kernel and its initramfs as a list of (address, bytes), and the option ROM that loads them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from .step import LabError, run

BOOT = Path(__file__).parents[1] / "boot"
SECTOR = 512
HEADS, SECTORS_PER_TRACK = 16, 63
MAGIC = 0x4258
ROM_ADDRESS, ROM_SIZE = 0xD0000, 2048
INFORMATION = 0x100000
_2M = 0x200000


@dataclass(frozen=True)
class BootDisk:
    """Files that Bochs is told about, and the disk's geometry."""

    image: Path
    rom: Path
    cylinders: int


def _up(value: int, to: int) -> int:
    return -(-value // to) * to


def _load_elf32(image: bytes) -> tuple[int, int, bytes, int]:
    """Entry, address, contents and end in memory of a 32-bit ELF image (what Xen's multiboot image is)."""
    if image[:5] != b"\x7fELF\x01":
        raise LabError("Xen's image is no 32-bit ELF file")
    entry, table = struct.unpack_from("<II", image, 24)
    count = struct.unpack_from("<H", image, 44)[0]
    headers = [struct.unpack_from("<8I", image, table + 32 * n) for n in range(count)]
    loads = [(pa, offset, in_file, in_memory) for kind, offset, _, pa, in_file, in_memory, *_ in headers if kind == 1]
    base = min(pa for pa, *_ in loads)
    contents = bytearray(max(pa + in_file for pa, _, in_file, _ in loads) - base)
    for pa, offset, in_file, _ in loads:
        contents[pa - base : pa - base + in_file] = image[offset : offset + in_file]
    return entry, base, bytes(contents), max(pa + in_memory for pa, _, _, in_memory in loads)


def _information(memory: int, command_line: str, modules: list[tuple[int, int, str]]) -> bytes:
    """The multiboot information structure (Multiboot Specification 0.6.96, section 3.3), to be loaded at INFORMATION."""
    strings, texts_at = b"", INFORMATION + 256

    def text(value: str) -> int:
        nonlocal strings
        at = texts_at + len(strings)
        strings += value.encode() + b"\0"
        return at

    line, loader = text(command_line), text("vmitap-lab")
    module_list = b"".join(struct.pack("<4I", start, end, text(name), 0) for start, end, name in modules)
    ram, reserved = 1, 2
    ranges = [(0, 0x9F000, ram), (0x9F000, 0x1000, reserved), (0xE8000, 0x18000, reserved), (0x100000, memory - 0x110000, ram)]
    memory_map = b"".join(struct.pack("<IQQI", 20, *each) for each in ranges)
    flags = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9  # memory, command line, modules, memory map, loader's name
    head = struct.pack("<7I", flags, 639, (memory >> 10) - 1024 - 64, 0, line, len(modules), INFORMATION + 128).ljust(44, b"\0")
    head += struct.pack("<II", len(memory_map), texts_at + len(strings))
    head = head.ljust(64, b"\0") + struct.pack("<I", loader)
    return (head.ljust(128, b"\0") + module_list).ljust(256, b"\0") + strings + memory_map


def _rom(folder: Path) -> Path:
    linked, rom = folder / "loader.elf", folder / "loader.rom"
    flags = "-m32 -Os -Wall -Wextra -ffreestanding -fno-pic -fno-pie -fno-stack-protector -fcf-protection=none -mgeneral-regs-only"
    flags += f" -fno-asynchronous-unwind-tables -nostdlib -static -no-pie -Wl,-Ttext={ROM_ADDRESS:#x},--build-id=none,-e,_start"
    run(["gcc", *flags.split(), "-o", linked, BOOT / "loader.S", BOOT / "load.c"])
    run(["objcopy", "-O", "binary", "-j", ".text", linked, rom])
    code = bytearray(rom.read_bytes())
    if len(code) >= ROM_SIZE:
        raise LabError(f"the boot loader has {len(code)} bytes, more than fit into its ROM")
    code = code.ljust(ROM_SIZE, b"\0")
    code[-1] = -sum(code) & 0xFF
    rom.write_bytes(code)
    return rom


def make(folder: Path, *, xen: bytes, kernel: bytes, initramfs: bytes, memory: int, xen_line: str, kernel_line: str) -> BootDisk:
    """Writes `boot.img` and `loader.rom` into `folder`."""
    entry, base, contents, end = _load_elf32(xen)
    kernel_at = _up(max(end, 0x1000000), _2M)
    initramfs_at = _up(kernel_at + len(kernel), _2M)
    if initramfs_at + len(initramfs) > memory - (32 << 20):
        raise LabError(f"{memory >> 20} MiB are too few for an initramfs of {len(initramfs) >> 20} MiB")
    modules = [
        (kernel_at, kernel_at + len(kernel), f"vmlinux {kernel_line}"),
        (initramfs_at, initramfs_at + len(initramfs), "initramfs"),
    ]
    information = _information(memory, f"xen {xen_line}", modules)
    parts = [(base, contents), (INFORMATION, information), (kernel_at, kernel), (initramfs_at, initramfs)]
    header, body, lba = struct.pack("<4I", MAGIC, len(parts), entry, INFORMATION), b"", 1
    for address, data in parts:
        sectors = -(-len(data) // SECTOR)
        header += struct.pack("<4I", address, lba, sectors, 0)
        body += data.ljust(sectors * SECTOR, b"\0")
        lba += sectors
    track = HEADS * SECTORS_PER_TRACK
    cylinders = -(-lba // track)
    image = folder / "boot.img"
    image.unlink(missing_ok=True)  # a machine that somebody left running has the old one
    image.write_bytes((header.ljust(SECTOR, b"\0") + body).ljust(cylinders * track * SECTOR, b"\0"))
    return BootDisk(image, _rom(folder), cylinders)
