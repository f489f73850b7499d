"""What the tests can ask for: guests that are gone after the test, whatever happens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from domain import Domain, Start

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes minutes, and is run with LONG=1 only")


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts guests; they are destroyed after the test."""
    started: list[Domain] = []

    def start(*args: object, **options: object) -> Domain:
        started.append(Domain(*args, **options))  # type: ignore[arg-type]
        return started[-1]

    request.node.started = started
    yield start
    for domain in started:
        domain.destroy()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Says with each failure where the guests' vCPUs were."""
    report = yield
    if report.failed:
        # At once: if the machine does not come to its end, this is what there is.
        item.config.pluginmanager.getplugin("terminalreporter").write_line(f"\n{report.longreprtext}")
        for domain in getattr(item, "started", []):
            report.sections.append((f"guest {domain.name}", domain.state))
    return report
