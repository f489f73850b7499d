"""The examples of the README and of docs do what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
PAGES = sorted((README.parent / "docs").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


EXAMPLES = [(page.name, number, text) for page in PAGES for number, text in enumerate(blocks(page, "python"))]


def block(language: str) -> str:
    """The README's first code block of that language."""
    found = blocks(README, language)
    assert found, f"the README has no block of {language}"
    return found[0]


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


@pytest.mark.parametrize(("page", "number", "text"), EXAMPLES, ids=[f"{page}-{number}" for page, number, _ in EXAMPLES])
def test_each_example_of_the_docs_runs(page: str, number: int, text: str, tmp_path: Path) -> None:
    is_test = "def test_" in text
    example = tmp_path / ("test_example.py" if is_test else "example.py")
    example.write_text(text)
    # A page's first block names the plugin that its tests need.
    how = ["-m", "pytest", "-p", "vmitap.testing", "-p", "no:cacheprovider"] if is_test else []
    done = subprocess.run([sys.executable, "-W", "error", *how, str(example)], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_docs_have_examples() -> None:
    assert {"filters.md", "monitors.md", "paging.md", "recordings.md", "testing.md"} <= {page for page, _, _ in EXAMPLES}
