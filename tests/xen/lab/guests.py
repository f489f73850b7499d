"""What is compiled for the tests: Linux with an init of ours, and a library that fails; and the demo guest out of the wheel."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

from .cpio import Archive
from .step import LabError, run

HERE = Path(__file__).parents[1]


def demo_image(wheel: Path) -> bytes:
    """The demo guest as the wheel ships it: the ELF image inside the compiled module."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        module = archive.read(name)
    at = module.find(b"\x7fELF\x02\x01\x01", 1)
    while at > 0:
        kind, machine = struct.unpack_from("<HH", module, at + 16)
        sections = struct.unpack_from("<Q", module, at + 0x28)[0]
        size, count = struct.unpack_from("<HH", module, at + 0x3A)
        image = module[at : at + sections + size * count]  # the linker puts the section headers last
        if (kind, machine) == (2, 62) and b".note.Xen" in image:
            return image
        at = module.find(b"\x7fELF\x02\x01\x01", at + 1)
    raise LabError(f"{wheel.name} holds no demo guest")


def linux_initramfs(folder: Path) -> Path:
    """Linux with one program, tests/xen/guests/linux_init.c."""
    program, packed = folder / "linux_init", folder / "linux-guest.cpio"
    run(["gcc", "-O2", "-Wall", "-Wextra", "-static", "-o", program, HERE / "guests/linux_init.c"])
    archive = Archive()
    archive.folder("dev")
    archive.file("init", program.read_bytes(), mode=0o755)
    packed.write_bytes(archive.pack())
    return packed


def faults_library(folder: Path, xen: str) -> bytes:
    """tests/xen/faults/faults.c for one release: what stands between vmitap and Xen's libraries and lets calls fail."""
    library = folder / "libfaults.so"
    name = f'-DLIBXENCTRL="libxenctrl.so.{xen}"'
    run(["gcc", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", name, "-o", library, HERE / "faults/faults.c"])
    return library.read_bytes()
