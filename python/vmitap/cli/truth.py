"""The demo guest's truth page: what the guest itself counted. guests/demo/truth.h has the layout."""

from __future__ import annotations

from dataclasses import dataclass
from struct import unpack_from
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmitap import Vm

__all__ = ["FUNCTIONS", "READ_KINDS", "Truth"]

MAGIC = 0x6874757274746D76
VERSION = 1
FINISHED = 0x64656873696E6966

READ_KINDS = ("byte", "aligned", "unaligned", "crossing", "movsb", "movsq", "xadd", "movups", "compare", "scan")
"""Ways in which the guest reads its own code, in the order of `enum read_kind`."""

FUNCTIONS = ("open_file", "read_file", "write_file", "close_file", "check_licence", "spawn_task", "send_packet")
"""Functions that count their calls, in the order of `enum counted_function`."""


@dataclass(frozen=True)
class Truth:
    """The counters at one moment.

    >>> Truth.read(vm).finished
    False
    """

    vcpus: int
    rounds: int
    finished: bool
    tampering_seen: bool
    checks: int
    preemptions: int
    own_breakpoints: int
    licences_accepted: int
    licences_refused: int
    calls: dict[str, int]
    golden: dict[str, int]
    hashes: dict[str, int]
    mismatches: dict[str, int]
    vcpu_checks: tuple[int, ...]
    vcpu_mismatches: tuple[int, ...]

    @classmethod
    def read(cls, vm: Vm) -> Truth:
        """Reads the page from a guest that has come far enough to fill it in; before that every counter is 0."""
        page = vm.read("truth", 0x400)

        def numbers(offset: int, count: int) -> tuple[int, ...]:
            return unpack_from(f"<{count}Q", page, offset)

        magic, version, vcpus, _, rounds, verdict, finished = numbers(0, 7)
        if magic not in (0, MAGIC) or version not in (0, VERSION):
            raise ValueError(f"the truth page has another layout: magic {magic:#x}, version {version}")
        accepted, refused = numbers(0x80, 2)
        return cls(
            vcpus=vcpus,
            rounds=rounds,
            finished=finished == FINISHED,
            tampering_seen=verdict == 2,
            checks=numbers(0x50, 1)[0],
            preemptions=numbers(0x60, 1)[0],
            own_breakpoints=numbers(0x78, 1)[0],
            licences_accepted=accepted,
            licences_refused=refused,
            calls=dict(zip(FUNCTIONS, numbers(0x100, len(FUNCTIONS)), strict=True)),
            golden=dict(zip(READ_KINDS, numbers(0x180, len(READ_KINDS)), strict=True)),
            hashes=dict(zip(READ_KINDS, numbers(0x200, len(READ_KINDS)), strict=True)),
            mismatches=dict(zip(READ_KINDS, numbers(0x280, len(READ_KINDS)), strict=True)),
            vcpu_checks=numbers(0x300, vcpus),
            vcpu_mismatches=numbers(0x340, vcpus),
        )
