"""What the unpacked packages of one Xen release hold, and how to run programs from there on this machine."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .step import LabError, run

if TYPE_CHECKING:
    from .release import Release

MULTIARCH = "lib/x86_64-linux-gnu"


class Root:
    """The folder that Debian's packages of a release were unpacked to."""

    def __init__(self, release: Release, path: Path) -> None:
        self.release = release
        self.path = path
        self.xen_folder = f"usr/lib/xen-{release.xen}"
        # Before the merged /usr, and after it.
        self.libraries = [path / MULTIARCH, path / "usr" / MULTIARCH, path / self.xen_folder / MULTIARCH]
        self.loader = self.find("ld-linux-x86-64.so.2", *self.libraries)
        self.interpreter = self.find(f"python{release.python}", path / "usr/bin")

    @property
    def stamp(self) -> Path:
        """A file that changes when the list of packages does."""
        return self.path.with_name(f"{self.path.name}.unpacked")

    def find(self, name: str, *folders: Path) -> Path:
        for folder in folders:
            if (folder / name).exists():
                return folder / name
        raise LabError(f"Debian's packages for Xen {self.release.xen} do not hold {name}")

    def command(self, program: Path) -> list[str]:
        """How to start a program of the release on this machine: with the release's own C library."""
        return [str(self.loader), "--library-path", ":".join(map(str, self.libraries)), str(program)]

    def needed(self, program: Path) -> set[Path]:
        """The shared libraries that a program needs."""
        *loader, name = self.command(program)
        listed = run([*loader, "--list", name])
        if "not found" in listed:
            raise LabError(f"a library that {program.name} needs is in none of the packages:\n{listed}")
        return {path for path in map(Path, re.findall(r"/\S+", listed)) if path.is_relative_to(self.path)}

    def xen(self) -> bytes:
        return gzip.decompress((self.path / f"boot/xen-{self.release.xen}-amd64.gz").read_bytes())
