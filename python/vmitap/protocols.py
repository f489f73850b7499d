"""Shapes of what callers hand in: register values, and controllers of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypedDict

if TYPE_CHECKING:
    from vmitap._native import View, VmiEvent

__all__ = ["RegisterValues", "TapController"]


class RegisterValues(TypedDict, total=False):
    """The registers that can be set, by name; each value is an unsigned 64-bit number.

    >>> vm.set_registers(0, rax=1, rcx=2)
    """

    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rsp: int
    rbp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int


class TapController(Protocol):
    """What a `BreakpointManager` works through: how one address of one view is made to raise an event.

    `BreakpointController` and `MemoryController` are two; an object of your own with these methods is a third.
    Each method either does all of its work or raises and leaves the guest as it was: the manager relies on it.

    >>> manager = vmitap.BreakpointManager(vm, vmitap.MemoryController(vm))
    >>> len(manager)
    0
    """

    def check_event(self, event: VmiEvent, /) -> tuple[View, int] | None:
        """The view and the frame (`gfn`) of an event this controller caused, or None if it is none of its own."""

    def insert_breakpoint(self, pa: int, view: View, /) -> None:
        """Makes executing the guest-physical address `pa` in `view` raise an event."""

    def remove_breakpoint(self, pa: int, view: View, /) -> None:
        """Takes back one `insert_breakpoint` of that address."""

    def monitor(self, gfn: int, view: View, /) -> None:
        """Prepares a page for its first breakpoint; called before the page's first `insert_breakpoint`."""

    def unmonitor(self, gfn: int, view: View, /) -> None:
        """Puts the page back as `monitor` found it; called after the page's last `remove_breakpoint`."""
