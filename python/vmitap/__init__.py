"""Tap a running virtual machine from Python without the machine noticing.

>>> import vmitap
>>> with vmitap.attach("demo") as vm:
...     bp = vm.breakpoint("open_file")
...     vm.run(timeout=5, max_hits=1).hits
1

Every class is documented in the stub `_native.pyi`, every error in `vmitap.errors`.
Messages go to `logging.getLogger("vmitap")`; nothing is printed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmitap import _native
from vmitap._native import (
    Breakpoint,
    BreakpointController,
    BreakpointManager,
    Breakpoints,
    BreakpointStats,
    Caps,
    EventJournal,
    Events,
    Hit,
    JournalContents,
    JournalEvent,
    ManagedBreakpoint,
    Memory,
    MemoryController,
    PageTableEvent,
    PageTableMonitor,
    Recording,
    RecordingFile,
    Registers,
    Repaired,
    RunResult,
    Stats,
    Symbol,
    Symbols,
    Verdict,
    View,
    Views,
    Vm,
    VmiCore,
    VmiEvent,
    VmiEventResponse,
    VmInfo,
    XenDomain,
    XenHost,
    __version__,
    read_journal,
    repair,
    xen_host,
)
from vmitap.capture import Backtrace, Stack, Struct
from vmitap.errors import (
    AttachError,
    BadAccessError,
    BreakpointConflictError,
    BreakpointNotFoundError,
    DeadlineExceededError,
    DefaultViewError,
    DomainGoneError,
    DriverError,
    EventJournalError,
    HandlerError,
    ImageError,
    InvalidArgumentError,
    JournalError,
    NoPendingEventError,
    NotInDumpError,
    NotSupportedError,
    OutOfRangeError,
    RecordingError,
    SessionBusyError,
    StaleContextError,
    StringTooLongError,
    SymbolNotFoundError,
    TranslationError,
    UndoFailedError,
    VcpuNotFoundError,
    ViewNotFoundError,
    VmitapError,
)
from vmitap.filters import Arg, Bytes, Cstr, Filter, Mem, Number, Reg, Text, Utf16
from vmitap.policy import Access, Budget, OnWrite, Policy, WritePolicy
from vmitap.protocols import RegisterValues, TapController

if TYPE_CHECKING:
    import os
    from typing import Literal

__all__ = [
    "Access",
    "Arg",
    "AttachError",
    "Backtrace",
    "BadAccessError",
    "Breakpoint",
    "BreakpointConflictError",
    "BreakpointController",
    "BreakpointManager",
    "BreakpointNotFoundError",
    "BreakpointStats",
    "Breakpoints",
    "Budget",
    "Bytes",
    "Caps",
    "Cstr",
    "DeadlineExceededError",
    "DefaultViewError",
    "DomainGoneError",
    "DriverError",
    "EventJournal",
    "EventJournalError",
    "Events",
    "Filter",
    "HandlerError",
    "Hit",
    "ImageError",
    "InvalidArgumentError",
    "JournalContents",
    "JournalError",
    "JournalEvent",
    "ManagedBreakpoint",
    "Mem",
    "Memory",
    "MemoryController",
    "NoPendingEventError",
    "NotInDumpError",
    "NotSupportedError",
    "Number",
    "OnWrite",
    "OutOfRangeError",
    "PageTableEvent",
    "PageTableMonitor",
    "Policy",
    "Recording",
    "RecordingError",
    "RecordingFile",
    "Reg",
    "RegisterValues",
    "Registers",
    "Repaired",
    "RunResult",
    "SessionBusyError",
    "Stack",
    "StaleContextError",
    "Stats",
    "StringTooLongError",
    "Struct",
    "Symbol",
    "SymbolNotFoundError",
    "Symbols",
    "TapController",
    "Text",
    "TranslationError",
    "UndoFailedError",
    "Utf16",
    "VcpuNotFoundError",
    "Verdict",
    "View",
    "ViewNotFoundError",
    "Views",
    "Vm",
    "VmInfo",
    "VmiCore",
    "VmiEvent",
    "VmiEventResponse",
    "VmitapError",
    "WritePolicy",
    "XenDomain",
    "XenHost",
    "__version__",
    "attach",
    "find_libunicorn",
    "read_journal",
    "repair",
    "xen_host",
]


def attach(
    target: str = "demo",
    *,
    memory: int | None = None,
    vcpus: int | None = None,
    cmdline: str = "",
    libunicorn: str | os.PathLike[str] | None = None,
    on_write: OnWrite | None = None,
    abi: Literal["sysv", "ms"] = "sysv",
    repair: bool = False,
    watchdog: bool = True,
) -> Vm:
    """Opens a session with a guest. Use it as a context manager: leaving `with` restores the guest.

    The guest's vCPUs are put into a view of their own, in which breakpoints will be planted; nothing else changes. A guest on
    the embedded driver is made new for each session and runs only inside `run`, `events` and `wait_event`. A Xen domain runs on
    all the time; a vCPU of it that hits a breakpoint stands still until `run`, `events` or `wait_event` looks at it. A dump is
    opened for reading and never changed.

    Args:
        target: "demo" (the guest that comes with vmitap), "emu:PATH" (an ELF image, see docs/guests.md), "xen:NAME" or
            "xen:NUMBER" (a domain of this Xen machine, see docs/xen.md), or "dump:PATH" (a memory dump, see docs/dumps.md).
        memory: bytes of guest memory, a multiple of 4096; None: what the image asks for. Not for a Xen domain or a dump.
        vcpus: 1 to 8; None: what the image asks for. Not for a Xen domain or a dump.
        cmdline: the command line the guest is given. Not for a Xen domain or a dump.
        libunicorn: path of libunicorn.so.2; None: the environment's VMITAP_LIBUNICORN, else the one in the installed
            package `unicorn`, which is found without importing it.
        on_write: what a write to a hidden page does where a breakpoint says nothing else; None: `OnWrite.REAPPLY`.
        abi: how the guest's functions get their arguments, for `Arg` and `Hit.args`: "sysv" or "ms".
        repair: whether what a killed session has left in the guest is undone first; else that is an error. See `repair`.
        watchdog: whether a child process undoes it at once when this one is killed. A guest on the embedded driver ends with
            this process, and needs none.

    Raises:
        AttachError: no such target, a library that is missing or unfit, a domain that cannot be tapped, has a session or was
            left by one that was killed; `hint` says what to do.
        ImageError: the file is no usable ELF image, or no dump of a known format; it says what is wrong and where.
        InvalidArgumentError: `memory` or `vcpus` make no sense, or the target does not have them.

    >>> import vmitap
    >>> with vmitap.attach("demo", vcpus=2) as vm:
    ...     vm.vcpus
    2
    """
    import sys

    path = str(libunicorn) if libunicorn is not None else find_libunicorn()
    guard = [sys.executable, "-m", "vmitap.watchdog", target] if watchdog and sys.executable else None
    return _native.open(
        target,
        memory=memory,
        vcpus=vcpus,
        cmdline=cmdline,
        libunicorn=path,
        on_write=on_write,
        abi=abi,
        repair=repair,
        watchdog=guard,
    )


def find_libunicorn() -> str | None:
    """The emulator's library: VMITAP_LIBUNICORN, else that of the installed package `unicorn`; None if there is neither.

    The package is located but not imported: its import is slow and nothing of it but the library is used.

    >>> vmitap.find_libunicorn() is not None
    True
    """
    import os

    if path := os.environ.get("VMITAP_LIBUNICORN"):
        return path
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("unicorn")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        library = Path(folder, "lib", "libunicorn.so.2")
        if library.is_file():
            return str(library)
    return None
