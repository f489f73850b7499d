"""The `vmitap` command. docs/cli.md describes it, exit codes included."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from io import TextIOWrapper
from typing import TYPE_CHECKING, NoReturn

import click

import vmitap
from vmitap.cli import exits
from vmitap.cli.bench import bench
from vmitap.cli.demo import demo
from vmitap.cli.doctor import doctor
from vmitap.cli.domains import list_domains
from vmitap.cli.inspect import info, read, translate
from vmitap.cli.journal import journal
from vmitap.cli.output import harmless
from vmitap.cli.repair import repair
from vmitap.cli.report import report
from vmitap.cli.script import run
from vmitap.cli.trace import trace

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(vmitap.__version__, prog_name="vmitap")
def cli() -> None:
    """Tap a running virtual machine without the machine noticing.

    A TARGET is "demo" (a small guest that comes with vmitap), "emu:PATH" (an ELF image), "xen:NAME" (a Xen domain) or
    "dump:PATH" (a memory dump).
    ADDRESS is a symbol, "symbol+0x10" or a number. Start with: vmitap demo
    """


for command in (bench, demo, doctor, info, journal, list_domains, read, repair, report, run, trace, translate):
    cli.add_command(command)


def main() -> NoReturn:
    """Runs the command line and exits: one line and a hint on stderr for what goes wrong, a traceback only for our own bugs."""
    signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # What the terminal's encoding does not have is written out instead of being an error.
            stream.reconfigure(errors="backslashreplace")
    as_json = "--json" in sys.argv[1:]
    try:
        sys.exit(cli.main(standalone_mode=False) or exits.OK)
    except click.ClickException as error:
        if as_json:
            _report(type(error).__name__, error.format_message(), "", exits.USAGE, as_json=True)
        error.show()
        sys.exit(exits.USAGE)
    except (click.Abort, KeyboardInterrupt):
        _report("Interrupted", "interrupted; the guest has been restored", "", exits.INTERRUPTED, as_json=as_json)
    except vmitap.HandlerError as error:
        if isinstance(error.error, BrokenPipeError):
            _reader_has_gone()
        _report(type(error).__name__, str(error), error.hint, exits.code_of(error), as_json=as_json)
    except vmitap.VmitapError as error:
        if isinstance(error, vmitap.RecordingError) and error.path == "-" and error.errno == errno.EPIPE:
            _reader_has_gone()
        _report(type(error).__name__, str(error), error.hint, exits.code_of(error), as_json=as_json)
    except BrokenPipeError:
        _reader_has_gone()
    except Exception as error:
        traceback.print_exc()
        _report(
            type(error).__name__,
            f"this is a bug in vmitap: {error}",
            "please report it with the lines above",
            exits.INTERNAL,
            as_json=as_json,
        )


def _report(kind: str, message: str, hint: str, code: int, *, as_json: bool) -> NoReturn:
    if as_json:
        error = {"kind": kind, "message": message, "hint": hint, "exit_code": code}
        print(json.dumps({"error": error}), file=sys.stderr)
    else:
        print(f"vmitap: {harmless(message)}", file=sys.stderr)
        if hint:
            print(f"  hint: {hint}", file=sys.stderr)
    sys.exit(code)


def _reader_has_gone() -> NoReturn:
    # Python would complain once more when it flushes stdout at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(exits.PIPE)


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    # As an exception it unwinds through `with`, which restores the guest.
    sys.exit(exits.TERMINATED)
