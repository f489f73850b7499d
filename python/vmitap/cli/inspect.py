"""`vmitap info`, `read` and `translate`: looking at a guest."""

from __future__ import annotations

import sys

import click

from vmitap.cli.options import address as address_type
from vmitap.cli.options import attach, guest_options, json_option, number, target_argument
from vmitap.cli.options import length as length_type
from vmitap.cli.output import Output, hexdump

run_option = click.option(
    "--run", "seconds", type=click.FloatRange(min=0), default=0.0, metavar="SECONDS", help="Let the guest run that long first."
)
root_option = click.option("--root", type=number, help="Physical address of the page-table root; default: vCPU 0's.")


@click.command()
@target_argument
@run_option
@guest_options
@json_option
def info(target: str, seconds: float, memory: int | None, vcpus: int | None, cmdline: str, as_json: bool) -> None:
    """Show what TARGET is, what its driver can do, and where its vCPUs are."""
    out = Output(as_json=as_json)
    with attach(target, memory, vcpus, cmdline) as vm:
        if seconds:
            vm.run(timeout=seconds)
        guest, caps = vm.info, vm.caps.to_dict()
        # Of a dump the file may have none.
        registers = [vm.registers(number) for number in range(vm.vcpus)] if vm.caps.registers else []
        places = [vm.symbolize(regs.rip) for regs in registers]
        out.object(
            {
                "target": target,
                "driver": guest.driver,
                "version": guest.version,
                "name": guest.name,
                "memory_size": guest.memory_size,
                "symbols": len(vm.symbols),
                "capabilities": dict(caps),
                "vcpus": [
                    {"rip": regs.rip, "symbol": place, "ring": regs.cpl, "root": regs.root}
                    for regs, place in zip(registers, places, strict=True)
                ],
            }
        )
        out.table(
            ["guest", guest.name],
            [
                ["driver", f"{guest.driver} ({guest.version})"],
                ["memory", f"{guest.memory_size >> 20} MiB"],
                ["vCPUs", str(guest.vcpus)],
                ["symbols", str(len(vm.symbols))],
                *([name, str(value) if not isinstance(value, bool) else "yes" if value else "no"] for name, value in caps.items()),
            ],
        )
        if registers:
            out.table(
                ["vCPU", "RIP", "symbol", "ring", "root"],
                [
                    [str(number), f"{regs.rip:#x}", place or "", str(regs.cpl), f"{regs.root:#x}"]
                    for number, (regs, place) in enumerate(zip(registers, places, strict=True))
                ],
            )


@click.command()
@click.argument("address", type=address_type)
@click.argument("length", type=length_type)
@target_argument
@click.option("--physical", is_flag=True, help="ADDRESS is guest-physical.")
@root_option
@click.option("--raw", is_flag=True, help="Write the bytes themselves to stdout.")
@run_option
@guest_options
@json_option
def read(
    address: str | int,
    length: int,
    target: str,
    physical: bool,
    root: int | None,
    raw: bool,
    seconds: float,
    memory: int | None,
    vcpus: int | None,
    cmdline: str,
    as_json: bool,
) -> None:
    """Read LENGTH bytes at ADDRESS from TARGET."""
    if raw and as_json:
        raise click.UsageError("--raw and --json exclude each other")
    if physical and isinstance(address, str):
        raise click.UsageError("--physical needs a number as ADDRESS")
    if physical and root is not None:
        raise click.UsageError("--physical and --root exclude each other")
    out = Output(as_json=as_json)
    with attach(target, memory, vcpus, cmdline) as vm:
        if seconds:
            vm.run(timeout=seconds)
        start = vm.symbol(address) if isinstance(address, str) else address
        data = vm.read_pa(start, length) if physical else vm.read(start, length, root=root)
    if raw:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    out.object({"address": start, "length": length, "hex": data.hex()})
    out.text(hexdump(data, start))


@click.command()
@click.argument("address", type=address_type)
@target_argument
@root_option
@run_option
@guest_options
@json_option
def translate(
    address: str | int,
    target: str,
    root: int | None,
    seconds: float,
    memory: int | None,
    vcpus: int | None,
    cmdline: str,
    as_json: bool,
) -> None:
    """Show the physical address that the virtual ADDRESS has in TARGET."""
    out = Output(as_json=as_json)
    with attach(target, memory, vcpus, cmdline) as vm:
        if seconds:
            vm.run(timeout=seconds)
        va = vm.symbol(address) if isinstance(address, str) else address
        tables = vm.registers().root if root is None else root
        pa = vm.translate(va, tables)
    out.object({"va": va, "pa": pa, "gfn": pa >> 12, "root": tables})
    out.text(f"{va:#x} -> {pa:#x} (frame {pa >> 12:#x}, root {tables:#x})")
