r"""Tests of your own handlers, without a hypervisor and without the emulator's library.

`mock_vm` is a guest that stands still: its image is in memory, its symbols are known, and what its processor reports comes from the
test. Everything between, breakpoints, filters, verdicts, is the real thing. `demo_vm` is the demo guest, which runs.

Both are pytest fixtures; put this into `conftest.py`:

    pytest_plugins = ["vmitap.testing"]

A test of a handler then needs neither root nor luck:

    def test_a_refused_licence_is_accepted(mock_vm: MockVm) -> None:
        mock_vm.vm.breakpoint("check_licence", handler=crack)
        mock_vm.script([Breakpoint("check_licence", regs={"rdi": mock_vm.put(b"no-such-key\0")})])
        mock_vm.run()
        assert mock_vm.answers[0].registers["rax"] == 1

>>> from vmitap.testing import Breakpoint, mock
>>> with mock() as mock_vm:
...     bp = mock_vm.vm.breakpoint("check_licence", handler=lambda hit: vmitap.Verdict.return_from_function(1))
...     mock_vm.script([Breakpoint("check_licence")])
...     result = mock_vm.run()
...     result.hits, mock_vm.answers[0].registers["rax"]
(1, 1)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from errno import EIO
from typing import TYPE_CHECKING, Literal

import pytest

import vmitap
from vmitap import _native
from vmitap.policy import Access, OnWrite

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from types import TracebackType
    from typing import Self

    _Action = Literal["continue", "step", "reported-step", "emulate", "deny", "reinject"]

__all__ = ["Answer", "Breakpoint", "Event", "MockVm", "Read", "Step", "Write", "demo_vm", "mock", "mock_vm"]


@dataclass(frozen=True)
class Breakpoint:
    """A vCPU executes the INT3 at `at`.

    `regs` are the registers it has, by name (`cr3` too); what is not named is as a vCPU of `mock_vm` has it: in ring 0, with a stack
    whose top is a return address.

    >>> from vmitap.testing import Breakpoint
    >>> Breakpoint("open_file", regs={"rdi": 7}).vcpu
    0
    """

    at: int | str
    vcpu: int = 0
    regs: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Read:
    """An instruction at `rip` reads `length` bytes at `at`, and the view denies it.

    >>> from vmitap.testing import Read
    >>> Read("open_file", length=16).length
    16
    """

    at: int | str
    length: int = 8
    vcpu: int = 0
    rip: int | str | None = None
    regs: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Write:
    """An instruction at `rip` writes `length` bytes at `at`, and the view denies it.

    >>> from vmitap.testing import Write
    >>> Write("open_file", length=1).rip is None
    True
    """

    at: int | str
    length: int = 8
    vcpu: int = 0
    rip: int | str | None = None
    regs: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """The instruction that a "reported-step" was for is done, and the one at `at` is next.

    >>> from vmitap.testing import Step
    >>> Step("open_file+4").at
    'open_file+4'
    """

    at: int | str
    vcpu: int = 0
    regs: Mapping[str, int] = field(default_factory=dict)


Event = Breakpoint | Read | Write | Step
"""What a processor can report."""


@dataclass(frozen=True)
class Answer:
    """What a vCPU was told to do after an event.

    `action` is "continue": go on where it is; "step" and "reported-step": execute one instruction in another view, without or with a
    report; "emulate": take the original bytes; "deny": throw the write away; "reinject": take the INT3 as its own.
    `step` is the number of the view it executes one instruction in; `view` the number of the view it is in from then on; `registers`
    are those that change, and their new values.

    >>> from vmitap.testing import Answer
    >>> Answer(0, "continue", None, 1, {}).action
    'continue'
    """

    vcpu: int
    action: _Action
    step: int | None
    view: int | None
    registers: Mapping[str, int]


class MockVm:
    """A session with a guest that stands still. `vm` is what your own code is given.

    Nothing of the guest is executed: its memory changes only by what is written to it, its registers only by answers. What a script
    says is taken as said; no view is asked whether it would deny the access.

    >>> from vmitap.testing import mock, Breakpoint
    >>> with mock(vcpus=2) as mock_vm:
    ...     bp = mock_vm.vm.breakpoint("open_file")
    ...     mock_vm.script(Breakpoint("open_file", vcpu=vcpu) for vcpu in (0, 1, 0))
    ...     mock_vm.run().reason, bp.stats.hits, [answer.vcpu for answer in mock_vm.answers]
    ('idle', 3, [0, 1, 0])
    """

    def __init__(self, target: str, vcpus: int, memory: int | None, on_write: OnWrite | None) -> None:
        self.vm, self._script = _native._still(target, memory=memory, vcpus=vcpus, on_write=on_write)
        self._free, self._end = self._script.scratch
        self._end += self._free

    def script(self, events: Iterable[Event]) -> None:
        """Lets the guest's processor report these events, after those already given. An event of a vCPU that is held waits.

        Raises:
            SymbolNotFoundError, TranslationError: there is no such place in the guest; the events before it are taken.
            InvalidArgumentError: no such register or vCPU.
        """
        for event in events:
            self._push(event)

    def fail_nth(self, n: int, errno: int = EIO) -> None:
        """Makes the `n`-th call to the guest's driver from now on fail, once, as on a real machine any of them can.

        Every call counts: reads of memory and registers, changes of access rights and views, waits and answers. The guest is not
        changed by the call that fails. It is a `DriverError` with that `errno`, for whoever does what the call was needed for. A loop
        over `n` tries a whole program; it is through when `failed_call` is None. The end of the `with` block is left alone.

        Args:
            n: 1 is the next call; 0: no call fails any more. What was asked for before no longer holds.
            errno: what the call fails with; EIO if nothing is said.

        >>> import errno, itertools
        >>> from vmitap.testing import mock
        >>> with mock() as mock_vm:
        ...     for n in itertools.count(1):
        ...         mock_vm.fail_nth(n, errno.ENOMEM)
        ...         try:
        ...             bp = mock_vm.vm.breakpoint("open_file")
        ...         except vmitap.DriverError as error:
        ...             assert (error.op, error.errno) == (mock_vm.failed_call, errno.ENOMEM)
        ...             assert list(mock_vm.vm.breakpoints) == []
        ...         else:
        ...             break
        >>> n > 5, mock_vm.failed_call
        (True, None)
        """
        self._script.fail_nth(n, errno)

    @property
    def failed_call(self) -> str | None:
        """The name of the call that `fail_nth` made fail, as `DriverError.op` has it; None while none has."""
        return self._script.failed_call

    def _push(self, event: Event) -> None:
        va = self._address(event.at)
        pa = self.vm.translate(va)
        regs = dict(event.regs)
        if isinstance(event, Breakpoint):
            self._script.breakpoint(event.vcpu, va, pa, regs)
        elif isinstance(event, Step):
            self._script.step(event.vcpu, va, pa, regs)
        else:
            rip = va if event.rip is None else self._address(event.rip)
            access = Access.R if isinstance(event, Read) else Access.W
            self._script.access(event.vcpu, va, pa, access, event.length, rip, regs)

    def _address(self, at: int | str) -> int:
        return at if isinstance(at, int) else self.vm.symbol(at)

    def put(self, data: bytes) -> int:
        """Writes `data` to memory that nothing uses, and returns its address: a path, a structure, a packet for a handler to read.

        Raises:
            ValueError: there is no room left.

        >>> from vmitap.testing import mock
        >>> with mock() as mock_vm:
        ...     mock_vm.vm.read_cstr(mock_vm.put(b"/etc/shadow" + bytes(1)))
        '/etc/shadow'
        """
        at = self._free
        after = (at + len(data) + 15) // 16 * 16
        if after > self._end:
            raise ValueError(f"there is no room for {len(data)} bytes")
        self.vm.write(at, data)
        self._free = after
        return at

    def run(self, timeout: float | None = 5.0, max_hits: int | None = None) -> vmitap.RunResult:
        """Runs the session's loop until every event was raised and answered; as `Vm.run`, which it calls.

        Raises:
            HandlerError: as `Vm.run`. The event was answered before.
        """
        return self.vm.run(timeout=timeout, max_hits=max_hits)

    @property
    def answers(self) -> list[Answer]:
        """The answers so far, in their order."""
        return [Answer(*answer) for answer in self._script.answers()]

    @property
    def waiting(self) -> int:
        """How many events of the script have not been raised yet."""
        return self._script.waiting

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._script.fail_nth(0, 0)
        self.vm.detach()


def mock(target: str = "demo", *, vcpus: int = 1, memory: int | None = None, on_write: OnWrite | None = None) -> MockVm:
    """A guest that stands still, as a context manager. What the fixture `mock_vm` is made with.

    Args:
        target: whose image and symbols: "demo", or "emu:PATH" for an ELF image of your own.
        vcpus: 1 to 8.
        memory: bytes of guest memory, a multiple of 4096; None: 64 MiB.
        on_write: as for `vmitap.attach`.

    Raises:
        AttachError: no such target, or an image that does not fit.
        ImageError: the file is no usable ELF image.
        InvalidArgumentError: `memory` or `vcpus` make no sense.

    >>> from vmitap.testing import mock
    >>> with mock() as mock_vm:
    ...     mock_vm.vm.info.driver
    'mock'
    """
    return MockVm(target, vcpus, memory, on_write)


@pytest.fixture
def mock_vm() -> Iterator[MockVm]:
    """The demo guest, standing still: its memory and symbols, and events from the test. Needs no library."""
    with mock() as guest:
        yield guest


@pytest.fixture
def demo_vm() -> Iterator[vmitap.Vm]:
    """A fresh session with the demo guest; it is ended, and the guest restored, even if the test forgets it."""
    with vmitap.attach("demo") as session:
        yield session
