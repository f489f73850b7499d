"""The compiled core of vmitap. This file is its type stub and its reference manual: `import vmitap` gives every name.

In every example `vm` is a fresh `vmitap.attach("demo")` and `scratch` an address in it that may be written to. The examples are
run as tests.

Addresses are `int`: `va` a guest-virtual address, `pa` a guest-physical one, `gfn` a frame number (`pa >> 12`).
`root` is the physical address of a page-table root (CR3 without its flag bits); where it may be None, the root in use is
meant: that of the hit's vCPU through `hit.vm`, else that of vCPU 0. `timeout`, `deadline` and all other times are seconds.
Symbols are written `"open_file"` or `"open_file+0x10"`. Whatever fails raises a `vmitap.VmitapError` and changes nothing.
"""

from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from types import TracebackType
from typing import Literal, TypeAlias, TypeVar, Unpack, final

import pandas
import polars
import pyarrow
from typing_extensions import Buffer, CapsuleType

from vmitap.capture import Capturable
from vmitap.filters import Filter
from vmitap.policy import Access, Budget, OnWrite, WritePolicy
from vmitap.protocols import RegisterValues, TapController

__all__ = [
    "Breakpoint",
    "BreakpointController",
    "BreakpointManager",
    "BreakpointStats",
    "Breakpoints",
    "Caps",
    "EventJournal",
    "Events",
    "Hit",
    "JournalContents",
    "JournalEvent",
    "ManagedBreakpoint",
    "Memory",
    "MemoryController",
    "PageTableEvent",
    "PageTableMonitor",
    "Recording",
    "RecordingFile",
    "Registers",
    "Repaired",
    "RunResult",
    "Stats",
    "Symbol",
    "Symbols",
    "Verdict",
    "View",
    "Views",
    "Vm",
    "VmInfo",
    "VmiCore",
    "VmiEvent",
    "VmiEventResponse",
    "XenDomain",
    "XenHost",
    "__version__",
    "open",
    "read_journal",
    "repair",
    "xen_host",
]

__version__: str

_Action: TypeAlias = Literal["continue", "step", "reported-step", "emulate", "deny", "reinject"]
_Handler: TypeAlias = Callable[[Hit], Verdict | None]
_WriteHandler: TypeAlias = Callable[[Hit], OnWrite]
_HandlerT = TypeVar("_HandlerT", bound=_Handler)

def open(
    target: str,
    *,
    memory: int | None = None,
    vcpus: int | None = None,
    cmdline: str = "",
    libunicorn: str | None = None,
    on_write: OnWrite | None = None,
    abi: Literal["sysv", "ms"] = "sysv",
    repair: bool = False,
    watchdog: Sequence[str] | None = None,
) -> Vm:
    """Opens a session with a guest; `vmitap.attach` calls this after it has found the emulator's library.

    The guest's tap view is created and its vCPUs are put into it; nothing else changes. A guest on the embedded driver
    is made new for each session, boots up to its entry point and runs only inside `run`, `events` and `wait_event`.

    Args:
        target: "demo" (the guest that comes with vmitap), "emu:PATH" (an ELF image, see docs/guests.md), "xen:NAME" or
            "xen:NUMBER" (a domain of this Xen machine, see docs/xen.md), or "dump:PATH" (a memory dump, see docs/dumps.md).
        memory: bytes of guest memory, a multiple of 4096; None: what the image asks for.
        vcpus: 1 to 8; None: what the image asks for.
        cmdline: the command line the guest is given.
        libunicorn: path of libunicorn; None: the environment's VMITAP_LIBUNICORN.
        on_write: what a write to a hidden page does where a breakpoint says nothing else; None: `OnWrite.REAPPLY`.
        abi: how the guest's functions get their arguments, for `Arg` and `Hit.args`: "sysv" or "ms".
        repair: whether what a killed session has left in the guest is undone first, as `repair` does.
        watchdog: a command that is started with the session and reads its standard input, which ends when this process does; it
            is to repair the guest then. Not started for a guest that ends with this process. None: no watchdog.

    Raises:
        AttachError: no such target, a library that is missing or unfit, a domain that cannot be tapped; `hint` says what to do.
        ImageError: the file is no usable ELF image, or no dump of a known format; it says what is wrong and where.
        InvalidArgumentError: `memory` or `vcpus` make no sense, or the target does not have them.

    >>> import vmitap
    >>> with vmitap.attach("demo", vcpus=2) as two:
    ...     two.vcpus
    2
    """

def repair(target: str) -> Repaired | None:
    """Brings a guest back whose session ended without a word: the tool was killed, or crashed.

    Undoes everything that session had added: monitors, vCPUs held by events that nobody answers, steps, views, frames, pauses,
    as its journal says. What it changed for its user stays: memory and registers that were written. The guest runs on.

    Args:
        target: "xen:NAME" or "xen:NUMBER".

    Returns:
        What was undone; None if no session has left anything.

    Raises:
        NotSupportedError: the target is a guest on the embedded driver, which ends with its tool.
        AttachError: the session is alive, or the guest cannot be attached to.
        JournalError: the journal is not one; its text says where.
        UndoFailedError: with what could not be undone; calling again tries that.

    >>> try:
    ...     vmitap.repair("demo")
    ... except vmitap.NotSupportedError as error:
    ...     error.driver
    'emu'
    """

@final
class Repaired:
    """What `repair` has undone.

    >>> def all_quiet(repaired: vmitap.Repaired | None) -> bool:
    ...     return repaired is None or not (repaired.views or repaired.frames)
    """

    @property
    def vcpus(self) -> int:
        """How many vCPUs were held for an event, as far as the driver can tell."""
    @property
    def views(self) -> int:
        """Views."""
    @property
    def frames(self) -> int:
        """Frames of shadow pages."""
    @property
    def pauses(self) -> int:
        """Times the guest was paused."""

def xen_host() -> XenHost:
    """Asks the Xen that this machine runs under what it is and which domains it has. Changes nothing.

    Xen's own libraries are opened the first time they are needed; VMITAP_LIBXENCTRL names another libxenctrl.

    Raises:
        AttachError: this is no Xen control domain, a library is missing or of another release, or a policy forbids it; `hint`
            says what to do.

    >>> try:
    ...     tappable = [domain.target for domain in vmitap.xen_host().domains if domain.obstacle is None]
    ... except vmitap.AttachError as error:
    ...     assert error.hint
    """

@final
class XenHost:
    """A Xen machine, as `xen_host` found it.

    >>> def names(host: vmitap.XenHost) -> list[str]:
    ...     return [domain.name for domain in host.domains]
    """

    @property
    def version(self) -> str:
        """Xen's version and that of its event ring, such as "xen 4.17.5 (vm_event 7)"."""
    @property
    def libraries(self) -> list[str]:
        """The files of Xen's libraries that are open, libxenctrl first."""
    @property
    def obstacle(self) -> str | None:
        """Why no domain of this machine can be tapped; None if nothing is known to be in the way."""
    @property
    def hint(self) -> str:
        """What to do about `obstacle`; empty without one."""
    @property
    def domains(self) -> list[XenDomain]:
        """Its domains, ascending by number; the control domain is the first."""

@final
class XenDomain:
    """A domain of a Xen machine.

    >>> def can_be_tapped(domain: vmitap.XenDomain) -> bool:
    ...     return domain.obstacle is None
    """

    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str:
        """Its name; empty while it has none."""
    @property
    def kind(self) -> str:
        """Its kind: "hvm" for HVM and PVH domains, "pv" for others."""
    @property
    def vcpus(self) -> int: ...
    @property
    def memory_size(self) -> int:
        """Bytes of memory it has now."""
    @property
    def obstacle(self) -> str | None:
        """Why it cannot be tapped; None if nothing is known to be in the way."""
    @property
    def hint(self) -> str:
        """What to do about `obstacle`; empty without one."""
    @property
    def target(self) -> str:
        """What `attach` takes for it."""

@final
class Vm:
    """A session with one guest: memory, registers, breakpoints and the event loop.

    Use it as a context manager: leaving `with` always restores the guest, also after an exception or Ctrl-C.
    `hit.vm` is the same session, seen from a hit: `root=None` and `vcpu=None` then mean the hit's, and once the handler has
    returned every use raises `StaleContextError`. Methods may be called from any thread; while `run` is under way in another
    thread they wait until its loop is between two events. `stop` never waits.

    >>> with vmitap.attach("demo") as guest:
    ...     guest.driver
    'emu'
    """

    @property
    def info(self) -> VmInfo:
        """Facts about the guest that do not change.

        >>> vm.info.driver, vm.info.memory_size % 4096
        ('emu', 0)
        """
    @property
    def driver(self) -> str:
        """The driver's name: "emu", "xen" or "dump".

        >>> vm.driver
        'emu'
        """
    @property
    def caps(self) -> Caps:
        """What the driver can do with this guest, found by probing.

        >>> vm.caps.views
        True
        """
    @property
    def vcpus(self) -> int:
        """How many vCPUs the guest has; they are numbered from 0.

        A dump without any trace of them has none.

        >>> [vm.registers(n).cpl for n in range(vm.vcpus)][0]
        0
        """
    @property
    def stats(self) -> Stats:
        """Counters of the whole session so far, as a snapshot.

        >>> vm.stats.hits
        0
        """
    @property
    def breakpoints(self) -> Breakpoints:
        """Every breakpoint and watch of the session that is not removed.

        >>> _ = vm.breakpoint("open_file")
        >>> len(vm.breakpoints)
        1
        """
    @property
    def views(self) -> Views:
        """The guest's views: alternative maps of its physical memory.

        >>> vm.views.tap != vm.views.default
        True
        """
    @property
    def recording(self) -> Recording:
        """What was captured, in columns.

        >>> bp = vm.breakpoint("open_file", capture={"path": Cstr(Arg(0), max=64)})
        >>> _ = vm.run(timeout=5, max_hits=2)
        >>> len(vm.recording)
        2
        """
    def record_to(
        self,
        path: str | PathLike[str],
        *,
        format: Literal["parquet", "jsonl"] | None = None,
        batch: int = 65_536,
    ) -> RecordingFile:
        """Writes what is captured to a file while the guest runs, in bounded memory.

        It is a context manager that ends the file. Batches are written by a thread of their own. Rows that are in memory go first, then rows go to the file and no longer to
        memory. A writer that is more than four batches behind holds the guest up for a second at most (30 for a file on a disk); then rows are lost, and counted
        in `Recording.lost`. JSON lines are also written every 0.1 s, for who reads along.

        Args:
            path: the file; "-" is this process' standard output.
            format: None: by the ending of `path`, .parquet or .jsonl.
            batch: rows a batch, 1 to 1048576. The file can be read up to the last whole batch, whatever happens.

        Raises:
            RecordingError: it cannot be written. Once open, `run` raises it, or `close`: a full disk, a closed pipe.
            InvalidArgumentError: another file is being written, or no such format.

        >>> import tempfile, os
        >>> bp = vm.breakpoint("open_file", capture={"path": Cstr(Arg(0), max=64)})
        >>> path = os.path.join(tempfile.mkdtemp(), "opened.jsonl")
        >>> with vm.record_to(path) as file:
        ...     _ = vm.run(timeout=5, max_hits=2)
        >>> file.rows, os.path.getsize(path) > 0
        (2, True)
        """
    @property
    def journal(self) -> EventJournal:
        """The last events of the session, in a file that outlives this process. None is written until `EventJournal.open`.

        >>> vm.journal.path is None
        True
        """
    @property
    def memory(self) -> Memory:
        """Guest-physical memory as a whole, and scattered reads.

        >>> vm.memory.size == vm.info.memory_size
        True
        """
    @property
    def symbols(self) -> Symbols:
        """The symbols of the guest's image.

        >>> "open_file" in vm.symbols
        True
        """
    @property
    def console(self) -> str:
        """What the guest has written to its debug console so far; bytes that are not UTF-8 are replaced.

        The first MiB is kept; what comes after is dropped, and said once in the log.

        Raises:
            NotSupportedError: the driver offers no console.

        >>> isinstance(vm.console, str)
        True
        """
    @property
    def closed(self) -> bool:
        """Whether the session is over; every method but `detach` and `stop` then raises `StaleContextError`.

        >>> vm.detach(); vm.closed
        True
        """
    def __enter__(self) -> Vm:
        """Returns the session itself.

        >>> with vm as same: same is vm
        True
        """
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        """Detaches, as `detach` does; an exception on its way goes on.

        >>> vm.__exit__(None, None, None); vm.closed
        True
        """
    def breakpoint(
        self,
        target: str | int,
        handler: _Handler | None = None,
        *,
        root: int | None = None,
        view: View | None = None,
        where: Filter | None = None,
        capture: Mapping[str, Capturable] | None = None,
        on_return: Mapping[str, Capturable] | None = None,
        abi: Literal["sysv", "ms"] | None = None,
        on_write: OnWrite | WritePolicy | Filter | None = None,
        ask: _WriteHandler | None = None,
        key: Hashable | None = None,
        tag: object = None,
        deadline: float | None = None,
        budget: Budget | None = None,
        enabled: bool = True,
        once: bool = False,
    ) -> Breakpoint:
        """Puts a hidden breakpoint into the guest; without a handler it is also a decorator that sets one.

        An INT3 is planted in a copy of the page that only execution can reach: the guest's own reads, by whatever instruction
        and from any vCPU, see the original bytes. Takes effect at once, also when called inside a handler.

        If the address is not mapped, the breakpoint is pending until the guest maps it. It follows the guest's page tables from then
        on: to another frame, and back to pending when the page goes.

        Args:
            target: a symbol, "symbol+offset", or a virtual address.
            handler: called with each `Hit` while its vCPU stands still; what it returns is carried out (None: go on).
                None: hits are counted, and `events` yields them. Several breakpoints at one address: each handler is called,
                in the order of insertion, and the first verdict that is not None decides.
            root: only hits under these page tables count; None: hits under every root (the address is looked up under the
                root in use).
            view: where it is planted; None: the session's tap view.
            where: only hits for which it holds count; the others are counted in `BreakpointStats.filtered` and `RunResult.filtered`,
                and are stepped over without entering Python. See `vmitap.Filter`.
            capture: what is read at each hit that counts, in Rust while the vCPU is held: a row of `vm.recording`. Without a handler
                Python is not entered. Names become columns; the same name in several breakpoints is one column, of one type.
            on_return: what is read when the function that was entered returns; it completes the row, with `duration_ns`. Calls are
                told apart by their stack pointer. Of more than 4096 that have not returned the oldest is given up, counted
                (`Stats.returns_lost`), and recorded with missing values, as are those that are open when the breakpoint goes.
            abi: how the function gets its arguments, for `Arg`, `Hit.args` and `Hit.arg`; None: as the session was opened with.
            on_write: what a write to its byte does; None: as the session was opened with. A filter: writes for which it holds happen, others
                are thrown away; `OnWrite.REMOVE & filter` and `OnWrite.ASK | filter` say more (see `OnWrite`).
            ask: called with a hit of a write (`hit.access` is W) to its byte, returns the `OnWrite` to apply; goes with `OnWrite.ASK` only.
            key: owner of the breakpoint; None: one of its own. The same address, root and key twice is an error.
            tag: anything; comes back in each `Hit` and finds the breakpoint again.
            deadline: seconds the handler may take before `run` raises `DeadlineExceededError`; None: no limit.
            budget: how many events it may cause in a second before it is disabled; None: any number.
            enabled: False plants nothing until `enable()`.
            once: the first hit is the last: the breakpoint is removed before the vCPU goes on, and no other hit of it is told.

        Raises:
            SymbolNotFoundError: no such symbol; `nearest` has suggestions.
            TranslationError: the address can be none (it is not canonical), or its page-table entry makes no sense.
            BreakpointConflictError: that key is taken at that address.
            DefaultViewError, ViewNotFoundError: nothing can be hidden in `view`.
            InvalidArgumentError: a column of `capture` that is there already with another type.
            NotSupportedError: it is a dump.

        >>> @vm.breakpoint("open_file")
        ... def opened(hit):
        ...     return vmitap.Verdict.pause()
        >>> vm.run(timeout=5).reason
        'paused'
        """
    def insert_many(
        self,
        targets: Iterable[str | int],
        handler: _Handler | None = None,
        *,
        root: int | None = None,
        view: View | None = None,
        where: Filter | None = None,
        capture: Mapping[str, Capturable] | None = None,
        on_return: Mapping[str, Capturable] | None = None,
        abi: Literal["sysv", "ms"] | None = None,
        on_write: OnWrite | WritePolicy | Filter | None = None,
        key: Hashable | None = None,
        tag: object = None,
        deadline: float | None = None,
        budget: Budget | None = None,
        once: bool = False,
    ) -> list[Breakpoint]:
        """Puts many breakpoints into the guest at once: all of them, or on an error none.

        Costs driver calls by pages and not by breakpoints. Arguments and errors are those of `breakpoint`, for each target.

        >>> [each.state for each in vm.insert_many(["open_file", "check_licence"])]
        ['active', 'active']
        """
    def watch(
        self,
        address: str | int,
        length: int,
        access: Access,
        handler: _Handler | None = None,
        *,
        root: int | None = None,
        where: Filter | None = None,
        capture: Mapping[str, Capturable] | None = None,
        abi: Literal["sysv", "ms"] | None = None,
        key: Hashable | None = None,
        tag: object = None,
        deadline: float | None = None,
        budget: Budget | None = None,
    ) -> Breakpoint:
        """Reports accesses to a range of virtual addresses; without a handler it is also a decorator that sets one.

        The pages' access rights are reduced in the tap view; no byte changes. The handler runs before the access takes
        effect. Accesses to the rest of those pages are answered in Rust. An access counts by the first of its bytes, and where it
        crosses into another page also by the first of those there. Xen does not say how long a read is: of one that crosses only the
        first page counts that a tap is on.

        Args:
            address: first byte of the range; a symbol or a virtual address.
            length: bytes in the range, 1 or more.
            access: which accesses to report: any of R, W and X together.
            handler, root, where, capture, abi, key, tag, deadline, budget: as for `breakpoint`.

        Raises:
            InvalidArgumentError: `length` or `access` is empty.
            TranslationError, SymbolNotFoundError, BreakpointConflictError, NotSupportedError: as for `breakpoint`.

        >>> vm.watch("open_file", 4, vmitap.Access.R).access
        <Access.R: 1>
        """
    def monitor_events(
        self,
        handler: _Handler | None = None,
        *,
        cr: Literal["cr0", "cr3", "cr4"] | Iterable[Literal["cr0", "cr3", "cr4"]] | None = None,
        msr: int | Iterable[int] | None = None,
        debug: bool = False,
        cpuid: bool = False,
        descriptors: bool = False,
        ports: bool = False,
        requests: bool = False,
        where: Filter | None = None,
        capture: Mapping[str, Capturable] | None = None,
        abi: Literal["sysv", "ms"] | None = None,
        key: Hashable | None = None,
        tag: object = None,
        deadline: float | None = None,
        budget: Budget | None = None,
    ) -> Breakpoint:
        """Reports what vCPUs announce, wherever they are; without a handler it is also a decorator that sets one.

        The handler runs before the register is written or CPUID is executed, and `hit.event` says which and with what. It lets that
        happen, leaves a write out (`Verdict.deny`), or has the vCPU go on elsewhere (`Verdict.set_registers` with another `rip`, which
        is how one answers CPUID: `hit.event.insn_len` says where the next instruction is). What is written cannot be changed. No page of
        the guest changes. On a processor each is an exit of its own to the hypervisor, and some are frequent: every
        switch from one process to another writes CR3. See the Intel SDM, vol. 3, 27.1.3 (instructions that cause exits).

        Args:
            cr: control registers whose writes are reported.
            msr: numbers of model-specific registers whose writes are reported, 8 at most; further ones in another monitor.
            debug: report debug exceptions (#DB) of the guest's own, by its trap flag or its debug registers; one that is denied it does not
                get. On the embedded driver those of the trap flag.
            cpuid: report CPUID.
            descriptors: report loads and stores of GDTR, IDTR, LDTR and TR; on Xen only.
            ports: report reads and writes of I/O ports; on Xen from 4.18 on, where its emulator carries them out.
            requests: report what the guest itself asks for (`HVMOP_guest_request_vm_event`), which is done when it goes on; on Xen only.
            handler, where, capture, abi, key, tag, deadline, budget: as for `breakpoint`. Two monitors can have one key.

        Returns:
            A `Breakpoint` without an address: `length` is 0 and `access` is empty.

        Raises:
            InvalidArgumentError: nothing is to be reported, no such register, or too many MSRs.
            NotSupportedError: the driver does not announce that, or it is a dump.

        >>> roots = set()
        >>> @vm.monitor_events(cr="cr3")
        ... def switched(hit):
        ...     roots.add(hit.event.new)
        >>> _ = vm.run(timeout=5, max_hits=10)
        >>> len(roots) > 1
        True
        """
    def run(self, timeout: float | None = None, max_hits: int | None = None) -> RunResult:
        """Lets the guest run and calls handlers, until something ends it.

        Ctrl-C is noticed within 0.1 s. Whatever is raised out of here, every event has been answered before.

        Args:
            timeout: seconds; None: no limit.
            max_hits: return after that many hits of this call; None: no limit.

        Returns:
            Why it ended and what happened during this call.

        Raises:
            HandlerError: a handler raised; its hit is attached. What is no `Exception` (KeyboardInterrupt) is raised as it is.
            DeadlineExceededError: a handler took longer than its deadline.
            DomainGoneError: the guest ended in a fault it could not handle.
            SessionBusyError: called inside a handler, or while another thread is in it.
            NotSupportedError: it is a dump.

        >>> _ = vm.breakpoint("open_file")
        >>> vm.run(timeout=5, max_hits=3).hits
        3
        """
    def _moments(self, timeout: float | None = None, max_hits: int | None = None) -> _Moments: ...
    def fileno(self) -> int | None:
        """A file descriptor that is readable when the guest has an event to be looked at; None: it runs only inside `run` and the like.

        For event loops: `vmitap.aio` waits for it, without a thread. It belongs to the session. A Xen domain has one (its event channel);
        a guest on the embedded driver has none.

        >>> vm.fileno() is None
        True
        """
    def events(self, *breakpoints: Breakpoint, timeout: float | None = None, queue: int = 10_000) -> Events:
        """Iterates over hits; the vCPU is not held while your code works on one.

        The guest runs inside `next()`. Handlers are called as well. Hits that arrive while `queue` are waiting are lost, and
        counted in `Events.lost` and `RunResult.lost`.

        Args:
            breakpoints: whose hits; none given: those of every breakpoint and watch.
            timeout: seconds until the iteration ends; None: until the guest is idle or `stop()` is called.
            queue: how many hits can wait.

        Raises:
            As `run`, out of `next()`; of a dump at once.

        >>> bp = vm.breakpoint("open_file")
        >>> for hit in vm.events(bp, timeout=5):
        ...     print(hit.symbol)
        ...     break
        open_file
        """
    def pause(self) -> AbstractContextManager[None]:
        """Holds every vCPU inside a `with` block. Counted: blocks can be nested, the outermost lets the guest go on.

        Raises:
            NotSupportedError: it is a dump, which stands still anyway.

        >>> with vm.pause():
        ...     vm.run(timeout=1).reason
        'idle'
        """
    def stop(self) -> None:
        """Makes the `run` or `events` under way return soon with reason "stopped"; without one, the next. Usable from any thread.

        >>> vm.stop()
        >>> vm.run(timeout=60).reason
        'stopped'
        """
    def detach(self) -> None:
        """Restores the guest and ends the session: breakpoints, watches and views go, vCPUs return to the default view.

        Inside a handler it takes effect once the handler has returned. Everything is tried, whatever fails; calling it again tries what
        is left, and does nothing once nothing is.

        Raises:
            UndoFailedError: something could not be restored; it says what. The session is over all the same.

        >>> _ = vm.breakpoint("open_file")
        >>> vm.detach()
        """
    def registers(self, vcpu: int | None = None) -> Registers:
        """A snapshot of a vCPU's registers.

        Of a dump it is what the file has; what the format does not keep is 0 (docs/dumps.md).

        Args:
            vcpu: its number; None: the hit's through `hit.vm`, else 0.

        Raises:
            VcpuNotFoundError: there is no such vCPU.
            NotSupportedError: it is a dump without the control registers of its vCPUs.

        >>> vm.registers(0).rip != 0
        True
        """
    def set_registers(self, vcpu: int | None = None, /, **registers: Unpack[RegisterValues]) -> None:
        """Writes registers of a vCPU; those not named keep their value.

        In a handler, the vCPU of the hit goes on with them. Changing `rip` there leaves the tapped instruction unexecuted.

        Raises:
            InvalidArgumentError: no such register, or a value that does not fit into 64 bits; nothing is written.
            VcpuNotFoundError: there is no such vCPU.
            NotSupportedError: it is a dump.

        >>> vm.set_registers(0, rbx=7)
        >>> vm.registers(0).rbx
        7
        """
    def read(self, address: str | int, length: int, *, root: int | None = None) -> bytes:
        """Reads virtual memory, across any number of pages: all of it or nothing. Breakpoints never show in it.

        Raises:
            TranslationError: a page of the range is not mapped.
            OutOfRangeError: it is mapped beyond guest memory.
            NotInDumpError: the dump does not hold the page, or a page table on the way to it.
            NotSupportedError: it is a dump without the registers of its vCPUs, and no `root` is given.

        >>> len(vm.read("open_file", 16))
        16
        """
    def read_pa(self, pa: int, length: int) -> bytes:
        """Reads physical memory: all of it or nothing.

        Raises:
            OutOfRangeError: the range reaches beyond guest memory.
            NotInDumpError: the dump does not hold all of it.

        >>> vm.read_pa(vm.translate("open_file"), 4) == vm.read("open_file", 4)
        True
        """
    def read_u8(self, address: str | int, *, root: int | None = None) -> int:
        """Reads one byte of virtual memory; raises as `read`.

        >>> vm.read_u8("open_file") == vm.read("open_file", 1)[0]
        True
        """
    def read_u16(self, address: str | int, *, root: int | None = None) -> int:
        """Reads two bytes of virtual memory as a little-endian number; raises as `read`.

        >>> vm.read_u16("open_file") == int.from_bytes(vm.read("open_file", 2), "little")
        True
        """
    def read_u32(self, address: str | int, *, root: int | None = None) -> int:
        """Reads four bytes of virtual memory as a little-endian number; raises as `read`.

        >>> vm.read_u32("open_file") == int.from_bytes(vm.read("open_file", 4), "little")
        True
        """
    def read_u64(self, address: str | int, *, root: int | None = None) -> int:
        """Reads eight bytes of virtual memory as a little-endian number; raises as `read`.

        >>> vm.read_u64("open_file") == int.from_bytes(vm.read("open_file", 8), "little")
        True
        """
    def read_cstr(self, address: str | int, limit: int = 4096, *, root: int | None = None) -> str:
        r"""Reads a string that ends in a zero byte, as UTF-8; bytes that are not UTF-8 become backslash escapes.

        Args:
            address: where it begins; a symbol or a virtual address.
            limit: bytes to look at before giving up.
            root: page tables to use.

        Raises:
            StringTooLongError: no zero byte within `limit`.
            TranslationError: a page of the string is not mapped.
            OutOfRangeError, NotInDumpError, NotSupportedError: as for `read`.

        >>> vm.write(scratch, b"/etc/motd\0")
        >>> vm.read_cstr(scratch)
        '/etc/motd'
        """
    def read_utf16(self, address: str | int, limit: int = 4096, *, root: int | None = None) -> str:
        r"""Reads a little-endian UTF-16 string that ends in a zero unit; lone surrogates become U+FFFD.

        `limit` counts bytes; arguments and errors are those of `read_cstr`.

        >>> vm.write(scratch, "C:\\temp\0".encode("utf-16-le"))
        >>> print(vm.read_utf16(scratch))
        C:\temp
        """
    def write(self, address: str | int, data: Buffer, *, root: int | None = None) -> None:
        """Writes virtual memory: all of it, or on an error nothing. Code the guest has run from there is forgotten.

        The guest sees the change, unlike a breakpoint. Breakpoints on those bytes are planted again over the new ones.

        Raises:
            TranslationError, OutOfRangeError: as for `read`.
            NotSupportedError: it is a dump.

        >>> vm.write(scratch, b"hello")
        >>> vm.read(scratch, 5)
        b'hello'
        """
    def write_pa(self, pa: int, data: Buffer) -> None:
        """Writes physical memory: all of it, or on an error nothing. See `write`.

        Raises:
            OutOfRangeError: the range reaches beyond guest memory.
            NotSupportedError: it is a dump.

        >>> pa = vm.translate(scratch)
        >>> vm.write_pa(pa, b"hello")
        """
    def write_u8(self, address: str | int, value: int, *, root: int | None = None) -> None:
        """Writes one byte of virtual memory; see `write`.

        >>> vm.write_u8(scratch, 0xFF)
        """
    def write_u16(self, address: str | int, value: int, *, root: int | None = None) -> None:
        """Writes a little-endian 16-bit number to virtual memory; see `write`.

        >>> vm.write_u16(scratch, 0xFFFF)
        """
    def write_u32(self, address: str | int, value: int, *, root: int | None = None) -> None:
        """Writes a little-endian 32-bit number to virtual memory; see `write`.

        >>> vm.write_u32(scratch, 1 << 31)
        """
    def write_u64(self, address: str | int, value: int, *, root: int | None = None) -> None:
        """Writes a little-endian 64-bit number to virtual memory; see `write`.

        >>> vm.write_u64(scratch, 1 << 63)
        >>> vm.read_u64(scratch) == 1 << 63
        True
        """
    def translate(self, address: str | int, root: int | None = None) -> int:
        """The physical address of a virtual one, by the guest's own page tables (4 or 5 levels, 2 MiB and 1 GiB pages).

        Raises:
            TranslationError: it has none; the error says at which level the walk ended.
            NotInDumpError: the dump does not hold a page table on the way.
            NotSupportedError: it is a dump without the registers of its vCPUs, and no `root` is given.

        >>> vm.translate("open_file") & 0xFFF == vm.symbol("open_file") & 0xFFF
        True
        """
    def symbol(self, name: str) -> int:
        """The virtual address of a symbol, or of "symbol+offset".

        Raises:
            SymbolNotFoundError: no such symbol; `nearest` has suggestions.

        >>> vm.symbol("open_file+0x10") - vm.symbol("open_file")
        16
        """
    def symbolize(self, address: int) -> str | None:
        """The nearest symbol at or below an address, as "name" or "name+0x10"; None if the address lies in no symbol.

        >>> vm.symbolize(vm.symbol("open_file") + 1)
        'open_file+0x1'
        """
    def inject(
        self,
        vector: int,
        *,
        vcpu: int | None = None,
        kind: Literal["external", "exception", "software"] = "exception",
        error_code: int | None = None,
        cr2: int | None = None,
        insn_len: int = 0,
    ) -> None:
        """Delivers an interrupt or exception to a vCPU through the guest's IDT, before its next instruction.

        Args:
            vector: 0 to 255.
            vcpu: which vCPU; None: the hit's through `hit.vm`, else 0.
            kind: "external" an interrupt, "exception" one the processor raises, "software" INT3 or INT n
                (Intel SDM vol. 3, 24.8.3).
            error_code: for the exceptions that push one.
            cr2: the faulting address, for a page fault.
            insn_len: bytes the saved RIP lies behind the instruction, for "software".

        Raises:
            InvalidArgumentError: a vector out of range, or an error code where none belongs.
            VcpuNotFoundError: there is no such vCPU.
            NotSupportedError: it is a dump.

        >>> vm.inject(300)
        Traceback (most recent call last):
            ...
        vmitap.errors.InvalidArgumentError: vector: 300 is not between 0 and 255
        """
    def wait_event(self, timeout: float | None = None) -> VmiEvent | None:
        """Lets the guest run until its next event, for people who write their own loop instead of using `run`.

        The event's vCPU is held until `respond`; other vCPUs go on in the next `wait_event`. No handler is called: INT3 and access
        violations of this session's own breakpoints arrive here raw. Ctrl-C is noticed within 0.1 s.

        Args:
            timeout: seconds; None: until the guest is idle.

        Returns:
            The event, or None: the time is over, the guest is idle, or `stop()` was called.

        Raises:
            SessionBusyError: `run` is under way.
            NotSupportedError: it is a dump.

        >>> controller = vmitap.BreakpointController(vm)
        >>> pa, view = vm.translate("open_file"), vm.views.tap
        >>> controller.monitor(pa >> 12, view)
        >>> controller.insert_breakpoint(pa, view)
        >>> step = vmitap.VmiEventResponse.fast_single_step(vm.views.default)
        >>> while event := vm.wait_event(timeout=5):
        ...     is_int3 = event.reason == "breakpoint"
        ...     is_own = is_int3 and controller.is_breakpoint(event)
        ...     vm.respond(event, vmitap.VmiEventResponse.reinject() if is_own else step)
        ...     if is_int3 and event.pa == pa:
        ...         break
        >>> controller.check_event(event) == (view, pa >> 12)
        True
        """
    def respond(self, event: VmiEvent, response: VmiEventResponse) -> None:
        """Answers an event of `wait_event`; its vCPU goes on. Exactly once an event.

        Events that are still unanswered when the session ends, or when `run` begins, are answered with "go on" in the default view.

        Raises:
            NoPendingEventError: the event was answered before, or is of another session.

        >>> controller = vmitap.BreakpointController(vm)
        >>> controller.monitor(vm.translate("open_file") >> 12, vm.views.tap)
        >>> controller.insert_breakpoint(vm.translate("open_file"), vm.views.tap)
        >>> event = vm.wait_event(timeout=5)
        >>> vm.respond(event, vmitap.VmiEventResponse.fast_single_step(vm.views.default))
        >>> vm.respond(event, vmitap.VmiEventResponse.continue_())
        Traceback (most recent call last):
            ...
        vmitap.errors.NoPendingEventError: vCPU 0 has no event that waits for an answer
        """

@final
class Breakpoint:
    """One breakpoint or watch of a session. Equal only to itself.

    >>> bp = vm.breakpoint("open_file", tag="files")
    >>> bp.symbol, bp.tag, bp.state
    ('open_file', 'files', 'active')
    """

    @property
    def address(self) -> int:
        """The virtual address, the first one of a watch; 0 for a monitor, which has none.

        >>> vm.breakpoint("open_file").address == vm.symbol("open_file")
        True
        """
    @property
    def length(self) -> int:
        """Bytes in the range of a watch; 1 for a breakpoint, 0 for a monitor.

        >>> vm.breakpoint("open_file").length
        1
        """
    @property
    def access(self) -> Access:
        """The accesses a watch reports; X for a breakpoint, none for a monitor.

        >>> vm.breakpoint("open_file").access
        <Access.X: 4>
        """
    @property
    def symbol(self) -> str | None:
        """The address as "symbol" or "symbol+0x10", or None.

        >>> vm.breakpoint("open_file+0x1").symbol
        'open_file+0x1'
        """
    @property
    def root(self) -> int | None:
        """The page-table root it is bound to; None: hits under every root count.

        >>> vm.breakpoint("open_file").root is None
        True
        """
    @property
    def view(self) -> View:
        """The view it is planted in.

        >>> vm.breakpoint("open_file").view == vm.views.tap
        True
        """
    @property
    def key(self) -> Hashable:
        """Its owner, as given; None if none was given.

        >>> vm.breakpoint("open_file", key="files").key
        'files'
        """
    @property
    def tag(self) -> object:
        """Whatever was given as `tag`.

        >>> vm.breakpoint("open_file", tag=("any", "thing")).tag
        ('any', 'thing')
        """
    @property
    def where(self) -> Filter | None:
        """The filter, as it was given.

        >>> vm.breakpoint("open_file", where=vmitap.Filter.ring(3)).where
        Filter.ring(3)
        """
    @property
    def enabled(self) -> bool:
        """Whether it is to raise hits.

        >>> vm.breakpoint("open_file", enabled=False).enabled
        False
        """
    @property
    def state(self) -> Literal["active", "pending", "disabled", "removed"]:
        """One of "active": planted; "pending": its page is not mapped now; "disabled"; "removed": for ever.

        A pending breakpoint is planted when the guest maps its page, and an active one is pending again once it is unmapped:
        the guest's page tables are watched for that, and nobody has to ask for it.

        >>> bp = vm.breakpoint("open_file")
        >>> bp.remove(); bp.state
        'removed'
        >>> vm.breakpoint(0x7000_0000_0000).state
        'pending'
        """
    @property
    def stats(self) -> BreakpointStats:
        """Its counters so far, as a snapshot.

        >>> bp = vm.breakpoint("open_file")
        >>> _ = vm.run(timeout=5, max_hits=2)
        >>> bp.stats.hits
        2
        """
    def __call__(self, handler: _HandlerT, /) -> _HandlerT:
        """Sets the handler and returns that function unchanged: this is what makes `@vm.breakpoint(...)` work, also stacked.

        >>> @vm.breakpoint("open_file")
        ... @vm.breakpoint("check_licence")
        ... def called(hit):
        ...     pass
        """
    def enable(self) -> None:
        """Plants it again after `disable`; does nothing if it is enabled.

        Raises:
            StaleContextError: it was removed.
            TranslationError: its address can no longer be looked up, for another reason than that its page is not present; it
                stays disabled.

        >>> bp = vm.breakpoint("open_file", enabled=False)
        >>> bp.enable(); bp.state
        'active'
        """
    def disable(self) -> None:
        """Takes it out of the guest and keeps everything else of it; does nothing if it is disabled.

        Raises:
            StaleContextError: it was removed.

        >>> bp = vm.breakpoint("open_file")
        >>> bp.disable(); bp.state
        'disabled'
        """
    def remove(self) -> None:
        """Takes it out of the guest for good. Twice is fine; in its own handler too.

        >>> vm.breakpoint("open_file").remove()
        >>> len(vm.breakpoints)
        0
        """

@final
class Breakpoints:
    """The breakpoints and watches of a session, live: iterating gives those there are at that moment, in order of insertion.

    >>> bp = vm.breakpoint("open_file", tag="files")
    >>> bp in vm.breakpoints, len(vm.breakpoints)
    (True, 1)
    """

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Breakpoint]: ...
    def __contains__(self, key: object, /) -> bool: ...
    def at(self, address: str | int) -> list[Breakpoint]:
        """Those whose range holds the address.

        >>> bp = vm.breakpoint("open_file")
        >>> vm.breakpoints.at("open_file") == [bp]
        True
        """
    def on_page(self, address: str | int) -> list[Breakpoint]:
        """Those in the 4 KiB page of virtual memory that holds the address.

        >>> bp = vm.breakpoint("open_file")
        >>> vm.breakpoints.on_page(bp.address | 0xFFF) == [bp]
        True
        """
    def remove_many(self, breakpoints: Iterable[Breakpoint]) -> None:
        """Takes breakpoints and watches out for good: all of them or, on an error, none. Those that are removed already are fine.

        Costs driver calls by pages and not by breakpoints.

        Raises:
            InvalidArgumentError: one of them is of another session.
            UndoFailedError: something failed, and putting back what was taken out failed too; it says what is left behind.

        >>> _ = vm.insert_many(["open_file", "check_licence"])
        >>> vm.breakpoints.remove_many(vm.breakpoints.on_page("open_file"))
        >>> "open_file" in [each.symbol for each in vm.breakpoints]
        False
        """
    def by_key(self, key: Hashable) -> list[Breakpoint]:
        """Those of that owner.

        >>> bp = vm.breakpoint("open_file", key="files")
        >>> vm.breakpoints.by_key("files") == [bp]
        True
        """
    def by_tag(self, tag: object) -> list[Breakpoint]:
        """Those whose tag equals `tag`.

        >>> bp = vm.breakpoint("open_file", tag="open")
        >>> vm.breakpoints.by_tag("open") == [bp]
        True
        """

@final
class BreakpointStats:
    """Counters of one breakpoint, as a snapshot.

    >>> vm.breakpoint("open_file").stats.hits
    0
    """

    @property
    def hits(self) -> int:
        """How often it was hit."""
    @property
    def filtered(self) -> int:
        """Hits that its filter kept back; they are not among `hits`."""
    @property
    def filter_faults(self) -> int:
        """Hits at which its filter, and writes at which its `on_write`, looked at memory that could not be read."""
    @property
    def py_calls(self) -> int:
        """How often its handler, or a predicate of its filter, was called."""
    @property
    def hold_total(self) -> float:
        """Seconds vCPUs stood still for hits that were handed to Python, all together."""
    @property
    def hold_p50(self) -> float:
        """The time that half of its hits do not exceed; at most a quarter too long. Of hits that are only counted each sixteenth is timed."""
    @property
    def hold_p99(self) -> float:
        """The time that 99 of 100 do not exceed."""
    @property
    def hold_max(self) -> float:
        """The longest of these times."""
    @property
    def over_budget(self) -> bool:
        """Whether it was disabled because it exceeded its budget."""

@final
class Recording:
    """The rows that captures gave, in columns.

    Batches of it leave through the Arrow C data interface without being copied. Every row has `time_ns` (nanoseconds since the session began), `hold_ns` (how long the vCPU stood still for the event that completed the
    row), `vcpu`, `breakpoint` (a number, in order of insertion), `symbol`, `address` and `root`. The schema's metadata has the version of these
    columns (`vmitap.schema`) and when the session began (`vmitap.began_unix_ns`). Captured columns follow; a value that could not be read,
    or that the row's breakpoint does not capture, is missing.

    >>> vm.recording.columns
    ['time_ns', 'hold_ns', 'vcpu', 'breakpoint', 'symbol', 'address', 'root']
    """

    @property
    def columns(self) -> list[str]:
        """Names of the columns: those that every row has first."""
    @property
    def rows(self) -> int:
        """Rows captured so far, also those that went to a file, were cleared, or were lost."""
    @property
    def lost(self) -> int:
        """Rows that there was no room for, in memory or in the queue of a file whose disk or reader was too slow."""
    @property
    def limit(self) -> int:
        """Bytes of values that are kept in memory at most; what comes then is lost, and counted.

        >>> vm.recording.limit = 1 << 20
        """
    @limit.setter
    def limit(self, value: int) -> None: ...
    def __len__(self) -> int:
        """Rows in memory.

        >>> len(vm.recording)
        0
        """
    def clear(self) -> None:
        """Forgets the rows in memory.

        >>> vm.recording.clear()
        """
    def to_arrow(self) -> pyarrow.Table:
        """The rows in memory as a `pyarrow.Table`, without copying them.

        Raises:
            ImportError: pyarrow is not installed.

        >>> bp = vm.breakpoint("open_file", capture={"path": Cstr(Arg(0), max=64)})
        >>> _ = vm.run(timeout=5, max_hits=2)
        >>> vm.recording.to_arrow()["path"].to_pylist()
        ['/opt/app/app.conf', '/opt/app/data.db']
        """
    def to_polars(self) -> polars.DataFrame:
        """The rows in memory as a `polars.DataFrame`.

        Raises:
            ImportError: polars is not installed.

        >>> vm.recording.to_polars().height
        0
        """
    def to_pandas(self) -> pandas.DataFrame:
        """The rows in memory as a `pandas.DataFrame`.

        Raises:
            ImportError: pandas or pyarrow is not installed.

        >>> len(vm.recording.to_pandas())
        0
        """
    def write_parquet(self, path: str | PathLike[str]) -> None:
        """Writes the rows in memory to a Parquet file.

        Takes no other package.

        Raises:
            RecordingError: it cannot be written.

        >>> import tempfile, os
        >>> vm.recording.write_parquet(os.path.join(tempfile.mkdtemp(), "hits.parquet"))
        """
    def write_jsonl(self, path: str | PathLike[str]) -> None:
        """Writes the rows in memory to a file of JSON lines.

        An object for each row; bytes are hexadecimal.

        Raises:
            RecordingError: it cannot be written.

        >>> import tempfile, os
        >>> vm.recording.write_jsonl(os.path.join(tempfile.mkdtemp(), "hits.jsonl"))
        """
    def __arrow_c_stream__(self, requested_schema: object = None) -> CapsuleType:
        """The rows in memory as an Arrow C stream; the Arrow PyCapsule protocol. `requested_schema` is not looked at.

        >>> import pyarrow
        >>> pyarrow.RecordBatchReader.from_stream(vm.recording).read_all().num_rows
        0
        """
    def __arrow_c_schema__(self) -> CapsuleType:
        """The columns as an Arrow C schema; the Arrow PyCapsule protocol.

        >>> import pyarrow
        >>> pyarrow.schema(vm.recording).metadata[b"vmitap.schema"]
        b'1'
        """

@final
class RecordingFile:
    """A file that rows go to while the guest runs.

    Made by `Vm.record_to`. Leaving `with` ends it.

    >>> import tempfile, os
    >>> vm.record_to(os.path.join(tempfile.mkdtemp(), "hits.parquet")).close()
    """

    @property
    def path(self) -> str:
        """The file's name."""
    @property
    def rows(self) -> int:
        """Rows in the file so far: whole batches."""
    def close(self) -> None:
        """Writes what is left and ends the file. Twice is fine.

        Raises:
            RecordingError: writing failed, or nobody takes what is written.

        >>> import tempfile, os
        >>> file = vm.record_to(os.path.join(tempfile.mkdtemp(), "hits.parquet"))
        >>> file.close(); file.rows
        0
        """
    def __enter__(self) -> RecordingFile:
        """Returns the file itself.

        >>> import tempfile, os
        >>> with vm.record_to(os.path.join(tempfile.mkdtemp(), "hits.jsonl")) as file: file.rows
        0
        """
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        """Ends the file, as `close` does; an exception on its way goes on.

        >>> import tempfile, os
        >>> vm.record_to(os.path.join(tempfile.mkdtemp(), "hits.jsonl")).__exit__(None, None, None)
        """

@final
class EventJournal:
    """The last events of a session in a file, which is still there when this process is killed: what it was at, and what came before.

    Every event the driver raises is in it, those that filters keep back too, with what became of it. It is a ring of a size that is set
    once, mapped into this process: an event costs some 60 ns and no system call. Not to be taken for the journal that
    `vmitap.repair` reads, which tells what is to be undone in a guest and is always kept for a Xen domain.

    >>> import tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "last.events")
    >>> bp = vm.breakpoint("open_file")
    >>> with vm.journal.open(path, events=1000) as journal:
    ...     _ = vm.run(timeout=5, max_hits=3)
    >>> [event.symbol for event in vmitap.read_journal(path).events if event.outcome == "counted"]
    ['open_file', 'open_file', 'open_file']
    """

    def open(self, path: str | PathLike[str], *, events: int | None = None, replace: bool = False) -> EventJournal:
        """From now on the last events are in a file, which outlives this process. Returns the journal, a context manager that ends it.

        The file is made at its full size (64 bytes an event and 260 KiB), readable and writable for its owner only. Nobody may cut it
        off while it is written: that would kill this process, as for every mapped file. It is not forced to the disk, so a
        crash of the whole machine can take it.

        Args:
            path: the file.
            events: how many of the last events are kept, 1 to 4194304; None: 65536.
            replace: whether a file that is there is replaced; else that is an error, as it may be what is left of a crash.

        Raises:
            EventJournalError: the file is there or cannot be made.
            InvalidArgumentError: no such number of events, or another journal is open.

        >>> import tempfile, os
        >>> journal = vm.journal.open(os.path.join(tempfile.mkdtemp(), "last.events"), events=100)
        >>> _ = vm.breakpoint("open_file"), vm.run(timeout=5, max_hits=3)
        >>> len(journal) == min(journal.total, 100)
        True
        """
    def close(self) -> None:
        """Ends the file; it says then that nothing crashed. Twice is fine, and leaving the session does it too.

        >>> vm.journal.close()
        """
    @property
    def path(self) -> str | None:
        """The file; None if none is open."""
    @property
    def total(self) -> int:
        """Events so far, also those that others have taken the place of; 0 if no file is open."""
    def __len__(self) -> int:
        """Events in the file.

        >>> len(vm.journal)
        0
        """
    def __enter__(self) -> EventJournal:
        """Returns the journal itself.

        >>> import tempfile, os
        >>> with vm.journal.open(os.path.join(tempfile.mkdtemp(), "last.events")) as journal: journal.total
        0
        """
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        """Ends the file, as `close` does; an exception on its way goes on.

        >>> vm.journal.__exit__(None, None, None)
        """

def read_journal(path: str | PathLike[str]) -> JournalContents:
    """Reads a journal of events: of a session that lives, has ended, or was killed.

    Args:
        path: the file that was given to `EventJournal.open`.

    Raises:
        EventJournalError: it cannot be read, is none, is cut off, or has another version; `reason` says which.

    >>> import tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "last.events")
    >>> vm.journal.open(path).close()
    >>> vmitap.read_journal(path).closed
    True
    """

@final
class JournalContents:
    """What is in a journal of events.

    >>> import tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "last.events")
    >>> journal = vm.journal.open(path, events=2)
    >>> _ = vm.breakpoint("open_file"), vm.run(timeout=5, max_hits=3)
    >>> contents = vmitap.read_journal(path)
    >>> len(contents), contents.total >= 3, contents.closed, contents.torn
    (2, True, False, 0)
    """

    @property
    def target(self) -> str:
        """The guest's name."""
    @property
    def process(self) -> int:
        """The number of the process that wrote it."""
    @property
    def began(self) -> float:
        """When the session began, in seconds since 1970."""
    @property
    def room(self) -> int:
        """How many events it has room for."""
    @property
    def total(self) -> int:
        """How many events there were."""
    @property
    def closed(self) -> bool:
        """Whether the journal was ended in order. If not, its session lives or was killed."""
    @property
    def torn(self) -> int:
        """Events that were cut off while they were written, or make no sense: they are left out."""
    @property
    def events(self) -> list[JournalEvent]:
        """The last events, the oldest first."""
    def __len__(self) -> int:
        """How many events there are in it.

        >>> import tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "last.events")
        >>> vm.journal.open(path).close()
        >>> len(vmitap.read_journal(path))
        0
        """

@final
class JournalEvent:
    """One event of a journal.

    >>> import tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "last.events")
    >>> bp = vm.breakpoint("open_file")
    >>> with vm.journal.open(path): _ = vm.run(timeout=5, max_hits=1)
    >>> last = vmitap.read_journal(path).events[-1]
    >>> last.reason, last.symbol, last.outcome, last.rip == last.address == bp.address
    ('breakpoint', 'open_file', 'counted', True)
    """

    @property
    def number(self) -> int:
        """Its number, from 1."""
    @property
    def timestamp(self) -> float:
        """Seconds since the session began, as `Hit.timestamp`."""
    @property
    def vcpu(self) -> int:
        """Number of the vCPU."""
    @property
    def reason(
        self,
    ) -> Literal[
        "breakpoint",
        "memory-access",
        "single-step",
        "write-control-register",
        "write-msr",
        "cpuid",
        "descriptor-access",
        "port-io",
        "debug-exception",
        "guest-request",
    ]:
        """What happened, as `VmiEvent.reason`."""
    @property
    def access(self) -> Access | None:
        """Which access was denied; None for other events."""
    @property
    def address(self) -> int | None:
        """The virtual address that was executed or accessed, where it is known."""
    @property
    def value(self) -> int | None:
        """The new value of a control register, the number of an MSR or of a port, the leaf of CPUID; None for other events."""
    @property
    def rip(self) -> int:
        """The address of the instruction."""
    @property
    def root(self) -> int:
        """The page-table root the vCPU was under."""
    @property
    def outcome(self) -> Literal["held", "handling", "raw", "answered", "filtered", "counted", "handled", "failed"]:
        """What became of it.

        "held": nothing yet, the vCPU stood still; "handling": a handler was being called, and the vCPU stood still; "raw": it was handed out by
        `Vm.wait_event`. The others are answered: "filtered": no breakpoint's filter let it pass; "counted": counted, and captured where
        that was asked for; "handled": a handler was called; "answered": it was for no breakpoint, such as a read of a hidden page;
        "failed": something failed.
        """
    @property
    def breakpoint(self) -> int | None:
        """The number of the first breakpoint that wanted it, in order of insertion, as the column `breakpoint` of a recording."""
    @property
    def symbol(self) -> str | None:
        """The name of that breakpoint's place; of the first 4096 breakpoints only, and not of a whole long name."""

@final
class Hit:
    """One hit: a snapshot taken while the vCPU stood still. Safe to keep, to hand to another thread, and to pickle.

    As with what `zip` yields, one that nobody has kept may be the same object as the next: two hits are not told apart by `id`.

    >>> bp = vm.breakpoint("open_file", tag="files")
    >>> hit = next(vm.events(bp, timeout=5))
    >>> hit.symbol, hit.tag, hit.regs.rip == hit.address
    ('open_file', 'files', True)
    """

    @property
    def vcpu(self) -> int:
        """Number of the vCPU."""
    @property
    def regs(self) -> Registers:
        """Its registers; `rip` is the tapped instruction, which has not been executed."""
    @property
    def args(self) -> tuple[int, int, int, int, int, int]:
        """The first six integer arguments, by the breakpoint's calling convention. Right at the entry of a function only.

        `abi` of the breakpoint or of the session says which. "sysv": RDI, RSI, RDX, RCX, R8, R9 (System V AMD64 ABI 3.2.3). "ms": RCX, RDX, R8, R9,
        and two on the stack above the return address and 32 bytes of home space (Microsoft x64), which are read while the vCPU stands still.

        Raises:
            TranslationError: the convention has some of them on the stack, and it cannot be read.

        >>> hit = next(vm.events(vm.breakpoint("open_file"), timeout=5))
        >>> hit.args[0] == hit.regs.rdi
        True
        """
    def arg(self, n: int) -> int:
        """Argument `n`, from 0, by the breakpoint's calling convention; from the seventh on valid only inside the handler.

        Args:
            n: 0 to 63. The first six are those of `args`; the others are read from the stack when this is called.

        Raises:
            StaleContextError: it is on the stack, and the vCPU has gone on.
            TranslationError: the stack cannot be read.
            OutOfRangeError: the stack lies beyond the guest's memory.
            InvalidArgumentError: no such number.

        >>> @vm.breakpoint("open_file")
        ... def opened(hit):
        ...     assert hit.arg(0) == hit.args[0]
        ...     assert hit.arg(7) == hit.vm.read_u64(hit.regs.rsp + 16)
        >>> vm.run(timeout=5, max_hits=1).hits
        1
        """
    @property
    def address(self) -> int:
        """The virtual address: of the breakpoint; of the first byte accessed, for a watch and for a write to a hidden page; of the instruction, for a monitor."""
    @property
    def pa(self) -> int:
        """The physical address of the same; 0 for a monitor."""
    @property
    def symbol(self) -> str | None:
        """`address` as "symbol" or "symbol+0x10", or None."""
    @property
    def access(self) -> Access:
        """X for a breakpoint; which access it was, for a watch and for a write to a hidden page; empty for a monitor."""
    @property
    def event(self) -> VmiEvent:
        """The event as the driver raised it: for a monitor, which register was about to be written and with what.

        It is not one for `Vm.respond`: what the handler returns is the answer.

        Raises:
            StaleContextError: the hit was unpickled.

        >>> hit = next(vm.events(vm.monitor_events(cr="cr3"), timeout=5))
        >>> hit.event.reason, hit.event.register, hit.event.old == hit.regs.cr3
        ('write-control-register', 'cr3', True)
        """
    @property
    def view(self) -> View:
        """The view the vCPU was in."""
    @property
    def root(self) -> int:
        """The page-table root the vCPU was under."""
    @property
    def ring(self) -> int:
        """The privilege level it ran at: 0 to 3."""
    @property
    def key(self) -> Hashable:
        """The breakpoint's key. When pickled, it must be picklable."""
    @property
    def tag(self) -> object:
        """The breakpoint's tag. When pickled, it must be picklable."""
    @property
    def step(self) -> int:
        """0 for the hit itself; 1 and up for the instructions after it that `Verdict.step` asked for."""
    @property
    def timestamp(self) -> float:
        """Seconds since the session began, on a clock that never goes back."""
    @property
    def hold(self) -> float:
        """Seconds the vCPU had stood still when this snapshot was made."""
    @property
    def breakpoint(self) -> Breakpoint:
        """The breakpoint that was hit.

        Raises:
            StaleContextError: the hit was unpickled: it no longer belongs to a session.

        >>> bp = vm.breakpoint("open_file")
        >>> next(vm.events(bp, timeout=5)).breakpoint is bp
        True
        """
    @property
    def vm(self) -> Vm:
        """The live guest as this vCPU sees it; valid only inside the handler.

        Raises:
            StaleContextError: the handler has returned, or there was none.

        >>> @vm.breakpoint("open_file")
        ... def opened(hit):
        ...     assert hit.vm.read_u8(hit.address) == hit.vm.read_u8("open_file")
        >>> _ = vm.run(timeout=5, max_hits=1)
        """

@final
class Registers:
    """The registers of one vCPU, as a snapshot.

    >>> regs = vm.registers(0)
    >>> regs.root == regs.cr3 & 0x000F_FFFF_FFFF_F000
    True
    """

    @property
    def rax(self) -> int: ...
    @property
    def rbx(self) -> int: ...
    @property
    def rcx(self) -> int: ...
    @property
    def rdx(self) -> int: ...
    @property
    def rsi(self) -> int: ...
    @property
    def rdi(self) -> int: ...
    @property
    def rsp(self) -> int: ...
    @property
    def rbp(self) -> int: ...
    @property
    def r8(self) -> int: ...
    @property
    def r9(self) -> int: ...
    @property
    def r10(self) -> int: ...
    @property
    def r11(self) -> int: ...
    @property
    def r12(self) -> int: ...
    @property
    def r13(self) -> int: ...
    @property
    def r14(self) -> int: ...
    @property
    def r15(self) -> int: ...
    @property
    def rip(self) -> int: ...
    @property
    def rflags(self) -> int: ...
    @property
    def cr0(self) -> int: ...
    @property
    def cr2(self) -> int: ...
    @property
    def cr3(self) -> int: ...
    @property
    def cr4(self) -> int: ...
    @property
    def efer(self) -> int: ...
    @property
    def cs(self) -> int:
        """The selector, as are `ss`, `ds`, `es`, `fs`, `gs` and `tr`."""
    @property
    def ss(self) -> int: ...
    @property
    def ds(self) -> int: ...
    @property
    def es(self) -> int: ...
    @property
    def fs(self) -> int: ...
    @property
    def gs(self) -> int: ...
    @property
    def tr(self) -> int: ...
    @property
    def fs_base(self) -> int: ...
    @property
    def gs_base(self) -> int: ...
    @property
    def kernel_gs_base(self) -> int:
        """What SWAPGS exchanges with `gs_base`."""
    @property
    def tr_base(self) -> int: ...
    @property
    def gdtr_base(self) -> int: ...
    @property
    def gdtr_limit(self) -> int: ...
    @property
    def idtr_base(self) -> int: ...
    @property
    def idtr_limit(self) -> int: ...
    @property
    def star(self) -> int: ...
    @property
    def lstar(self) -> int: ...
    @property
    def sfmask(self) -> int: ...
    @property
    def root(self) -> int:
        """The page-table root: CR3 without PCID and flag bits."""
    @property
    def cpl(self) -> int:
        """The privilege level, 0 to 3 (Intel SDM vol. 3, 5.5)."""
    def to_dict(self) -> dict[str, int]:
        """Every register by name, in the order above; without the derived `root` and `cpl`.

        >>> vm.registers(0).to_dict()["rip"] == vm.registers(0).rip
        True
        """

@final
class Verdict:
    """What a handler wants done with the vCPU; returning None is the same as `continue_()`.

    >>> @vm.breakpoint("check_licence")
    ... def crack(hit):
    ...     return vmitap.Verdict.return_from_function(1)
    """

    @staticmethod
    def continue_() -> Verdict:
        """Executes the tapped instruction and goes on.

        >>> vmitap.Verdict.continue_()
        Verdict.continue_()
        """
    @staticmethod
    def return_from_function(value: int) -> Verdict:
        """Leaves the function at once with `value` in RAX: pops the return address. Right at the entry of a function only.

        Raises (out of `run`):
            HandlerError: the stack cannot be read or the return address is not canonical; the vCPU goes on as with `continue_`.

        >>> vmitap.Verdict.return_from_function(1)
        Verdict.return_from_function(1)
        """
    @staticmethod
    def set_registers(**registers: Unpack[RegisterValues]) -> Verdict:
        """Goes on with these registers; those not named keep their value. With another `rip`, the tapped instruction is not executed.

        Raises:
            InvalidArgumentError: no such register, or a value that does not fit into 64 bits.

        >>> vmitap.Verdict.set_registers(rdi=0)
        Verdict.set_registers(rdi=0x0)
        """
    @staticmethod
    def step(count: int) -> Verdict:
        """Goes on instruction by instruction: the handler is called again after each of the next `count`, with `Hit.step` from 1 on.

        A verdict it returns then takes the place of what is left. Breakpoints met on the way are hit as always. One with `once=True` is gone
        after its hit, and steps no further: `where=Filter.once()` does. An INT3 of the guest's own ends it, and is delivered to the guest.

        Raises:
            InvalidArgumentError: `count` is less than 1.

        >>> vmitap.Verdict.step(3)
        Verdict.step(3)
        """
    @staticmethod
    def deny() -> Verdict:
        """The register write of a `Vm.monitor_events` has no effect, and counts as executed; a debug exception is kept from the guest.

        For any other hit, CPUID included, it is an error and the vCPU goes on as with `continue_`.

        >>> cr4_smep = 1 << 20
        >>> @vm.monitor_events(cr="cr4")
        ... def pinned(hit):
        ...     if hit.event.old & ~hit.event.new & cr4_smep:
        ...         return vmitap.Verdict.deny()
        """
    @staticmethod
    def pause() -> Verdict:
        """Makes `run` return with reason "paused", the vCPU standing at the breakpoint; the next `run` goes on from there.

        >>> vmitap.Verdict.pause()
        Verdict.pause()
        """
    @staticmethod
    def detach() -> Verdict:
        """Goes on and ends the session, as `Vm.detach` does; `run` returns with reason "detached".

        >>> vmitap.Verdict.detach()
        Verdict.detach()
        """

@final
class _Moments:
    def go(self, said: Callable[[], object] | None = None) -> tuple[RunResult | None, bool]: ...
    def awaits(self) -> Awaitable[object] | None: ...
    def abandon(self) -> None: ...

@final
class RunResult:
    """Why `run` came back, and what happened in it.

    >>> _ = vm.breakpoint("open_file")
    >>> result = vm.run(timeout=5, max_hits=10)
    >>> result.reason, result.hits, result.lost
    ('max_hits', 10, 0)
    """

    @property
    def reason(self) -> Literal["timeout", "max_hits", "stopped", "paused", "detached", "idle"]:
        """What ended it.

        "timeout"; "max_hits"; "stopped" by `stop()`; "paused" or "detached" by a verdict; "idle": every vCPU has halted for good,
        or is held, or the guest has shut down.
        """
    @property
    def shutdown(self) -> Literal["poweroff", "reboot", "suspend", "crash", "watchdog", "soft-reset", "other"] | None:
        """How the guest has shut down, where `reason` is "idle" for that and the driver is told (Xen, within half a second); else None.

        Xen says "poweroff" also where every vCPU has halted for good. "suspend" is what stops a guest that is saved or migrated. Who
        manages the guest may destroy it next, and start another in its place: what is asked of the session then is a `DomainGoneError`
        that names the same.
        """
    @property
    def hits(self) -> int:
        """Hits of breakpoints and watches; an event that several own counts once for each."""
    @property
    def filtered(self) -> int:
        """Hits that filters kept back, and events nobody wanted: under another root, or in the rest of a watched page."""
    @property
    def py_calls(self) -> int:
        """Calls of handlers."""
    @property
    def lost(self) -> int:
        """Hits that `events` had no room for."""
    @property
    def elapsed(self) -> float:
        """Seconds from beginning to end."""
    @property
    def hold_total(self) -> float:
        """Seconds vCPUs stood still for hits, all together."""
    @property
    def hold_mean(self) -> float:
        """Seconds a vCPU stood still for one hit, on average; 0 without hits."""
    @property
    def hold_p50(self) -> float:
        """The time that half of them do not exceed; at most a quarter too long, like the next. 0 without such hits."""
    @property
    def hold_p99(self) -> float:
        """The time that 99 of 100 do not exceed."""
    @property
    def hold_max(self) -> float:
        """The longest of these times."""
    @property
    def disabled_by_budget(self) -> int:
        """Breakpoints that exceeded their budget and were disabled."""
    @property
    def hits_per_second(self) -> float:
        """`hits / elapsed`."""

@final
class Stats:
    """Counters of a session, as a snapshot.

    >>> _ = vm.breakpoint("open_file")
    >>> vm.stats.shadow_frames
    1
    """

    @property
    def events(self) -> int:
        """Events of any kind, hits that needed none among them; each was answered exactly once."""
    @property
    def hits(self) -> int:
        """As `RunResult.hits`."""
    @property
    def filtered(self) -> int:
        """As `RunResult.filtered`."""
    @property
    def py_calls(self) -> int:
        """As `RunResult.py_calls`."""
    @property
    def lost(self) -> int:
        """As `RunResult.lost`."""
    @property
    def rows(self) -> int:
        """Rows that were captured."""
    @property
    def rows_lost(self) -> int:
        """As `Recording.lost`."""
    @property
    def returns_lost(self) -> int:
        """Calls whose return values were given up, of `on_return`."""
    @property
    def reinjected(self) -> int:
        """INT3 of the guest's own that were delivered to it."""
    @property
    def hidden_reads(self) -> int:
        """Reads of hidden pages that were served with the original bytes."""
    @property
    def hidden_writes(self) -> int:
        """Writes to hidden pages, under whichever policy."""
    @property
    def removed_by_write(self) -> int:
        """Breakpoints that `OnWrite.REMOVE` took out."""
    @property
    def table_writes(self) -> int:
        """Stores of the guest to page tables that breakpoints are found through; each costs an event."""
    @property
    def page_ins(self) -> int:
        """Addresses of breakpoints that the guest mapped, or mapped elsewhere."""
    @property
    def page_outs(self) -> int:
        """Addresses of breakpoints that the guest unmapped, or mapped elsewhere."""
    @property
    def roots_given_up(self) -> int:
        """Page-table roots that made room for others: breakpoints are looked up under them again once the guest loads them again."""
    @property
    def shadow_frames(self) -> int:
        """Frames that hold shadow pages now."""

@final
class Events:
    """The iterator of `Vm.events`.

    >>> bp = vm.breakpoint("open_file")
    >>> events = vm.events(bp, timeout=5)
    >>> next(events).address == bp.address
    True
    >>> events.close()
    """

    def __iter__(self) -> Events: ...
    def __next__(self) -> Hit: ...
    @property
    def lost(self) -> int:
        """Hits that there was no room for so far."""
    @property
    def result(self) -> RunResult | None:
        """What `run` would have returned; None until the iteration has ended.

        >>> events = vm.events(timeout=0)
        >>> list(events), events.result.reason
        ([], 'timeout')
        """
    def _moment(self, said: Callable[[], object] | None = None) -> bool: ...
    def _awaits(self) -> Awaitable[object] | None: ...
    def _abandon(self) -> None: ...
    def _take(self) -> Hit | None: ...
    def _keep(self) -> None: ...
    def _give(self) -> None: ...
    def close(self) -> None:
        """Ends the iteration; hits that still wait are dropped.

        >>> events = vm.events(timeout=5)
        >>> events.close()
        >>> list(events)
        []
        """

@final
class Symbol:
    """One symbol of the guest's image.

    >>> symbol = vm.symbols["open_file"]
    >>> symbol.name, symbol.address == vm.symbol("open_file"), symbol.size > 0
    ('open_file', True, True)
    """

    @property
    def name(self) -> str: ...
    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int:
        """Bytes; 0 where the image does not say."""
    @property
    def is_function(self) -> bool: ...

@final
class Symbols:
    """The symbols of the guest's image, sorted by address.

    >>> "open_file" in vm.symbols
    True
    """

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Symbol]: ...
    def __contains__(self, key: object, /) -> bool:
        """Whether there is a symbol of that name."""
    def __getitem__(self, name: str, /) -> Symbol:
        """The symbol of that name.

        Raises:
            SymbolNotFoundError: there is none; `nearest` has suggestions.

        >>> vm.symbols["open_file"].name
        'open_file'
        """
    def match(self, pattern: str) -> list[Symbol]:
        """Those whose whole name matches a shell pattern (`*` and `?`), sorted by address.

        >>> [symbol.name for symbol in vm.symbols.match("open_f?le")]
        ['open_file']
        """

@final
class Memory:
    """Guest-physical memory, from 0 to `size`.

    >>> vm.memory.read(0, 4096) == vm.read_pa(0, 4096)
    True
    """

    @property
    def size(self) -> int:
        """Bytes."""
    def read(self, pa: int, length: int) -> bytes:
        """As `Vm.read_pa`."""
    def read_into(self, pa: int, buffer: Buffer) -> None:
        """Fills a writable buffer from `pa` on, without an object in between; raises as `Vm.read_pa`.

        >>> page = bytearray(4096)
        >>> vm.memory.read_into(0, page)
        """
    def read_many(self, ranges: Sequence[tuple[int, int]], *, root: int | None = None) -> list[bytes]:
        """Reads many ranges of virtual memory, each an address and a length, in one call: all of them or nothing.

        Raises:
            TranslationError, OutOfRangeError, NotInDumpError, NotSupportedError: as `Vm.read`, for the first range that cannot be read.

        >>> va = vm.symbol("open_file")
        >>> [len(part) for part in vm.memory.read_many([(va, 4), (va + 8, 2)])]
        [4, 2]
        """
    def write(self, pa: int, data: Buffer) -> None:
        """As `Vm.write_pa`."""

@final
class View:
    """A view: one map from the guest's physical pages to frames and access rights. Two are equal if their numbers are.

    >>> vm.views.default
    View(0)
    """

    def __new__(cls, id: int) -> View: ...
    @property
    def id(self) -> int:
        """Its number; 0 is the default view, in which nothing is ever hidden."""
    @property
    def is_default(self) -> bool: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Views:
    """The views of a session: the default one, the one it taps in, and those you create.

    >>> own = vm.views.create(vmitap.Access.RWX)
    >>> len(vm.views), own in list(vm.views)
    (3, True)
    >>> vm.views.destroy(own)
    """

    @property
    def default(self) -> View:
        """The view the guest has when nobody taps it."""
    @property
    def tap(self) -> View:
        """The view the session's own breakpoints are planted in."""
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[View]: ...
    def create(self, access: Access = ...) -> View:
        """Makes a view that maps every page to itself.

        Args:
            access: what every page allows in it; RWX by default.

        Raises:
            NotSupportedError: the driver has no views. DriverError: there are as many as `Caps.max_views` already.

        >>> vm.views.create().is_default
        False
        """
    def destroy(self, view: View) -> None:
        """Removes a view that you created, with the breakpoints in it; vCPUs in it go to the tap view.

        Raises:
            ViewNotFoundError: there is no such view. DefaultViewError: it is the default one.

        >>> vm.views.destroy(vm.views.create())
        """
    def switch_to(self, view: View) -> None:
        """Puts every vCPU into `view`.

        Raises:
            ViewNotFoundError: there is no such view.

        >>> vm.views.switch_to(vm.views.default)
        >>> vm.views.of(0) == vm.views.default
        True
        """
    def of(self, vcpu: int) -> View:
        """The view a vCPU is in.

        Raises:
            VcpuNotFoundError: there is no such vCPU.

        >>> vm.views.of(0) == vm.views.tap
        True
        """

@final
class VmInfo:
    """Facts about a guest that do not change while it lives.

    >>> vm.info.name
    'demo'
    """

    @property
    def driver(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def memory_size(self) -> int:
        """Bytes of guest-physical address space, from 0."""
    @property
    def vcpus(self) -> int: ...
    @property
    def version(self) -> str:
        """What the driver runs on, such as "unicorn 2.1.4"; of a dump its format, such as "ELF core"."""

@final
class Caps:
    """What a driver can do with the guest it is attached to; found by probing, never by a version number.

    >>> vm.caps.fast_single_step
    True
    """

    @property
    def write(self) -> bool:
        """Guest memory can be written."""
    @property
    def registers(self) -> bool:
        """Registers can be read, and written where memory can be written."""
    @property
    def views(self) -> bool:
        """Views can be created, and pages remapped and protected in them."""
    @property
    def max_views(self) -> int:
        """Most views that can exist beside the default one."""
    @property
    def events(self) -> bool:
        """Events can be waited for."""
    @property
    def single_step(self) -> bool:
        """One instruction can be executed in another view, with an event behind it."""
    @property
    def fast_single_step(self) -> bool:
        """One instruction can be executed in another view without an event."""
    @property
    def emulate_read(self) -> bool:
        """A denied read can be served without switching views."""
    @property
    def injection(self) -> bool:
        """Exceptions and interrupts can be injected."""
    @property
    def pause(self) -> bool:
        """The guest can be paused."""
    @property
    def multi_access(self) -> bool:
        """Access rights of many pages can be set in one call."""
    def to_dict(self) -> dict[str, bool | int]:
        """Every capability by name.

        >>> vm.caps.to_dict()["views"]
        True
        """

@final
class VmiCore:
    """The driver, one call to one call: for people who build their own tools. Nothing here knows of the session's breakpoints.

    >>> core = vmitap.VmiCore(vm)
    >>> core.translate(vm.symbol("open_file"), vm.registers(0).root) == vm.translate("open_file")
    True
    """

    def __new__(cls, vm: Vm) -> VmiCore: ...
    def read(self, pa: int, length: int) -> bytes:
        """As `Vm.read_pa`; also reads allocated frames, which lie above guest memory."""
    def write(self, pa: int, data: Buffer) -> None:
        """As `Vm.write_pa`, but breakpoints on those bytes are not planted again; also writes allocated frames."""
    def translate(self, va: int, root: int) -> int:
        """As `Vm.translate`."""
    def memory_access(self, gfn: int, view: View) -> Access:
        """The rights of a page in a view.

        >>> vmitap.VmiCore(vm).memory_access(0, vm.views.tap)
        <Access.RWX: 7>
        """
    def set_memory_access(self, gfn: int, view: View, access: Access) -> None:
        """Sets the rights of a page in a view; from the next instruction of every vCPU on, what they deny raises an event.

        Raises:
            BadAccessError: the driver cannot set these rights there. ViewNotFoundError: there is no such view.

        >>> view = vm.views.create()
        >>> vmitap.VmiCore(vm).set_memory_access(0, view, vmitap.Access.RX)
        """
    def remap(self, view: View, gfn: int, frame: int | None) -> None:
        """Shows `frame` at `gfn` in a view; None shows the page's own frame again. Access rights stay as they are.

        Raises:
            DefaultViewError, ViewNotFoundError: not in that view. OutOfRangeError: no such frame.

        >>> core, view = vmitap.VmiCore(vm), vm.views.create()
        >>> frame = core.allocate_frame()
        >>> core.remap(view, 5, frame)
        >>> core.remap(view, 5, None)
        >>> core.free_frame(frame)
        """
    def allocate_frame(self) -> int:
        """Takes a frame that no page of the default view shows, and returns its number. Its content is undefined."""
    def free_frame(self, frame: int) -> None:
        """Gives a frame back.

        Raises:
            InvalidArgumentError: it was not allocated, or a view still shows it.

        >>> core = vmitap.VmiCore(vm)
        >>> core.free_frame(core.allocate_frame())
        """
    @property
    def frames_in_use(self) -> int:
        """How many frames are taken, the session's own shadow pages included."""

@final
class VmiEvent:
    """One event of one vCPU, from `Vm.wait_event`. The vCPU is held until the event is answered with `Vm.respond`.

    Attributes that do not belong to the event's `reason` are None.

    >>> core, view = vmitap.VmiCore(vm), vm.views.create()
    >>> core.set_memory_access(vm.translate("open_file") >> 12, view, vmitap.Access.RW)
    >>> vm.views.switch_to(view)
    >>> event = vm.wait_event(timeout=5)
    >>> event.reason, event.access
    ('memory-access', <Access.X: 4>)
    >>> vm.respond(event, vmitap.VmiEventResponse.fast_single_step(vm.views.default))
    """

    @property
    def reason(
        self,
    ) -> Literal[
        "breakpoint",
        "memory-access",
        "single-step",
        "write-control-register",
        "write-msr",
        "cpuid",
        "descriptor-access",
        "port-io",
        "debug-exception",
        "guest-request",
    ]:
        """What happened.

        "breakpoint": an INT3 was executed; "memory-access": the view denied an access, which has not taken effect;
        "single-step": the instruction asked for is done; the others are about to be executed.
        """
    @property
    def vcpu(self) -> int: ...
    @property
    def view(self) -> View | None:
        """The view the vCPU was in."""
    @property
    def registers(self) -> Registers:
        """The registers at the event; `rip` is the instruction itself, also for an INT3."""
    @property
    def gfn(self) -> int | None:
        """The frame of the instruction (for "breakpoint" and "single-step") or of `pa`."""
    @property
    def pa(self) -> int | None:
        """The first physical address that was denied; of the INT3, for "breakpoint"."""
    @property
    def va(self) -> int | None:
        """The virtual address of the same, where the driver knows it."""
    @property
    def access(self) -> Access | None:
        """Which accesses were denied."""
    @property
    def insn_len(self) -> int | None:
        """Bytes of the instruction, for "breakpoint" and "cpuid"."""
    @property
    def register(self) -> str | int | None:
        """The control register ("cr3") or the number of the MSR about to be written; the register ("gdtr") about to be loaded or stored."""
    @property
    def old(self) -> int | None:
        """Its value now."""
    @property
    def new(self) -> int | None:
        """The value to be written."""
    @property
    def leaf(self) -> int | None:
        """EAX of a CPUID."""
    @property
    def subleaf(self) -> int | None:
        """ECX of a CPUID."""
    @property
    def pending(self) -> int | None:
        """What DR6 is to say of a debug exception."""
    @property
    def port(self) -> int | None:
        """The I/O port about to be read or written."""
    @property
    def port_bytes(self) -> int | None:
        """Bytes that go to or from a port at a time: 1, 2 or 4."""
    @property
    def is_port_read(self) -> bool | None:
        """Whether the port is read; else it is written."""

@final
class VmiEventResponse:
    """The answer to one event: what its vCPU does next. Order of effects: registers, then view, then action.

    >>> vmitap.VmiEventResponse.fast_single_step(vm.views.default).in_view(vm.views.tap)
    VmiEventResponse.fast_single_step(View(0)).in_view(View(1))
    """

    @staticmethod
    def continue_() -> VmiEventResponse:
        """Goes on: retries the instruction, or carries out what was announced."""
    @staticmethod
    def reinject() -> VmiEventResponse:
        """Delivers the INT3 to the guest through its own IDT, as if nobody had looked."""
    @staticmethod
    def fast_single_step(view: View) -> VmiEventResponse:
        """Executes one instruction in `view`, then goes on in the vCPU's own view without another event."""
    @staticmethod
    def single_step(view: View) -> VmiEventResponse:
        """Executes one instruction in `view`, then raises a "single-step" event, still in `view`."""
    @staticmethod
    def emulate() -> VmiEventResponse:
        """Serves the denied read from the default view: the guest gets the original bytes."""
    @staticmethod
    def deny() -> VmiEventResponse:
        """Skips the effect of the denied write, or of the announced register write: the instruction counts as executed."""
    def in_view(self, view: View) -> VmiEventResponse:
        """The same answer, with the vCPU in `view` from then on."""
    def with_registers(self, **registers: Unpack[RegisterValues]) -> VmiEventResponse:
        """The same answer, with these registers written first.

        Raises:
            InvalidArgumentError: no such register, or a value that does not fit into 64 bits.

        >>> vmitap.VmiEventResponse.continue_().with_registers(rax=1)
        VmiEventResponse.continue_().with_registers(rax=0x1)
        """

@final
class BreakpointController:
    r"""Breakpoints as INT3 in shadow pages that only execution can reach; a `TapController`.

    References are counted per view, frame and offset. Everything it planted is taken back when the session ends.
    See `Vm.wait_event` for a whole loop.

    >>> controller = vmitap.BreakpointController(vm)
    >>> pa, view = vm.translate("open_file"), vm.views.tap
    >>> controller.monitor(pa >> 12, view)
    >>> controller.insert_breakpoint(pa, view)
    >>> vm.read_pa(pa, 1) == b"\xcc"
    False
    >>> controller.remove_breakpoint(pa, view)
    >>> controller.unmonitor(pa >> 12, view)
    """

    def __new__(cls, vm: Vm) -> BreakpointController: ...
    def is_breakpoint(self, event: VmiEvent, /) -> bool:
        """Whether the guest itself has an INT3 at the event's instruction.

        Raises:
            TranslationError, OutOfRangeError: the instruction cannot be read.
        """
    def check_event(self, event: VmiEvent, /) -> tuple[View, int] | None:
        """The view and the frame of an INT3 event that carries a view, else None."""
    def insert_breakpoint(self, pa: int, view: View, /) -> None:
        """Plants an INT3 at a physical address in a view, hidden from the guest; or adds a reference to the one there.

        Raises:
            DefaultViewError, ViewNotFoundError: nothing can be hidden in that view.
            OutOfRangeError: no such address.
        """
    def remove_breakpoint(self, pa: int, view: View, /) -> None:
        """Takes back one reference; the last restores the byte, and the last of a page gives its frame back.

        Raises:
            BreakpointNotFoundError: there is none.
        """
    def monitor(self, gfn: int, view: View, /) -> None:
        """Makes a page execute-only in a view, and remembers the access rights it found."""
    def unmonitor(self, gfn: int, view: View, /) -> None:
        """Puts the access rights back that `monitor` found."""

@final
class MemoryController:
    """Breakpoints by taking the right to execute away from a page; touches no byte. A `TapController`.

    >>> controller = vmitap.MemoryController(vm)
    >>> pa, view = vm.translate("open_file"), vm.views.tap
    >>> controller.monitor(pa >> 12, view)
    >>> controller.insert_breakpoint(pa, view)
    >>> vmitap.VmiCore(vm).memory_access(pa >> 12, view)
    <Access.RW: 3>
    >>> controller.remove_breakpoint(pa, view)
    >>> controller.unmonitor(pa >> 12, view)
    """

    def __new__(cls, vm: Vm) -> MemoryController: ...
    def check_event(self, event: VmiEvent, /) -> tuple[View, int] | None:
        """The view and the frame of a denied execution, else None."""
    def insert_breakpoint(self, pa: int, view: View, /) -> None:
        """Notes a breakpoint at a physical address in a view; raises as `BreakpointController.insert_breakpoint`."""
    def remove_breakpoint(self, pa: int, view: View, /) -> None:
        """Takes back one reference.

        Raises:
            BreakpointNotFoundError: there is none.
        """
    def monitor(self, gfn: int, view: View, /) -> None:
        """Takes the right to execute away from a page in a view, and remembers the access rights it found."""
    def unmonitor(self, gfn: int, view: View, /) -> None:
        """Puts the access rights back that `monitor` found."""

@final
class ManagedBreakpoint:
    """One breakpoint of a `BreakpointManager`, as a snapshot.

    >>> manager = vmitap.BreakpointManager(vm)
    >>> manager.insert(vm.symbol("open_file"), vm.registers(0).root, vm.views.tap, tag="files")
    True
    >>> [each.tag for each in manager]
    ['files']
    """

    @property
    def address(self) -> int: ...
    @property
    def root(self) -> int: ...
    @property
    def view(self) -> View: ...
    @property
    def key(self) -> Hashable: ...
    @property
    def tag(self) -> object: ...
    @property
    def is_global(self) -> bool:
        """Whether it matches under every root."""
    @property
    def pa(self) -> int | None:
        """Where it is planted; None while it is pending."""

@final
class BreakpointManager:
    """Keeps breakpoints by identity (view, address, root, key) and plants them through a `TapController`.

    Every operation is whole or not at all. Use it with `Vm.wait_event`; the session's own breakpoints are kept in another one.

    >>> manager = vmitap.BreakpointManager(vm, vmitap.BreakpointController(vm))
    >>> root, view = vm.registers(0).root, vm.views.tap
    >>> manager.insert(vm.symbol("open_file"), root, view, key="files", is_global=True)
    True
    >>> step, reinject = vmitap.VmiEventResponse.fast_single_step(vm.views.default), vmitap.VmiEventResponse.reinject()
    >>> while (found := manager.get_by_event(event := vm.wait_event(timeout=5), "files")) is None:
    ...     vm.respond(event, reinject if event.reason == "breakpoint" else step)
    >>> found.address == event.registers.rip
    True
    >>> vm.respond(event, step)
    >>> manager.clear()
    """

    def __new__(cls, vm: Vm, controller: TapController | None = None) -> BreakpointManager:
        """A manager without breakpoints, which plants through `controller`: one of ours, or an object of yours.

        `controller=None` means a `BreakpointController` of its own.
        """
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[ManagedBreakpoint]: ...
    def insert(
        self, address: int, root: int, view: View, *, key: Hashable | None = None, tag: object = None, is_global: bool = False
    ) -> bool:
        """Inserts a breakpoint: active if the address is mapped under `root`, else pending.

        Returns:
            Whether it is new; a duplicate changes nothing and keeps the first tag.

        Raises:
            BreakpointConflictError: the same identity is there with another `is_global`.
            TranslationError: the address cannot be looked up for another reason than that it is not present.
        """
    def insert_with_hint(
        self,
        address: int,
        root: int,
        view: View,
        pa: int | None,
        *,
        key: Hashable | None = None,
        tag: object = None,
        is_global: bool = False,
    ) -> bool:
        """As `insert`, with the translation given: None makes it pending.

        Raises:
            InvalidArgumentError: `pa` has more than 52 bits, as no physical address has (Intel SDM vol. 3, 5.1.4).
        """
    def remove(self, address: int, root: int, view: View, *, key: Hashable | None = None) -> bool:
        """Removes a breakpoint by its identity, wherever it is planted now. Returns whether there was one."""
    def remove_with_hint(self, address: int, root: int, view: View, pa: int | None, *, key: Hashable | None = None) -> bool:
        """As `remove`, for callers who know where the address is mapped (None: it is not).

        Where a breakpoint is planted is known, so `pa` decides nothing: with one that is out of date it is removed too, planted or pending.
        """
    def remove_by_event(self, event: VmiEvent, key: Hashable | None = None) -> bool | None:
        """Removes what `get_by_event` finds, in all views, pending ones too.

        Returns:
            None: there was none; True: it was the last one on its page; False: others remain there.
        """
    def remove_by_view(self, view: View) -> int:
        """Removes every breakpoint of a view; returns how many."""
    def get_by_event(self, event: VmiEvent, key: Hashable | None = None) -> ManagedBreakpoint | None:
        """The breakpoint of that key at an event."""
    def get_all_by_event(self, event: VmiEvent) -> list[ManagedBreakpoint]:
        """The breakpoints of every key at an event, in order of insertion."""
    def contains_by_event(self, event: VmiEvent, key: Hashable | None = None) -> bool:
        """Whether `get_by_event` finds one."""
    def contains_by_address(self, address: int, root: int, view: View) -> bool:
        """Whether a breakpoint of any key is at that address, active or pending."""
    def handle_page_table_events(self, events: Sequence[PageTableEvent]) -> int:
        """Carries out what a `PageTableMonitor` told: breakpoints whose page went are pending, those whose page came are planted.

        All events are tried, whatever fails.

        Returns:
            How many breakpoints changed.

        Raises:
            DriverError: the first failure; breakpoints of an event that failed are as they were before it.
        """
    def clear(self) -> None:
        """Removes all.

        Raises:
            UndoFailedError: some could not be taken out; these are still there, and it says which.
        """

@final
class PageTableEvent:
    """What became of an address that a `PageTableMonitor` monitors.

    >>> [name for name in dir(vmitap.PageTableEvent) if not name.startswith("_")]
    ['address', 'kind', 'pa', 'root']
    """

    @property
    def kind(self) -> Literal["page-out", "page-in"]:
        """What happened: "page-out", it is no longer mapped at `pa`; "page-in", it is mapped at `pa` now."""
    @property
    def address(self) -> int:
        """The virtual address."""
    @property
    def root(self) -> int:
        """The page-table root it is monitored under."""
    @property
    def pa(self) -> int:
        """The physical address that it had or has."""

@final
class PageTableMonitor:
    """Watches the page tables that map addresses, and says when these are mapped, unmapped or mapped elsewhere.

    For people who write their own loop with `Vm.wait_event`; the session does this for its own breakpoints by itself. The right to
    write is taken away from exactly the tables that are looked at to find the addresses, at all levels, and put back as it was found.
    A denied store is answered with `single_step` in the default view, and once that is reported `process` says what it did: stores are
    not decoded, so that none of any width or kind goes by. Accessed and dirty bits tell nothing, nor does a change that leaves an
    address where it was.

    >>> monitor = vmitap.PageTableMonitor(vm)
    >>> manager, root, address = vmitap.BreakpointManager(vm), vm.registers().root, 0x7000_0010_0000
    >>> manager.insert(address, root, vm.views.tap)  # not mapped, so it is pending
    True
    >>> monitor.monitor(address, root) is None, monitor.tables
    (True, 1)
    >>> vm.write_pa(root + 224 * 8, vm.read_pa(root, 8))  # maps the low addresses there once more
    >>> events = monitor.process()
    >>> [(event.kind, hex(event.pa)) for event in events]
    [('page-in', '0x100000')]
    >>> manager.handle_page_table_events(events)
    1
    >>> [hex(each.pa) for each in manager]
    ['0x100000']
    """

    def __new__(cls, vm: Vm, controller: BreakpointController | None = None, *, views: Sequence[View] | None = None) -> PageTableMonitor:
        """A monitor of nothing yet.

        Args:
            vm: the session.
            controller: where breakpoints on pages that are tables too are planted: the two count what they deny together. None: those
                of the session itself.
            views: where tables are watched; None: in the session's tap view. vCPUs in another view can write them unseen.

        Raises:
            DefaultViewError: the default view is among `views`, where stores are carried out.
            NotSupportedError: it is a dump.
        """
    def __len__(self) -> int: ...
    @property
    def tables(self) -> int:
        """How many page tables are watched."""
    def monitor(self, address: int, root: int) -> int | None:
        """Monitors an address under a root, or counts one more who wants it; returns where it is mapped, or None.

        Raises:
            TranslationError: it can be no address, or its entry has a reserved bit or leads beyond memory.
        """
    def unmonitor(self, address: int, root: int) -> bool:
        """Takes one `monitor` back; returns whether there was one."""
    def mark_dirty(self, event: VmiEvent) -> bool:
        """Notes a store to a watched table that is about to happen; returns whether the event is one.

        Answer it with `VmiEventResponse.single_step(vm.views.default)`, and call `process` with the "single-step" event that follows.
        """
    def process(self, event: VmiEvent | None = None) -> list[PageTableEvent]:
        """The page-ins and page-outs of what the vCPU of `event` has stored by now; None: looks at every table anew.

        Stores that other vCPUs have begun are left alone. For each address the page-out comes before the page-in.

        Raises:
            DriverError: something could not be looked at. What was found out, and the rest, is returned by the next call.
        """
    def clear(self) -> None:
        """Restores the access of every table and forgets every address.

        Raises:
            UndoFailedError: some tables could not be given back, and it says of which addresses; these are still monitored.
        """

@final
class _Script:
    """What a guest that stands still is told to report, and what it was answered."""

    def breakpoint(self, vcpu: int, va: int, pa: int, regs: dict[str, int]) -> None:
        """An INT3 at `va`, which is at `pa`."""
    def access(self, vcpu: int, va: int, pa: int, access: Access, length: int, rip: int, regs: dict[str, int]) -> None:
        """An access to `va`, which is at `pa`, that the view denies."""
    def step(self, vcpu: int, va: int, pa: int, regs: dict[str, int]) -> None:
        """The end of a step; the next instruction is at `va`, which is at `pa`."""
    def answers(self) -> list[tuple[int, _Action, int | None, int | None, dict[str, int]]]:
        """Every answer so far."""
    @property
    def waiting(self) -> int:
        """Events that were not raised yet."""
    def fail_nth(self, n: int, errno: int) -> None:
        """Makes the `n`-th call of the driver from now on fail; 0: none."""
    @property
    def failed_call(self) -> str | None:
        """The name of the call that failed since."""
    @property
    def scratch(self) -> tuple[int, int]:
        """Where unused memory begins, and how many bytes there are."""

def _drop_privileges() -> None:
    """Gives up what the calling thread may do beyond its user's files, for good."""

def _still(target: str, *, memory: int | None, vcpus: int, on_write: OnWrite | None) -> tuple[Vm, _Script]:
    """Opens a session with a guest that stands still. For `vmitap.testing`."""
