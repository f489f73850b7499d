"""Memory dumps: the demo guest's memory in each format, looked at through `attach("dump:PATH")`. docs/dumps.md is the contract."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from struct import pack
from typing import TYPE_CHECKING, Any

import pytest

import vmitap

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmitap import Registers, Vm

PAGE = 4096
HOLE = (0xA0000, 0x100000)
"""Where a PC has no memory: what the formats that can leave something out leave out."""
SYMBOLS = ("open_file", "check_licence", "truth")
GENERAL = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"]
KERNELS = ["r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"]


@dataclass
class Guest:
    """The demo guest after it has run: all of its memory, its vCPUs, and what is at some symbols."""

    memory: bytes
    vcpus: list[Registers]
    places: dict[str, tuple[int, int, bytes]]
    """Address, physical address, 64 bytes."""
    text: int
    """The address of the string "across"."""


@pytest.fixture(scope="module")
def guest() -> Guest:
    with vmitap.attach("demo", vcpus=2, cmdline="rounds=2 check=0") as vm:
        assert vm.run(timeout=20).reason == "idle"
        places = {name: (vm.symbol(name), vm.translate(name), vm.read(name, 64)) for name in SYMBOLS}
        text = vm.symbol("boot_copy")
        vm.write(text, b"across\0")
        memory = vm.read_pa(0, vm.memory.size)
        vcpus = [vm.registers(vcpu) for vcpu in range(vm.vcpus)]
        return Guest(memory, vcpus, places, text)


def raw(guest: Guest) -> bytes:
    return guest.memory


def runs(guest: Guest) -> list[tuple[int, bytes]]:
    return [(0, guest.memory[: HOLE[0]]), (HOLE[1], guest.memory[HOLE[1] :])]


def lime(guest: Guest) -> bytes:
    return b"".join(pack("<IIQQQ", 0x4C694D45, 1, pa, pa + len(data) - 1, 0) + data for pa, data in runs(guest))


def note(name: bytes, kind: int, descriptor: bytes) -> bytes:
    name += b"\0"
    return pack("<III", len(name), len(descriptor), kind) + name.ljust(-len(name) % 4 + len(name), b"\0") + descriptor


def kernels_note(regs: Registers) -> bytes:
    """`elf_prstatus`: the general registers of a vCPU."""
    values = [*(getattr(regs, name) for name in KERNELS), 0, regs.rip, 0, regs.rflags, regs.rsp]
    return note(b"CORE", 1, bytes(112) + pack("<20Q", *values) + bytes(64))


def qemus_note(regs: Registers) -> bytes:
    """`QEMUCPUState`; of the segments CS only."""
    segments = pack("<IIIIQ", regs.cs, 0, 0, 0, 0) + bytes(9 * 24)
    control = pack("<6Q", regs.cr0, 0, regs.cr2, regs.cr3, regs.cr4, 0)
    return note(b"QEMU", 0, pack("<II18Q", 1, 440, *(getattr(regs, name) for name in GENERAL)) + segments + control)


def elf(guest: Guest, *, notes: Callable[[Registers], bytes] | None = qemus_note) -> bytes:
    """As `virsh dump --memory-only` writes it; without QEMU's notes as a kernel does."""
    text = b"".join(map(kernels_note, guest.vcpus)) + (b"".join(map(notes, guest.vcpus)) if notes else b"")
    parts = [(4, 0, text), *((1, pa, data) for pa, data in runs(guest))]
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(parts), 64, 0, 0)
    at = 64 + 56 * len(parts)
    for kind, pa, data in parts:
        header += pack("<IIQQQQQQ", kind, 0, at, 0, pa, len(data), len(data), 0)
        at += len(data)
    return header + b"".join(data for _, _, data in parts)


def xen(guest: Guest, *, magic: int = 0xF00FEBEE) -> bytes:
    """As `xl dump-core` writes it of an HVM or PVH domain."""
    contexts = b""
    for regs in guest.vcpus:
        user = pack("<15Q", *(getattr(regs, name) for name in KERNELS))
        user += pack("<5Q", 0, regs.rip, regs.cs, regs.rflags, regs.rsp)
        control = pack("<8Q", regs.cr0, 0, regs.cr2, regs.cr3, regs.cr4, 0, 0, 0)
        contexts += (bytes(520) + user).ljust(4984, b"\0") + control + bytes(5168 - 4984 - 64)
    numbers = [pa // PAGE + n for pa, data in runs(guest) for n in range(len(data) // PAGE)]
    notes = note(b"Xen", 0x2000001, pack("<QQQQ", magic, len(guest.vcpus), len(numbers), PAGE)) + note(b"Xen", 0x2000003, pack("<Q", 1))
    names = b"\0.note.Xen\0.xen_prstatus\0.xen_pages\0.xen_pfn\0"
    pages = b"".join(data for _, data in runs(guest))
    parts = [(0, b""), (1, notes), (11, contexts), (25, pages), (36, pack(f"<{len(numbers)}Q", *numbers)), (0, names)]
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 0, 64, 0, 64, 56, 0, 64, len(parts), len(parts) - 1)
    at = 64 + 64 * len(parts)
    for name, data in parts:
        header += pack("<IIQQQQIIQQ", name, 1, 0, 0, at, len(data), 0, 0, 1, 0)
        at += len(data)
    return header + b"".join(data for _, data in parts)


def kdump(guest: Guest) -> bytes:
    """As `makedumpfile -c` writes it: each page by itself, with zlib where that makes it smaller."""
    count = len(guest.memory) // PAGE
    pages = [(pa // PAGE + n, data[n * PAGE : (n + 1) * PAGE]) for pa, data in runs(guest) for n in range(len(data) // PAGE)]
    blocks = -(-count // (8 * PAGE))
    header = pack(
        "<8si65s65s65s65s65s65s6xQQIIIII", b"KDUMP   ", 6, b"", b"", b"", b"", b"x86_64", b"", 0, 0, 0, PAGE, 1, 2 * blocks, count
    )
    notes = b"".join(map(qemus_note, guest.vcpus))
    bitmap = bytearray(blocks * PAGE)
    for number, _ in pages:
        bitmap[number // 8] |= 1 << number % 8
    at = 2 * PAGE + 2 * len(bitmap) + 24 * len(pages)
    more = pack("<QiiQQQQQQQQQQQ", 0, 0, 0, 0, 0, 0, 0, at, len(notes), 0, 0, 0, 0, count)
    descriptors, packed = b"", notes
    for _, page in pages:
        smaller = zlib.compress(page, 1)
        data, flags = (smaller, 1) if len(smaller) < PAGE else (page, 0)
        descriptors += pack("<QIIQ", at + len(packed), len(data), flags, 0)
        packed += data
    return header.ljust(PAGE, b"\0") + more.ljust(PAGE, b"\0") + b"\xff" * len(bitmap) + bitmap + descriptors + packed


FORMATS: dict[str, Callable[[Guest], bytes]] = {"raw": raw, "LiME": lime, "ELF core": elf, "Xen core": xen, "kdump": kdump}
WITH_VCPUS = ("ELF core", "Xen core", "kdump")


@pytest.fixture(scope="module")
def files(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dumps")
    found = {}
    for number, (name, build) in enumerate(FORMATS.items()):
        found[name] = folder / f"guest{number}.dump"
        found[name].write_bytes(build(guest))
    return found


@pytest.fixture(params=FORMATS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return f"dump:{path}"


def test_a_dump_is_the_guest_that_it_was_taken_of(files: dict[str, Path], name: str, guest: Guest) -> None:
    root = guest.vcpus[0].root
    with vmitap.attach(f"dump:{files[name]}") as vm:
        assert (vm.driver, vm.info.version, vm.info.name) == ("dump", name, str(files[name]))
        assert vm.memory.size == len(guest.memory)
        assert vm.read_pa(HOLE[1], len(guest.memory) - HOLE[1]) == guest.memory[HOLE[1] :]
        for va, pa, data in guest.places.values():
            assert vm.translate(va, root) == pa
            assert vm.read(va, 64, root=root) == data
            assert vm.read_pa(pa, 64) == data
            assert vm.read_u64(va, root=root) == int.from_bytes(data[:8], "little")
            assert vm.read_u16(va + 1, root=root) == int.from_bytes(data[1:3], "little")
        assert vm.read_cstr(guest.text, root=root) == "across"
        assert vm.memory.read_many([(va, 8) for va, _, _ in guest.places.values()], root=root) == [
            d[:8] for _, _, d in guest.places.values()
        ]
        assert len(vm.symbols) == 0


@pytest.mark.parametrize("format_", WITH_VCPUS)
def test_with_the_registers_of_its_vcpus_a_dump_needs_no_root(files: dict[str, Path], format_: str, guest: Guest) -> None:
    with vmitap.attach(f"dump:{files[format_]}") as vm:
        assert (vm.vcpus, vm.caps.registers) == (2, True)
        for vcpu, regs in enumerate(guest.vcpus):
            found = vm.registers(vcpu)
            for register in (*GENERAL, "cr0", "cr2", "cr3", "cr4", "cs", "root", "cpl"):
                assert getattr(found, register) == getattr(regs, register), register
            assert found.lstar == 0
        for va, pa, data in guest.places.values():
            assert (vm.translate(va), vm.read(va, 64)) == (pa, data)
        with pytest.raises(vmitap.VcpuNotFoundError):
            vm.registers(2)


def without_registers(guest: Guest, tmp_path: Path) -> list[str]:
    kernel = elf(guest, notes=None)
    return [write(tmp_path / "raw", guest.memory), write(tmp_path / "lime", lime(guest)), write(tmp_path / "kdump", kernel)]


def test_without_registers_the_error_says_that_a_root_is_needed(guest: Guest, tmp_path: Path) -> None:
    va, pa, data = guest.places["open_file"]
    for target in without_registers(guest, tmp_path):
        with vmitap.attach(target) as vm:
            assert vm.caps.registers is False
            uses: list[Callable[[Vm], object]] = [
                lambda vm: vm.read(va, 8),
                lambda vm: vm.read_u32(va),
                lambda vm: vm.read_cstr(va),
                lambda vm: vm.translate(va),
                lambda vm: vm.registers(),
                lambda vm: vm.registers(0),
            ]
            for use in uses:
                with pytest.raises(vmitap.NotSupportedError, match="virtual addresses need a root") as caught:
                    use(vm)
                assert (caught.value.driver, caught.value.capability) == ("dump", "registers")
                assert "root=" in caught.value.hint
                assert pickle.loads(pickle.dumps(caught.value)).hint == caught.value.hint
            assert (vm.translate(va, guest.vcpus[0].root), vm.read_pa(pa, 64)) == (pa, data)
    assert vmitap.attach(target).vcpus == 2, "the kernel's notes count the vCPUs"


@pytest.mark.parametrize("format_", [name for name in FORMATS if name != "raw"])
def test_a_hole_is_an_error_with_its_address_and_never_zeros(files: dict[str, Path], format_: str, guest: Guest) -> None:
    with vmitap.attach(f"dump:{files[format_]}") as vm:
        for pa, length, missing in [
            (HOLE[0], 8, HOLE[0]),
            (HOLE[0] - 4, 8, HOLE[0]),
            (HOLE[1] - 1, 2, HOLE[1] - 1),
            (0, 1 << 20, HOLE[0]),
            (PAGE, 8 << 20, HOLE[0]),
        ]:
            with pytest.raises(vmitap.NotInDumpError) as caught:
                vm.read_pa(pa, length)
            assert (caught.value.pa, caught.value.length) == (missing, pa + length - missing)
            assert f"does not hold physical address {missing:#x}, from where {caught.value.length} bytes are wanted" in str(caught.value)
            again = pickle.loads(pickle.dumps(caught.value))
            assert (again.pa, again.length) == (caught.value.pa, caught.value.length)
        # A root that lies in the hole: the entry that was wanted is named.
        with pytest.raises(vmitap.NotInDumpError) as caught:
            vm.translate(0x1000, HOLE[0])
        assert caught.value.pa == HOLE[0]
        with pytest.raises(vmitap.OutOfRangeError) as beyond:
            vm.read_pa(len(guest.memory) - 4, 8)
        assert beyond.value.end == len(guest.memory)


BEYOND = 1 << 40
REFUSED: dict[str, tuple[Callable[[Vm], object], str]] = {
    "a breakpoint at a symbol": (lambda vm: vm.breakpoint("open_file"), "breakpoints"),
    "a breakpoint at no address": (lambda vm: vm.breakpoint(1 << 63), "breakpoints"),
    "many breakpoints": (lambda vm: vm.insert_many(["open_file", "read_file"]), "breakpoints"),
    "a watch": (lambda vm: vm.watch(0, 8, vmitap.Access.W), "watches"),
    "events": (lambda vm: vm.monitor_events(cpuid=True), "events"),
    "running": (lambda vm: vm.run(timeout=1), "running"),
    "iterating": (lambda vm: next(iter(vm.events(timeout=1))), "running"),
    "waiting": (lambda vm: vm.wait_event(0.1), "running"),
    "pausing": (lambda vm: vm.pause(), "pausing"),
    "a view": (lambda vm: vm.views.create(), "views"),
    "writing": (lambda vm: vm.write_pa(0, b"x"), "writing guest memory"),
    "writing nothing": (lambda vm: vm.write_pa(0, b""), "writing guest memory"),
    "writing beyond memory": (lambda vm: vm.write_pa(BEYOND, b"x"), "writing guest memory"),
    "writing beyond memory as a whole": (lambda vm: vm.memory.write(BEYOND, b"x"), "writing guest memory"),
    "writing a virtual address": (lambda vm: vm.write(vm.registers(0).rip, b"x"), "writing guest memory"),
    "writing at a symbol": (lambda vm: vm.write("open_file", b"x"), "writing guest memory"),
    "writing a byte": (lambda vm: vm.write_u8("open_file", 1 << 8), "writing guest memory"),
    "writing two bytes": (lambda vm: vm.write_u16("open_file", 1 << 16), "writing guest memory"),
    "writing four bytes": (lambda vm: vm.write_u32("open_file", 1 << 32), "writing guest memory"),
    "writing eight bytes": (lambda vm: vm.write_u64("open_file", 1 << 64), "writing guest memory"),
    "writing registers": (lambda vm: vm.set_registers(0, rax=1), "writing registers"),
    "writing registers of no vCPU": (lambda vm: vm.set_registers(9, rax=1), "writing registers"),
    "injecting": (lambda vm: vm.inject(3), "injection"),
    "injecting into no vCPU": (lambda vm: vm.inject(1 << 8, vcpu=9), "injection"),
    "watching page tables": (vmitap.PageTableMonitor, "watching page tables"),
    "watching them in a view": (lambda vm: vmitap.PageTableMonitor(vm, views=[vm.views.default]), "watching page tables"),
    "the lower floor": (lambda vm: vmitap.VmiCore(vm).allocate_frame(), "frames"),
    "the lower floor's writing": (lambda vm: vmitap.VmiCore(vm).write(BEYOND, b"x"), "writing guest memory"),
    "a console": (lambda vm: vm.console, "a console"),
}


@pytest.mark.parametrize(("use", "capability"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_dump_cannot_do_is_refused_by_name_and_the_dump_stays_usable(
    files: dict[str, Path], guest: Guest, use: Callable[[Vm], object], capability: str
) -> None:
    before = files["ELF core"].stat()
    with vmitap.attach(f"dump:{files['ELF core']}") as vm:
        with pytest.raises(vmitap.NotSupportedError) as caught:
            use(vm)
        assert (caught.value.driver, caught.value.capability) == ("dump", capability)
        assert str(caught.value) == f"the dump driver does not offer {capability}"
        assert len(vm.breakpoints) == 0
        assert vm.read_pa(0, 16) == guest.memory[:16]
    assert vm.closed
    after = files["ELF core"].stat()
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)


def test_the_only_capability_of_a_dump_is_reading(files: dict[str, Path]) -> None:
    with vmitap.attach(f"dump:{files['ELF core']}") as vm:
        assert {name for name, value in vm.caps.to_dict().items() if value} == {"registers"}
        assert [view.id for view in vm.views] == [0]
        vm.stop()


def test_a_session_with_a_dump_ends_cleanly_and_then_is_over(files: dict[str, Path]) -> None:
    vm = vmitap.attach(f"dump:{files['raw']}")
    with pytest.raises(ZeroDivisionError), vm:
        _ = 1 // 0
    assert vm.closed
    with pytest.raises(vmitap.StaleContextError):
        vm.read_pa(0, 1)
    vm.detach()


@pytest.mark.parametrize("option", ["memory", "vcpus", "cmdline"])
def test_options_that_make_a_guest_are_refused(files: dict[str, Path], option: str) -> None:
    options: dict[str, Any] = {"memory": 1 << 20, "vcpus": 1, "cmdline": "x"}
    with pytest.raises(vmitap.InvalidArgumentError) as caught:
        vmitap.attach(f"dump:{files['raw']}", **{option: options[option]})
    assert caught.value.what == option
    assert "dump" in caught.value.reason


def test_repairing_has_nothing_to_do_with_a_dump(files: dict[str, Path]) -> None:
    with pytest.raises(vmitap.NotSupportedError) as caught:
        vmitap.repair(f"dump:{files['raw']}")
    assert (caught.value.driver, caught.value.capability) == ("dump", "repairing")
    with vmitap.attach(f"dump:{files['raw']}", repair=True) as vm:
        assert vm.driver == "dump"


def test_a_dump_that_is_cut_off_is_refused_with_what_is_missing(guest: Guest, tmp_path: Path) -> None:
    for name, build in FORMATS.items():
        data = build(guest)
        # The pages of a kdump are looked at when they are read.
        end = len(data) if name != "kdump" else 5 * PAGE
        for length in [1, 20, 63, 64, 200, PAGE + 1, end // 2 + 1, end - 1]:
            with pytest.raises(vmitap.ImageError) as caught:
                vmitap.attach(write(tmp_path / "cut", data[:length]))
            assert str(tmp_path / "cut") in caught.value.what, name
            assert caught.value.reason


def test_what_is_no_dump_is_refused_by_name(guest: Guest, tmp_path: Path) -> None:
    for data, part in [
        (b"", "no known format"),
        (bytes(100), "no known format"),
        (b"\x1f\x8b".ljust(PAGE, b"\0"), "gzip"),
        (b"PAGEDU64".ljust(PAGE, b"\0"), "Windows"),
        (Path(sys.executable).resolve().read_bytes(), "core"),
        (xen(guest, magic=0xF00FEBED), "paravirtualized"),
    ]:
        with pytest.raises(vmitap.ImageError) as caught:
            vmitap.attach(write(tmp_path / "none", data))
        assert part in caught.value.reason
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, tmp_path / "missing", "/dev/zero"):
        with pytest.raises(vmitap.AttachError) as refused:
            vmitap.attach(f"dump:{path}")
        assert refused.value.target == f"dump:{path}"
        assert refused.value.hint


def test_a_dump_that_is_cut_off_while_it_is_open_is_an_error_and_no_crash(guest: Guest, tmp_path: Path) -> None:
    with vmitap.attach(write(tmp_path / "raw", guest.memory)) as vm:
        with (tmp_path / "raw").open("r+b") as file:
            file.truncate(PAGE)
        assert vm.read_pa(0, PAGE) == guest.memory[:PAGE]
        with pytest.raises(vmitap.DriverError) as caught:
            vm.read_pa(PAGE, 8)
        assert caught.value.op == "reading the dump"


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vmitap", *words], capture_output=True, text=True, timeout=60)


def shown(*words: str) -> Any:
    done = command(*words, "--json")
    assert (done.returncode, done.stderr) == (0, ""), done
    return json.loads(done.stdout)


def test_the_command_line_looks_at_a_dump(files: dict[str, Path], guest: Guest, tmp_path: Path) -> None:
    target, raw_target = f"dump:{files['ELF core']}", f"dump:{files['raw']}"
    va, pa, data = guest.places["open_file"]
    root = guest.vcpus[0].root
    info = shown("info", target)
    assert (info["driver"], info["version"], info["memory_size"]) == ("dump", "ELF core", len(guest.memory))
    assert [vcpu["rip"] for vcpu in info["vcpus"]] == [regs.rip for regs in guest.vcpus]
    assert info["capabilities"]["events"] is False
    assert shown("info", raw_target)["vcpus"] == []
    assert shown("info", write(tmp_path / "vmcore", elf(guest, notes=None)))["vcpus"] == []
    assert "ELF core" in command("info", target).stdout
    assert "raw" in command("info", raw_target).stdout
    assert shown("read", hex(va), "64", target)["hex"] == data.hex()
    assert shown("read", hex(va), "64", raw_target, "--root", hex(root))["hex"] == data.hex()
    assert shown("read", hex(pa), "64", raw_target, "--physical")["hex"] == data.hex()
    assert shown("translate", hex(va), target) == {"va": va, "pa": pa, "gfn": pa >> 12, "root": root}
    assert shown("translate", hex(va), raw_target, "--root", str(root))["pa"] == pa


def test_the_commands_of_the_documentation_work_on_the_dump_that_its_example_makes(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "dumps.md").read_text()
    example, commands = (page.split(f"```{language}\n")[1].split("```")[0] for language in ("python", "sh"))
    subprocess.run([sys.executable, "-c", example], check=True, capture_output=True, cwd=tmp_path, timeout=60)
    words = [line.split() for line in commands.splitlines()]
    assert all(line[0] == "vmitap" for line in words)
    done = [subprocess.run([sys.executable, "-m", *line], capture_output=True, text=True, cwd=tmp_path, timeout=60) for line in words]
    assert [(each.returncode, each.stderr) for each in done] == [(0, "")] * 4
    info, physical, virtual, translated = (each.stdout for each in done)
    assert "dump (raw)" in info
    assert "0x100000" in translated
    assert physical.split()[1:] == virtual.split()[1:], "the same bytes, at either address"


def test_the_command_line_says_what_a_dump_cannot_do(files: dict[str, Path], tmp_path: Path) -> None:
    target = f"dump:{files['raw']}"
    for words, code, part in [
        (("trace", "open_file", target), 6, "breakpoints"),
        (("info", target, "--run", "1"), 6, "running"),
        (("read", "0x1000", "8", target), 6, "need a root"),
        (("translate", "0x1000", target), 6, "need a root"),
        (("translate", "0x1000", target), 6, "hint: give root= (--root)"),
        (("read", "0x1000", "8", target, "--physical", "--root", "0"), 2, "exclude"),
        (("read", hex(HOLE[0]), "8", f"dump:{files['LiME']}", "--physical"), 5, "does not hold"),
        (("info", target, "--vcpus", "2"), 2, "dump"),
        (("info", write(tmp_path / "none", b"x")), 3, "no known format"),
    ]:
        done = command(*words)
        assert (done.returncode, done.stdout) == (code, ""), done
        assert part in done.stderr
