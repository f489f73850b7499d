"""An initramfs in the "newc" format (Linux, Documentation/driver-api/early-userspace/buffer-format.rst)."""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath


class Archive:
    """Files, folders and links by path; folders on the way are made."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, bytes]] = {}

    def folder(self, path: str) -> None:
        for each in [PurePosixPath(path), *PurePosixPath(path).parents]:
            if str(each) != ".":
                self._entries.setdefault(str(each), (stat.S_IFDIR | 0o755, b""))

    def file(self, path: str, contents: bytes, *, mode: int = 0o644) -> None:
        self._add(path, stat.S_IFREG | mode, contents)

    def copy(self, source: Path, path: str) -> None:
        self.file(path, source.read_bytes(), mode=source.stat().st_mode & 0o777)

    def link(self, path: str, target: str) -> None:
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def _add(self, path: str, mode: int, contents: bytes) -> None:
        self.folder(str(PurePosixPath(path).parent))
        self._entries[path] = (mode, contents)

    def pack(self) -> bytes:
        """The archive; the same entries give the same bytes."""
        out = bytearray()
        entries = [*sorted(self._entries.items()), ("TRAILER!!!", (0, b""))]
        for number, (path, (mode, contents)) in enumerate(entries, 1):
            name = path.encode() + b"\0"
            fields = (number, mode, 0, 0, 1, 0, len(contents), 0, 0, 0, 0, len(name), 0)
            out += b"070701" + b"".join(b"%08x" % field for field in fields) + name
            out += b"\0" * (-len(out) % 4)
            out += contents
            out += b"\0" * (-len(out) % 4)
        return bytes(out)
