"""Every example in the stub and in the package's docstrings runs and prints what it says."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vmitap

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(vmitap.__file__).parent
FILES = sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("*.pyi")])

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _examples(path: Path) -> Iterator[doctest.DocTest]:
    parser = doctest.DocTestParser()

    def walk(node: _Documented, name: str) -> Iterator[doctest.DocTest]:
        text = ast.get_docstring(node)
        if text and ">>>" in text:
            yield parser.get_doctest(text, {}, name, str(path), getattr(node, "lineno", 1))
        for child in node.body:
            if isinstance(child, _Documented):
                yield from walk(child, f"{name}.{child.name}")

    return walk(ast.parse(path.read_text()), path.stem)


EXAMPLES = [example for path in FILES for example in _examples(path)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_example_prints_what_it_says(example: doctest.DocTest, vm: vmitap.Vm, scratch: int) -> None:
    # As always with doctest, the names of its own module; those of a stub are the package's.
    path = Path(example.filename or "")
    names = "vmitap" if path.suffix == ".pyi" or path.stem == "__init__" else f"vmitap.{path.stem}"
    module = importlib.import_module(names)
    example.globs = {**vars(module), "vmitap": vmitap, "vm": vm, "scratch": scratch}
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert not result.failed, "".join(report)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 100
