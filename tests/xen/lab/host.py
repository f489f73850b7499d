"""What the lab needs from the machine it runs on, each with the package that has it."""

from __future__ import annotations

import shutil

from .step import LabError

# Everything else comes out of Debian's packages into the cache.
PROGRAMS = {
    "apt-get": "apt",
    "apt-cache": "apt",
    "dpkg": "dpkg",
    "gcc": "gcc",
    "ld": "binutils",
    "objcopy": "binutils",
    "make": "make",
    "perl": "perl",
    "tar": "tar",
    "xz": "xz-utils",
}


def check_host() -> None:
    missing = {program: package for program, package in PROGRAMS.items() if shutil.which(program) is None}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise LabError(f"missing: {', '.join(missing)}. On Debian or Ubuntu:\n    sudo apt-get install {packages} libc6-dev")
