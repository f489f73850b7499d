"""dom0's initramfs: busybox, Xen's tools, Python with pytest, and the two programs of tests/xen/dom0 that run there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .cpio import Archive
from .root import MULTIARCH

if TYPE_CHECKING:
    from .root import Root

DOM0 = Path(__file__).parents[1] / "dom0"
FOLDERS = "dev proc sys etc/xen run/lock run/xen run/xenstored tmp root job var/log/xen/console var/lib/xen var/lib/xenstored"
APPLETS = "sh mount cat ls mkdir dmesg echo poweroff ps kill grep head tail free rm"
XEN_TOOLS = "xl xenstored xen-init-dom0 xenconsoled xenconsole libxl-save-helper xentrace xenctx"
# xl cancels a thread, for which the C library loads libgcc_s by name; vmitap loads Xen's libraries by name.
LOADED_BY_NAME = "libgcc_s.so.1 libxenctrl.so.4.* libxen*.so.? libxenstore.so.?*"


def initramfs(root: Root, python: Path, files: dict[str, Path]) -> bytes:
    """The archive; `files` are further files by their path in dom0."""
    archive = Archive()
    for folder in FOLDERS.split():
        archive.folder(folder)
    archive.link("var/run", "/run")
    archive.link("var/lock", "/run/lock")
    archive.file("etc/xen/xl.conf", b"")
    archive.copy(root.find("busybox", root.path / "bin", root.path / "usr/bin"), "bin/busybox")
    for applet in APPLETS.split():
        archive.link(f"bin/{applet}", "busybox")
    archive.file("init", (DOM0 / "init").read_bytes(), mode=0o755)
    archive.copy(DOM0 / "agent.py", "agent.py")
    libraries = {path for pattern in LOADED_BY_NAME.split() for folder in root.libraries for path in folder.glob(pattern)}
    for tool in XEN_TOOLS.split():
        program = root.find(tool, root.path / root.xen_folder / "bin")
        archive.copy(program, f"{root.xen_folder}/bin/{tool}")
        libraries |= root.needed(program)
    archive.copy(root.interpreter, "usr/bin/python3")
    libraries |= root.needed(root.interpreter)
    for part, target in (("library", f"usr/lib/python{root.release.python}"), ("packages", "usr/lib/python3/dist-packages")):
        for path in (python / part).rglob("*"):
            if path.is_file():
                archive.copy(path, f"{target}/{path.relative_to(python / part)}")
            if path.suffix == ".so":
                libraries |= root.needed(path)
    for path in libraries:
        archive.copy(path, f"{MULTIARCH}/{path.name}")
    archive.copy(root.loader, "lib64/ld-linux-x86-64.so.2")
    for name, source in files.items():
        archive.copy(source, name)
    return archive.pack()
