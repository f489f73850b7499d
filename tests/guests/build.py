"""Builds the test guests with gcc; used by the tests, and by hand: `python tests/guests/build.py calls.S out.elf [more.c]`."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
INCLUDES = HERE.parent.parent / "guests"


def build(source: str | Path, output: str | Path, *more: str) -> Path:
    """Makes one guest (`source` is a name in tests/guests or a path, `more` are C files there) into `output`; returns its path."""
    output = Path(output)
    command = [
        "gcc",
        "-nostdlib",
        "-static",
        "-no-pie",
        *("-O1", "-ffreestanding", "-fno-pic", "-mcmodel=kernel", "-mno-red-zone", "-mgeneral-regs-only", "-fcf-protection=none"),
        "-Wl,-z,max-page-size=4096,--build-id=none,--no-warn-rwx-segments",
        f"-Wl,-T,{HERE / 'guest.ld'}",
        f"-I{HERE}",
        f"-I{INCLUDES}",
        "-o",
        str(output),
        *(str(HERE / each) for each in (source, *more)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return output


if __name__ == "__main__":
    build(*sys.argv[1:])
