"""`vmitap doctor`: what can be used on this machine, and what is missing."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from tempfile import NamedTemporaryFile
from time import perf_counter

import click

import vmitap
from vmitap.cli import exits
from vmitap.cli.options import json_option
from vmitap.cli.output import Output


@dataclass
class Check:
    """One driver: whether it can be used here, what was found, and what to do if it cannot."""

    driver: str
    usable: bool
    found: list[str] = field(default_factory=list)
    missing: str = ""
    hint: str = ""


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Say for each driver whether it can be used here, and what is missing.

    The exit code is 0 if a driver can be used that taps guests, else 1: a dump can be looked at everywhere.
    """
    out = Output(as_json=as_json)
    checks = [check_emu(), check_xen(), check_dump()]
    out.object(
        {
            "version": vmitap.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "drivers": [asdict(check) for check in checks],
        }
    )
    out.text(f"vmitap {vmitap.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for check in checks:
        out.text(f"{check.driver}: {'can be used' if check.usable else 'cannot be used'}", style="bold green" if check.usable else "bold")
        for fact in check.found:
            out.text(f"  {fact}")
        if check.missing:
            out.text(f"  missing: {check.missing}")
        if check.hint:
            out.text(f"  hint: {check.hint}")
    return exits.OK if any(check.usable for check in checks if check.driver != "dump") else exits.NO


def check_emu() -> Check:
    """The embedded driver: found by using it, not by looking at version numbers."""
    library = vmitap.find_libunicorn()
    found = [f"library {library}" if library else "no library in VMITAP_LIBUNICORN or the package unicorn"]
    begin = perf_counter()
    try:
        with vmitap.attach("demo") as vm:
            elapsed = perf_counter() - begin
            found += [f"{vm.info.version}, calibrated", f"the demo guest is ready after {elapsed * 1000:.0f} ms"]
    except vmitap.VmitapError as error:
        return Check("emu", usable=False, found=found, missing=str(error), hint=error.hint)
    return Check("emu", usable=True, found=found)


def check_xen() -> Check:
    """Xen domains: found by asking Xen, without changing anything."""
    try:
        host = vmitap.xen_host()
    except vmitap.AttachError as error:
        return Check("xen", usable=False, missing=error.reason, hint=error.hint)
    found = [f"{host.version}, {host.libraries[0]}"]
    guests = [domain for domain in host.domains if domain.id != 0]
    found += [f"{domain.target}: {domain.obstacle or 'can be tapped'}" for domain in guests] or ["no domain but the control domain"]
    if host.obstacle is not None:
        return Check("xen", usable=False, found=found, missing=host.obstacle, hint=host.hint)
    if guests and all(domain.obstacle for domain in guests):
        return Check("xen", usable=False, found=found, missing="a domain that can be tapped", hint=guests[0].hint)
    return Check("xen", usable=True, found=found)


def check_dump() -> Check:
    """Memory dumps: found by reading one of a single page."""
    try:
        with NamedTemporaryFile(suffix=".raw") as file:
            file.write(bytes(4096))
            file.flush()
            with vmitap.attach(f"dump:{file.name}") as vm:
                vm.read_pa(0, vm.memory.size)
    except (OSError, vmitap.VmitapError) as error:
        return Check("dump", usable=False, missing=str(error), hint="a folder for temporary files is needed to try it")
    return Check(
        "dump",
        usable=True,
        found=["raw memory, LiME, ELF cores of QEMU, libvirt and kdump, Xen cores of HVM and PVH domains, compressed kdumps"],
    )
