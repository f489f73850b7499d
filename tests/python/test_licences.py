"""What the wheel is made of may be given away under MIT OR Apache-2.0, is released, and comes from the registry."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"vmitap", "xen-sys"}
# Licences that ask for no more than that their text is kept.
ALLOWED = {
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
}


def is_allowed(expression: str) -> bool:
    """Whether an SPDX expression (the old "/" is OR) leaves a choice of allowed licences only."""
    while inner := re.search(r"\(([^()]*)\)", expression):
        expression = expression.replace(inner[0], "MIT" if is_allowed(inner[1]) else "none")
    either = re.split(r" OR | ?/ ?", expression)
    return any(all(part.strip() in ALLOWED for part in each.split(" AND ")) for each in either)


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT OR Apache-2.0", True),
        ("MIT/GPL-2.0", True),
        ("GPL-2.0", False),
        ("MIT AND GPL-2.0", False),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", True),
        ("(MIT OR GPL-2.0) AND LGPL-2.1-or-later", False),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0 WITH Classpath-exception-2.0", False),
    ],
)
def test_a_licence_expression_is_read_as_written(expression: str, allowed: bool) -> None:
    assert is_allowed(expression) == allowed


def test_every_crate_may_be_given_away_and_comes_from_the_registry() -> None:
    command = ["cargo", "metadata", "--format-version=1", "--all-features", "--locked"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    packages = [package for package in json.loads(done.stdout)["packages"] if package["name"] not in OURS]
    assert len(packages) > 50
    assert [f"{each['name']}: {each['license']}" for each in packages if not is_allowed(each["license"] or "none")] == []
    assert [each["name"] for each in packages if not (each["source"] or "").startswith("registry+")] == []
