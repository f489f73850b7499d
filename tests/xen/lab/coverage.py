"""Which lines of the Rust core the tests in dom0 ran: the profiles that came back, summed up by LLVM's own tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .step import LabError, run, say

if TYPE_CHECKING:
    from collections.abc import Sequence


def report(parts: Sequence[Path], results: Path, library: Path) -> None:
    """Prints a line for each file of the Xen driver, and writes `coverage.txt` with all. `library` is instrumented, not stripped."""
    profiles = [profile for part in parts for profile in part.glob("*.profraw")]
    if not profiles:
        raise LabError("the tests left no coverage: was the wheel built with -C instrument-coverage?")
    tools = Path(run(["rustc", "--print", "sysroot"]).strip()) / "lib/rustlib"
    found = {tool.name: tool for tool in tools.glob("*/bin/llvm-*")}
    if "llvm-cov" not in found:
        raise LabError("LLVM's tools are needed to read the coverage:\n    rustup component add llvm-tools")
    results.mkdir(exist_ok=True)
    merged = results / "coverage.profdata"
    run([found["llvm-profdata"], "merge", "-sparse", *profiles, "-o", merged])
    text = run([found["llvm-cov"], "report", library, f"-instr-profile={merged}", "--ignore-filename-regex=registry|rustc"])
    (results / "coverage.txt").write_text(text)
    for line in text.splitlines():
        # The file, and how much of its lines.
        words = line.split()
        if len(words) > 9 and "driver/xen" in words[0]:
            say(f"    {words[9]:>8}  {words[0]}")
