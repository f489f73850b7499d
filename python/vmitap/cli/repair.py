"""`vmitap repair`: brings a guest back whose session ended without a word."""

from __future__ import annotations

import click

import vmitap
from vmitap.cli.options import json_option
from vmitap.cli.output import Output


@click.command()
@click.argument("target")
@json_option
def repair(target: str, as_json: bool) -> None:
    """Undo what a session has left in TARGET that was killed: views, breakpoints, held vCPUs, pauses."""
    out = Output(as_json=as_json)
    done = vmitap.repair(target)
    counts = {} if done is None else {"vcpus": done.vcpus, "views": done.views, "frames": done.frames, "pauses": done.pauses}
    out.object({"target": target, "repaired": done is not None, **counts})
    if done is None:
        out.text(f"{target}: nothing was left by a session")
    else:
        out.text(f"{target}: {done.views} views, {done.frames} frames and {done.pauses} pauses undone, {done.vcpus} held vCPUs released")
