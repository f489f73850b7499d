"""The second disk: a job goes in as a zip archive, the results come out as another. tests/xen/dom0/agent.py is the other side."""

from __future__ import annotations

import io
import shutil
import zipfile
from typing import TYPE_CHECKING

from .step import LabError

if TYPE_CHECKING:
    from pathlib import Path

JOB_AT = 4096
RESULT_AT = 32 << 20
CYLINDERS = 130  # of 16 * 63 * 512 bytes: nearly 64 MiB
SIZE = CYLINDERS * 16 * 63 * 512


def write(disk: Path, files: dict[str, bytes]) -> None:
    """Makes the disk, with `files` by name."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
    data = packed.getvalue()
    if JOB_AT + len(data) > RESULT_AT:
        raise LabError(f"the job has {len(data) >> 20} MiB, more than the {RESULT_AT >> 20} MiB that the disk has room for")
    disk.unlink(missing_ok=True)  # a machine that somebody left running has the old one
    with disk.open("wb") as out:
        out.write(b"JOB %d\n".ljust(512) % len(data))
        out.seek(JOB_AT)
        out.write(data)
        out.truncate(SIZE)


def results(disk: Path, folder: Path) -> int | None:
    """Unpacks the results into `folder`; the tests' exit status, or None if there are none."""
    shutil.rmtree(folder, ignore_errors=True)
    with disk.open("rb") as file:
        words = file.read(512).split()
        if words[0] != b"RESULT":
            return None
        file.seek(RESULT_AT)
        data = file.read(int(words[1]))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(folder)
    return int(words[2])
