"""The lab's steps: each is named on the screen with the time it took, and names itself when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


class LabError(Exception):
    """Something the lab needs is missing or went wrong; the text is for the person at the screen."""


_begin = ""


def begin_lines_with(text: str) -> None:
    """Of this process, from now on."""
    global _begin
    _begin = text


def say(text: str) -> None:
    # One write a line: two machines share the screen.
    print("".join(f"{_begin}{line}\n" for line in text.split("\n")), end="", flush=True)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Names what is being done; a LabError from inside says in which step it happened."""
    say(f"==> {name}")
    began = time.monotonic()
    try:
        yield
    except LabError as error:
        print(f"\n{_begin}xen-lab: step failed: {name}\n{error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    taken = time.monotonic() - began
    if taken >= 1:
        say(f"    {taken:.1f} s")


def run(command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """What a program writes to its standard output; a LabError with all it wrote if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, env=os.environ | (env or {}), cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"`{' '.join(words)}` failed with status {done.returncode}:\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout
