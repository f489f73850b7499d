"""What the machines of one release found, as one result: a failure is also a test that was skipped, or that no machine ran."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from .step import say

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

NO_TESTS = 5  # pytest.ExitCode.NO_TESTS_COLLECTED


def verdict(xen: str, parts: Mapping[Path, int], junit: Path) -> int:
    """The exit status of a release. `parts`: each machine's status by the folder of its results. `junit` gets the tests of all."""
    status = max(parts.values())
    lost = [folder for folder in parts if not ((folder / "junit.xml").exists() and (folder / "collected.txt").exists())]
    if lost:
        for folder in lost:
            say(f"xen-lab: Xen {xen}: pytest left no results in {folder}, its status was {parts[folder]}")
        return status or 1
    suites = [suite for folder in parts for suite in ElementTree.parse(folder / "junit.xml").iter("testsuite")]
    if len(parts) > 1:
        # A filter can leave one of the machines without a test.
        status = max(0 if each == NO_TESTS else each for each in parts.values())
        merged = ElementTree.Element("testsuites", name="pytest tests")
        merged.extend(suites)
        junit.parent.mkdir(parents=True, exist_ok=True)
        ElementTree.ElementTree(merged).write(junit, encoding="utf-8", xml_declaration=True)
    count = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")}
    said = ", ".join(f"{number} {name}" for name, number in count.items())
    say(f"xen-lab: Xen {xen}: {said}; status {status}")
    wrong = unaccounted(list(parts))
    if count["skipped"] or not count["tests"]:
        wrong.append("every test must run")
    if status == 0 and (count["failures"] or count["errors"]):
        wrong.append("a failure that no machine's status tells of")
    for each in wrong:
        say(f"xen-lab: Xen {xen}: {each}")
    return status or (1 if wrong else 0)


def unaccounted(folders: Sequence[Path]) -> list[str]:
    """A line for each test that was collected and that not exactly one machine ran, or the other way round."""
    collected = [set(_collected(folder)) for folder in folders]
    wanted = set().union(*collected)
    # One that fails and whose fixtures fail afterwards is in a file twice.
    ran = Counter(name for folder in folders for name in set(_ran(folder)))
    return [
        *(f"not every machine collected {name}" for name in sorted(wanted.difference(collected[0].intersection(*collected)))),
        *(f"no machine ran {name}" for name in sorted(wanted - ran.keys())),
        *(f"{count} machines ran {name}" for name, count in sorted(ran.items()) if count > 1),
        *(f"nobody collected {name}" for name in sorted(ran.keys() - wanted)),
    ]


def _collected(folder: Path) -> list[str]:
    return (folder / "collected.txt").read_text().splitlines()


def _ran(folder: Path) -> list[str]:
    """The tests in a junit.xml, by the names that pytest has for them elsewhere."""
    cases = ElementTree.parse(folder / "junit.xml").iter("testcase")
    return [f"{case.get('classname', '')}.py::{case.get('name', '')}" for case in cases]
