"""Everything vmitap raises: one class per failure a caller can act on, with the data in attributes.

All derive from `VmitapError`, can be pickled, and print one line. Numbers that are addresses print in hexadecimal.

>>> try:
...     vm.symbol("opne_file")
... except vmitap.SymbolNotFoundError as error:
...     error.name, error.nearest[0]
('opne_file', 'open_file')
"""

from __future__ import annotations

from errno import EEXIST
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmitap._native import Hit

__all__ = [
    "AttachError",
    "BadAccessError",
    "BreakpointConflictError",
    "BreakpointNotFoundError",
    "DeadlineExceededError",
    "DefaultViewError",
    "DomainGoneError",
    "DriverError",
    "EventJournalError",
    "HandlerError",
    "ImageError",
    "InvalidArgumentError",
    "JournalError",
    "NoPendingEventError",
    "NotInDumpError",
    "NotSupportedError",
    "OutOfRangeError",
    "RecordingError",
    "SessionBusyError",
    "StaleContextError",
    "StringTooLongError",
    "SymbolNotFoundError",
    "TranslationError",
    "UndoFailedError",
    "VcpuNotFoundError",
    "ViewNotFoundError",
    "VmitapError",
]


class VmitapError(Exception):
    """The base of every error of this package.

    `hint` says in one sentence what to do about it; it is empty where nothing general can be said.
    """

    hint: str = ""


class AttachError(VmitapError):
    """The target cannot be attached to; nothing was changed."""

    def __init__(self, target: str, reason: str, hint: str = "") -> None:
        super().__init__(target, reason, hint)
        self.target = target
        self.reason = reason
        self.hint = hint

    def __str__(self) -> str:
        return f"cannot attach to {self.target!r}: {self.reason}"


class ImageError(VmitapError):
    """A file is not what it was given as: a truncated or hostile ELF image, for one."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what, reason)
        self.what = what
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.what} is not usable: {self.reason}"


class JournalError(VmitapError):
    """The journal of a session cannot be read or written, is none, or another session has it; nothing was changed in the guest."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"the journal {self.path} is not usable: {self.reason}"


class EventJournalError(VmitapError):
    """A journal of events (`vm.journal`) cannot be made or read, or a file is none. Sessions and guests are not touched by that.

    `path` is the file, `errno` the system's error number or None, `reason` what is wrong with it.
    """

    def __init__(self, path: str, errno: int | None, reason: str) -> None:
        super().__init__(path, errno, reason)
        self.path = path
        self.errno = errno
        self.reason = reason
        if errno == EEXIST:
            self.hint = "`vmitap journal` shows what is in it; replace=True (--replace) takes its place"

    def __str__(self) -> str:
        return f"the journal of events {self.path} is not usable: {self.reason}"


class DriverError(VmitapError):
    """A call of the driver failed. `errno` is 0 where the library below gave none."""

    def __init__(self, op: str, errno: int, detail: str) -> None:
        super().__init__(op, errno, detail)
        self.op = op
        self.errno = errno
        self.detail = detail

    def __str__(self) -> str:
        number = f" (errno {self.errno})" if self.errno else ""
        return f"{self.op} failed: {self.detail}{number}"


class NotSupportedError(VmitapError):
    """The driver does not offer what the call needs; `Vm.caps` says what it does offer."""

    def __init__(self, driver: str, capability: str) -> None:
        super().__init__(driver, capability)
        self.driver = driver
        self.capability = capability
        if capability == "registers":
            self.hint = "give root= (--root), the physical address of the page tables; physical addresses need none"

    def __str__(self) -> str:
        # Who reads virtual memory without a root asked for no registers.
        follows = ", so virtual addresses need a root" if self.capability == "registers" else ""
        return f"the {self.driver} driver does not offer {self.capability}{follows}"


class TranslationError(VmitapError):
    """A virtual address has no translation under the page tables at `root`.

    `fault` is "not-present", "non-canonical", "beyond-memory" or "reserved-bit". `level` is the level of the entry that
    ended the walk (1 the page table, 4 the PML4, 5 the PML5; 0 the page itself), `pa` where that entry is;
    both are None for a non-canonical address.
    """

    def __init__(self, va: int, root: int, fault: str, level: int | None = None, pa: int | None = None) -> None:
        super().__init__(va, root, fault, level, pa)
        self.va = va
        self.root = root
        self.fault = fault
        self.level = level
        self.pa = pa

    def __str__(self) -> str:
        why = {
            "non-canonical": "the address is not canonical",
            "not-present": f"the level-{self.level} entry at {self.pa or 0:#x} is not present",
            "reserved-bit": f"the level-{self.level} entry at {self.pa or 0:#x} has a reserved bit set",
            "beyond-memory": f"{f'the level-{self.level} entry' if self.level else 'the page'} at {self.pa or 0:#x} is beyond guest memory",
        }.get(self.fault, self.fault)
        return f"cannot translate {self.va:#x} under root {self.root:#x}: {why}"


class OutOfRangeError(VmitapError):
    """A range of physical addresses reaches beyond guest memory, which ends at `end`."""

    def __init__(self, pa: int, length: int, end: int) -> None:
        super().__init__(pa, length, end)
        self.pa = pa
        self.length = length
        self.end = end

    def __str__(self) -> str:
        return f"{self.length} bytes at physical address {self.pa:#x} reach beyond guest memory, which ends at {self.end:#x}"


class NotInDumpError(VmitapError):
    """A dump does not hold the physical address `pa`: it was left out, or the guest had no memory there.

    `length` is how many bytes were wanted from there on, to the end of the read or, for a virtual address, of the page; some may be there.
    """

    def __init__(self, pa: int, length: int) -> None:
        super().__init__(pa, length)
        self.pa = pa
        self.length = length

    def __str__(self) -> str:
        return f"the dump does not hold physical address {self.pa:#x}, from where {self.length} bytes are wanted"


class StringTooLongError(VmitapError):
    """A string in guest memory has no end within `limit` bytes."""

    def __init__(self, va: int, limit: int) -> None:
        super().__init__(va, limit)
        self.va = va
        self.limit = limit

    def __str__(self) -> str:
        return f"no end of string within {self.limit} bytes at {self.va:#x}"


class SymbolNotFoundError(VmitapError, LookupError):
    """A symbol is not known. `nearest` holds the names most like it, best first; it may be empty."""

    def __init__(self, name: str, nearest: list[str]) -> None:
        super().__init__(name, nearest)
        self.name = name
        self.nearest = nearest

    def __str__(self) -> str:
        nearest = f"; the nearest are {', '.join(self.nearest)}" if self.nearest else ""
        return f"symbol {self.name!r} is not known{nearest}"


class ViewNotFoundError(VmitapError):
    """The view does not exist."""

    def __init__(self, view: int) -> None:
        super().__init__(view)
        self.view = view

    def __str__(self) -> str:
        return f"view {self.view} does not exist"


class DefaultViewError(VmitapError):
    """The operation `op` needs a view other than the default one, in which nothing can be hidden."""

    def __init__(self, op: str) -> None:
        super().__init__(op)
        self.op = op

    def __str__(self) -> str:
        return f"{self.op} needs a view other than the default one, in which nothing can be hidden"


class VcpuNotFoundError(VmitapError, LookupError):
    """The vCPU does not exist: the guest has `count`, numbered from 0."""

    def __init__(self, vcpu: int, count: int) -> None:
        super().__init__(vcpu, count)
        self.vcpu = vcpu
        self.count = count

    def __str__(self) -> str:
        return f"vCPU {self.vcpu} does not exist: the guest has {self.count}"


class BadAccessError(VmitapError):
    """Those access rights (`access`, as "r-x") cannot be set on that frame of that view."""

    def __init__(self, view: int, gfn: int, access: str) -> None:
        super().__init__(view, gfn, access)
        self.view = view
        self.gfn = gfn
        self.access = access

    def __str__(self) -> str:
        return f"access {self.access} cannot be set on frame {self.gfn:#x} in view {self.view}"


class BreakpointNotFoundError(VmitapError, LookupError):
    """No breakpoint is at that physical address of that view."""

    def __init__(self, pa: int, view: int) -> None:
        super().__init__(pa, view)
        self.pa = pa
        self.view = view

    def __str__(self) -> str:
        return f"no breakpoint at physical address {self.pa:#x} in view {self.view}"


class BreakpointConflictError(VmitapError):
    """A breakpoint with the same address, root and key exists already; it was left as it is."""

    def __init__(self, address: int) -> None:
        super().__init__(address)
        self.address = address

    def __str__(self) -> str:
        return f"a breakpoint at {self.address:#x} with the same root and key exists already"


class NoPendingEventError(VmitapError):
    """An event was answered that does not wait for an answer: each is answered exactly once."""

    def __init__(self, vcpu: int) -> None:
        super().__init__(vcpu)
        self.vcpu = vcpu

    def __str__(self) -> str:
        return f"vCPU {self.vcpu} has no event that waits for an answer"


class DomainGoneError(VmitapError):
    """The guest is gone: it was destroyed, or ended in a fault it could not handle."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the guest is gone: {self.reason}"


class InvalidArgumentError(VmitapError, ValueError):
    """A value given by the caller makes no sense; `what` names the argument."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what, reason)
        self.what = what
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


class StaleContextError(VmitapError):
    """Something was used after its time: `hit.vm` after its handler had returned, or a session after `detach()`."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return f"{self.what} is no longer valid"


class SessionBusyError(VmitapError):
    """`op` cannot be done while the session's loop is running, in a handler or in another thread."""

    def __init__(self, op: str) -> None:
        super().__init__(op)
        self.op = op

    def __str__(self) -> str:
        return f"{self.op} cannot be used while the session is running"


class UndoFailedError(VmitapError):
    """An operation failed, and putting things back failed too. `left_behind` says what is still changed in the guest."""

    def __init__(self, cause: VmitapError, left_behind: str) -> None:
        super().__init__(cause, left_behind)
        self.cause = cause
        self.left_behind = left_behind
        self.__cause__ = cause

    def __str__(self) -> str:
        return f"{self.cause}; and undoing it failed too, which left behind: {self.left_behind}"


class RecordingError(VmitapError):
    """A recording could not be written: a full disk, a closed pipe, a reader that stopped. The guest is fine, and so are later runs.

    `path` is the file, `errno` the system's error number or None, `reason` what happened. The file can be read up to the last whole batch:
    `rows` rows.
    """

    def __init__(self, path: str, errno: int | None, reason: str, rows: int) -> None:
        super().__init__(path, errno, reason, rows)
        self.path = path
        self.errno = errno
        self.reason = reason
        self.rows = rows

    def __str__(self) -> str:
        return f"the recording {self.path} could not be written: {self.reason}; {self.rows} rows are in it"


class HandlerError(VmitapError):
    """A handler raised. The vCPU was answered first and went on; then `run()` raised this.

    `hit` is the hit the handler was called with, `error` what it raised (also in `__cause__`).
    """

    def __init__(self, hit: Hit, error: Exception) -> None:
        super().__init__(hit, error)
        self.hit = hit
        self.error = error
        self.__cause__ = error

    def __str__(self) -> str:
        return f"the handler at {self.hit.symbol or hex(self.hit.address)} raised {type(self.error).__name__}: {self.error}"


class DeadlineExceededError(VmitapError):
    """A handler took longer than its deadline. Its verdict was carried out and the guest went on; then `run()` raised this.

    `hit` is the hit it was called with, `deadline` and `elapsed` are seconds.
    """

    def __init__(self, hit: Hit, deadline: float, elapsed: float) -> None:
        super().__init__(hit, deadline, elapsed)
        self.hit = hit
        self.deadline = deadline
        self.elapsed = elapsed

    def __str__(self) -> str:
        where = self.hit.symbol or hex(self.hit.address)
        return f"the handler at {where} took {self.elapsed:.3f} s; its deadline is {self.deadline:.3f} s"
