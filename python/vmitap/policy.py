"""Choices a caller makes: what a write to a hidden page does, which accesses are meant, and how much a breakpoint may cost.

A policy decides whether something is followed. It is a `Filter`: for hits and for accesses to watched ranges as `where=`, for writes to
hidden pages as `on_write=`. `a & b` follows only if both follow, `a | b` if either does, `~a` if `a` does not. A hit that is not followed
is kept back, and a write that is not followed is thrown away.

>>> policy: vmitap.Policy = Filter.ring(0) & ~Filter.root(0x1000) | Filter.vcpu(1)
>>> bp = vm.breakpoint("open_file", where=policy, on_write=policy)
>>> watch = vm.watch("open_file", 16, Access.R, where=policy)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, Flag
from typing import TypeAlias, final

from vmitap.errors import InvalidArgumentError
from vmitap.filters import Filter

__all__ = ["Access", "Budget", "OnWrite", "Policy", "WritePolicy"]

Policy: TypeAlias = Filter
"""What decides whether something is followed; see this module's beginning."""


class OnWrite(Enum):
    """What happens when the guest writes to a page that hides a breakpoint.

    The write itself is the guest's own: except under `DENY` it takes effect in the original page, from any vCPU.
    Several breakpoints on one page: the bytes a write covers decide, and `DENY` of any of them denies the whole write. One that crosses a
    page border covers bytes of both pages. What a repeated string instruction has still to store to a page is one write; when it comes
    to the next page with a breakpoint, that is another one.

    With a filter it becomes a policy that looks at each write, in Rust while the vCPU is held: `OnWrite.REMOVE & filter` removes where
    the filter holds, and denies elsewhere; `OnWrite.ASK | filter` lets the write happen where the filter holds, and asks elsewhere. A
    filter alone lets writes happen where it holds, and denies elsewhere. It sees the vCPU at the storing instruction (`Reg.rip`,
    `Filter.ring`, ...). What is unknown because memory cannot be read does not hold, and is counted in `BreakpointStats.filter_faults`.

    >>> vm.breakpoint("open_file", on_write=vmitap.OnWrite.REMOVE).state
    'active'
    >>> OnWrite.REMOVE & (Filter.ring(0) & ~Filter.vcpu(1))
    OnWrite.REMOVE & (Filter.ring(0) & ~Filter.vcpu(1))
    """

    REAPPLY = "reapply"
    """The write happens; breakpoints it overwrote are planted again over the new bytes. The default."""
    REMOVE = "remove"
    """The write happens; breakpoints it overwrote are removed, and counted in `Stats.removed_by_write`."""
    DENY = "deny"
    """The write is thrown away, and the guest goes on behind it."""
    ASK = "ask"
    """The function given as `ask=` is called with the hit and returns one of the other three."""

    def __and__(self, condition: Filter) -> WritePolicy:
        return WritePolicy((), self, str(self)) & condition

    def __or__(self, condition: Filter) -> WritePolicy:
        return WritePolicy((), self, str(self)) | condition


@final
@dataclass(frozen=True, eq=False, repr=False)
class WritePolicy:
    """What a write does, depending on the write: an `OnWrite` composed with filters; it is made with `&` and `|`.

    `policy & filter` is the policy where the filter holds, and denies elsewhere. `policy | filter` lets the write happen where the filter
    holds, and is the policy elsewhere.

    >>> isinstance(OnWrite.ASK & Filter.ring(3) | Filter.ring(0), WritePolicy)
    True
    """

    _rules: tuple[_Rule, ...]
    _otherwise: OnWrite
    _text: str

    def __repr__(self) -> str:
        return self._text

    def __bool__(self) -> bool:
        msg = f"{self!r} has no truth value: use & | instead of `and` `or`"
        raise TypeError(msg)

    def __and__(self, condition: Filter) -> WritePolicy:
        text = self._joined("&", condition)
        return WritePolicy(((condition, False, OnWrite.DENY), *self._rules), self._otherwise, text)

    def __or__(self, condition: Filter) -> WritePolicy:
        text = self._joined("|", condition)
        return WritePolicy(((condition, True, OnWrite.REAPPLY), *self._rules), self._otherwise, text)

    def _joined(self, sign: str, condition: object) -> str:
        text = f"({self._text})" if self._rules else self._text
        if not isinstance(condition, Filter):
            msg = f"{text} {sign} {condition!r}: a Filter is needed on the right side, not {type(condition).__name__}"
            raise TypeError(msg)
        return f"{text} {sign} {condition._inner()}"


_Rule: TypeAlias = tuple[Filter, bool, OnWrite]
"""A condition, whether it has to hold, and what is done then."""


def _rules(policy: object) -> tuple[tuple[_Rule, ...], OnWrite]:
    """The rules of an `on_write` argument, of which the first that applies decides, and what is done where none does."""
    if isinstance(policy, Filter):
        return ((policy, True, OnWrite.REAPPLY),), OnWrite.DENY
    if isinstance(policy, WritePolicy):
        return policy._rules, policy._otherwise
    msg = f"on_write is a vmitap.OnWrite, a Filter, or both composed, not {type(policy).__name__}"
    raise TypeError(msg)


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
