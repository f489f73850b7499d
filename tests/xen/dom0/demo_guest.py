"""The demo guest (guests/demo) as a Xen domain: its symbols, its truth page, and how it is told to begin."""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from domain import VCPUS, Domain, Start, wait_for
from vmitap.cli.truth import FUNCTIONS, READ_KINDS, Truth

if TYPE_CHECKING:
    from collections.abc import Sequence

    import vmitap

IMAGE = "/job/demo.elf"
# Those with few events: each read of a hidden page is one, and an event takes milliseconds here.
QUICK = ("crossing", "movsb", "movsq", "movups")
GO = 0x98  # the offset of `go` in the truth page
KERNEL_WINDOW = 0xFFFFFFFF80000000


@cache
def symbols() -> dict[str, int]:
    """Addresses by name, from the image's symbol table (ELF-64 object file format, "Symbol Table")."""
    image = Path(IMAGE).read_bytes()
    table, size, count = struct.unpack_from("<Q10xHH", image, 0x28)[0], *struct.unpack_from("<HH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQII", image, table + size * n) for n in range(count)]
    found = {}
    for _, kind, _, _, offset, length, link, _ in headers:
        if kind != 2:  # SHT_SYMTAB
            continue
        names = headers[link][4]
        for at in range(offset, offset + length, 24):
            name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", image, at)
            end = image.index(b"\0", names + name)
            found[image[names + name : end].decode()] = value
    return found


def start_demo(
    start: Start, cmdline: str, *, vcpus: int = VCPUS, kinds: Sequence[str] = QUICK, name: str = "demo", **options: object
) -> Domain:
    """A demo guest that has come up and waits to be told to begin; its checks read in the ways `kinds`."""
    bits = sum(1 << READ_KINDS.index(kind) for kind in kinds)
    guest = start(name, IMAGE, f"{cmdline} wait=1 tick=1000000 vcpus={vcpus} kinds={bits}", vcpus=vcpus, **options)
    wait_for("the guest's start", lambda: guest.console.count("waiting") > 0)
    return guest


def begin(vm: vmitap.Vm, turn: int = 1) -> None:
    """Lets the guest begin, or with paced=N on its command line do as many turns."""
    vm.write_pa(symbols()["truth"] - KERNEL_WINDOW + GO, turn.to_bytes(2, "little"))


def truth(vm: vmitap.Vm) -> Truth:
    return Truth.read(cast("vmitap.Vm", SimpleNamespace(read=lambda name, length: vm.read_pa(symbols()[name] - KERNEL_WINDOW, length))))


def finish(vm: vmitap.Vm, limit: float = 120) -> Truth:
    """Lets the guest begin and come to its end."""
    begin(vm)
    result = vm.run(timeout=limit)
    assert result.reason == "idle", result
    return truth(vm)


def assert_unseen(seen: Truth, kinds: Sequence[str] = QUICK) -> None:
    """Every vCPU has looked, in each of the ways, and found what must be there."""
    assert seen.finished
    assert min(seen.vcpu_checks) > 0
    assert seen.mismatches == dict.fromkeys(READ_KINDS, 0)
    assert {kind: seen.hashes[kind] for kind in kinds} == {kind: seen.golden[kind] for kind in kinds}


__all__ = ["FUNCTIONS", "GO", "IMAGE", "QUICK", "READ_KINDS", "assert_unseen", "begin", "finish", "start_demo", "symbols", "truth"]
