"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import click

import vmitap

_Command = TypeVar("_Command", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON objects, one a line.")
target_argument = click.argument("target", default="demo")
timeout_option = click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Stop after that time.")


def guest_options(command: _Command) -> _Command:
    """Adds the options that say how the guest is made."""
    for option in (
        click.option("--cmdline", default="", metavar="TEXT", help="The command line the guest is given."),
        click.option("--vcpus", type=click.IntRange(1, 8), help="How many vCPUs; default: what the image asks for."),
        click.option("--memory", type=click.IntRange(min=1), metavar="MIB", help="Guest memory; default: what the image asks for."),
    ):
        command = option(command)
    return command


def attach(target: str, memory: int | None, vcpus: int | None, cmdline: str, *, abi: Literal["sysv", "ms"] = "sysv") -> vmitap.Vm:
    """A session with the guest that target and options describe."""
    return vmitap.attach(target, memory=None if memory is None else memory << 20, vcpus=vcpus, cmdline=cmdline, abi=abi)


def address(text: str) -> str | int:
    """A symbol, "symbol+offset" or a number (0x... for hexadecimal); symbols are left for the guest to know."""
    if not text[:1].isdigit():
        return text
    value = number(text)
    if value >= 1 << 64:
        raise click.BadParameter(f"{text} does not fit into 64 bits")
    return value


def number(text: str) -> int:
    """A number, decimal or 0x...."""
    try:
        return int(text, 0)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a number") from None


def length(text: str) -> int:
    """A number of bytes, at least one."""
    value = number(text)
    if value < 1:
        raise click.BadParameter("at least one byte must be read")
    return value
