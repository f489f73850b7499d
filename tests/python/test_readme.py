"""The README's example does what the README says."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def block(language: str) -> str:
    """The first code block of that language."""
    match = re.search(rf"^```{language}\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert match, f"the README has no block of {language}"
    return match[1]


def test_the_first_example_prints_what_the_readme_says(tmp_path: Path) -> None:
    example = tmp_path / "example.py"
    example.write_text(block("python"))
    done = subprocess.run([sys.executable, "-W", "error", str(example)], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == block("text")


def test_the_first_example_is_short() -> None:
    assert len(block("python").splitlines()) <= 25


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert targets
    missing = [target for target in targets if "://" not in target and not (README.parent / target).exists()]
    assert missing == []
