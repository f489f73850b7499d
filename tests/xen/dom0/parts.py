"""A pytest plugin: the tests of a release are shared by several machines, each of which collects all and runs its own.

All of them work out the same shares. The host checks that no test was lost, from what they say they collected (lab/verdict.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping

SECONDS = 1


def shares(seconds: Mapping[str, float], parts: int) -> list[set[str]]:
    """Tests by name, the slowest first, each to the part that has least to do so far."""
    found: list[set[str]] = [set() for _ in range(parts)]
    load = [0.0] * parts
    for name in sorted(seconds, key=lambda name: (-seconds[name], name)):
        part = load.index(min(load))
        found[part].add(name)
        load[part] += seconds[name]
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="which share of the tests to run, as 1/2")
    parser.addoption("--collected", type=Path, required=True, help="a file for the names of all tests, of whichever share")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"seconds(n): how long it takes in the emulated machine, if that is not about {SECONDS}")


# After pytest's own -k and -m.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.getoption("collected").write_text("".join(f"{item.nodeid}\n" for item in items))
    part, parts = map(int, config.getoption("part").split("/"))
    marks = {item.nodeid: item.get_closest_marker("seconds") for item in items}
    mine = shares({name: mark.args[0] if mark else SECONDS for name, mark in marks.items()}, parts)[part - 1]
    others = [item for item in items if item.nodeid not in mine]
    items[:] = [item for item in items if item.nodeid in mine]
    config.hook.pytest_deselected(items=others)
