"""What `help()` says is what the stub says, in its first line."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import vmitap
from vmitap import _native

STUB = ast.parse((Path(vmitap.__file__).parent / "_native.pyi").read_text())


def _documented() -> list[tuple[str, str, str]]:
    found = []
    for node in STUB.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append((node.name, "", ast.get_docstring(node) or ""))
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef) and not each.name.startswith("__")]
            found += [(node.name, method.name, ast.get_docstring(method) or "") for method in methods]
    return [item for item in found if item[2]]


@pytest.mark.parametrize(("owner", "name", "text"), _documented(), ids=lambda value: value.partition("\n")[0][:40])
def test_help_begins_as_the_stub_does(owner: str, name: str, text: str) -> None:
    thing = getattr(_native, owner)
    if name:
        thing = inspect.getattr_static(thing, name)
        thing = thing.__func__ if isinstance(thing, staticmethod) else thing
    assert (inspect.getdoc(thing) or "").partition("\n")[0] == text.partition("\n")[0]
