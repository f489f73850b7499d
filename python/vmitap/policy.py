"""Choices a caller makes, as enumerations: what a write to a hidden page does, and which accesses are meant."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, Flag

from vmitap.errors import InvalidArgumentError

__all__ = ["Access", "Budget", "OnWrite"]


class OnWrite(Enum):
    """What happens when the guest writes to a page that hides a breakpoint.

    The write itself is the guest's own: except under `DENY` it takes effect in the original page, from any vCPU.
    Several breakpoints on one page: the bytes a write covers decide, and `DENY` of any of them denies the whole write.

    >>> vm.breakpoint("open_file", on_write=vmitap.OnWrite.REMOVE).state
    'active'
    """

    REAPPLY = "reapply"
    """The write happens; breakpoints it overwrote are planted again over the new bytes. The default."""
    REMOVE = "remove"
    """The write happens; breakpoints it overwrote are removed, and counted in `Stats.removed_by_write`."""
    DENY = "deny"
    """The write is thrown away, and the guest goes on behind it."""
    ASK = "ask"
    """The function given as `ask=` is called with the hit and returns one of the other three."""


class Access(Flag):
    """Which accesses a page allows, a watch looks for, or an event was.

    >>> vmitap.Access.R | vmitap.Access.W == vmitap.Access.RW
    True
    """

    NONE = 0
    """No access."""
    R = 1
    """Read."""
    W = 2
    """Write."""
    X = 4
    """Execute."""
    RW = 3
    """Read and write."""
    RX = 5
    """Read and execute."""
    WX = 6
    """Write and execute."""
    RWX = 7
    """Everything."""


@dataclass(frozen=True)
class Budget:
    """How many events a breakpoint may cause before it is disabled, so that it cannot starve the guest.

    Every event at its address counts, those that its filter keeps back too. With one more than `per_second` within a second the breakpoint
    is disabled: its state says so, `BreakpointStats.over_budget` and `RunResult.disabled_by_budget` too, and a warning is logged.
    `enable()` plants it again.

    >>> bp = vm.breakpoint("open_file", budget=Budget(per_second=3))
    >>> _ = vm.run(timeout=1)
    >>> bp.state, bp.stats.hits, bp.stats.over_budget
    ('disabled', 4, True)
    """

    per_second: int

    def __post_init__(self) -> None:
        if not isinstance(self.per_second, int) or isinstance(self.per_second, bool):
            msg = f"Budget(per_second={self.per_second!r}): a number is needed"
            raise TypeError(msg)
        if not 1 <= self.per_second < 1 << 63:
            raise InvalidArgumentError("per_second", f"Budget(per_second={self.per_second}): at least one event a second")
