"""`vmitap run`: a Python script with a session ready in it."""

from __future__ import annotations

import runpy
import sys
import traceback
from pathlib import Path

import click

import vmitap
from vmitap.cli import exits
from vmitap.cli.options import attach, guest_options, json_option, target_argument, timeout_option
from vmitap.cli.output import Output, per_second
from vmitap.cli.trace import summary


@click.command()
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@target_argument
@timeout_option
@guest_options
@json_option
def run(
    script: Path,
    target: str,
    timeout: float | None,
    memory: int | None,
    vcpus: int | None,
    cmdline: str,
    as_json: bool,
) -> int:
    """Run SCRIPT, with `vm` a session with TARGET, then the guest.

    The script sets breakpoints; once it has ended the guest runs until it halts, until --timeout or Ctrl-C, and a summary is
    printed on stderr. A script that calls vm.run() or vm.detach() itself decides for itself. The script may import its neighbours.
    """
    out = Output(as_json=as_json)
    sys.path.insert(0, str(script.resolve().parent))
    with attach(target, memory, vcpus, cmdline) as vm:
        before = vm.stats.events
        try:
            runpy.run_path(str(script), init_globals={"vm": vm, "vmitap": vmitap}, run_name="__main__")
            if vm.closed or vm.stats.events != before or not len(vm.breakpoints):
                return exits.OK
            result = vm.run(timeout=timeout)
        except vmitap.HandlerError as error:
            # The script's own code: its author needs the traceback.
            traceback.print_exception(error.error)
            raise
        except vmitap.VmitapError:
            raise
        except Exception:
            traceback.print_exc()
            return exits.HANDLER
    out.object({"summary": summary(result)})
    if not as_json:
        rate = per_second(result.hits_per_second)
        print(f"{result.hits} hits in {result.elapsed:.3f} s ({rate}), ended by {result.reason}", file=sys.stderr)
    return exits.OK
