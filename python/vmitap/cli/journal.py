"""`vmitap journal`: what a session's journal of events holds, also of one that was killed."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmitap.cli.options import json_option
from vmitap.cli.output import Output

if TYPE_CHECKING:
    from vmitap import JournalEvent


@click.command(context_settings={"show_default": True})
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--last", type=click.IntRange(min=1), default=100, metavar="N", help="How many of the last events to show.")
@json_option
def journal(file: Path, last: int, as_json: bool) -> None:
    """Show the last events in FILE, which `vm.journal` or `vmitap trace --journal` has written.

    The file can be that of a session that was killed: its last lines are what the session was at.
    """
    from vmitap import read_journal

    contents = read_journal(file)
    began = f"{datetime.fromtimestamp(contents.began, UTC):%Y-%m-%d %H:%M:%S}"
    ended = "ended in order" if contents.closed else "not ended: the session lives or was killed"
    out = Output(as_json=as_json)
    out.object(
        {
            "target": contents.target,
            "process": contents.process,
            "began": contents.began,
            "room": contents.room,
            "total": contents.total,
            "torn": contents.torn,
            "closed": contents.closed,
        }
    )
    events = contents.events
    shown = events[-last:]
    for event in shown:
        access = None if event.access is None else event.access.name
        out.object(
            {
                "number": event.number,
                "timestamp": event.timestamp,
                "vcpu": event.vcpu,
                "reason": event.reason,
                "access": access,
                "address": event.address,
                "value": event.value,
                "rip": event.rip,
                "root": event.root,
                "outcome": event.outcome,
                "breakpoint": event.breakpoint,
                "symbol": event.symbol,
            }
        )
    out.table(
        ["event", "time", "vCPU", "reason", "place", "outcome"],
        [[str(each.number), f"{each.timestamp:.6f}", str(each.vcpu), each.reason, _place(each), each.outcome] for each in shown],
    )
    torn = f", {contents.torn} torn" if contents.torn else ""
    out.text(
        f"{len(shown)} of {contents.total} events of {contents.target} (process {contents.process}, begun {began} UTC){torn}; {ended}",
        style="dim",
    )


def _place(event: JournalEvent) -> str:
    if event.value is not None:
        return f"{event.value:#x} at {event.rip:#x}"
    name = event.symbol or (f"{event.address:#x}" if event.address is not None else "?")
    if event.access is None or event.address == event.rip:
        return name
    return f"{event.access.name} of {event.address or 0:#x} at {event.rip:#x}"
