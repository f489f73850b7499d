"""Filters: which hits count. Built here from Python's operators, compiled once, and evaluated in Rust while the vCPU is held.

>>> from vmitap import Arg, Cstr, Filter, Reg
>>> where = (Arg(1) > 4096) & ~Filter.ring(3) | Cstr(Arg(0)).startswith("/etc/")
>>> where
((Arg(1) > 4096) & ~Filter.ring(3)) | Cstr(Arg(0), max=256).startswith('/etc/')
>>> bp = vm.breakpoint("open_file", where=where)
>>> vm.run(timeout=5).py_calls
0

Numbers have 64 bits and no sign unless they are made signed (`Arg(0).i32`); arithmetic wraps. Comparisons compare the numbers that
are meant, so a signed -1 is less than an unsigned 5. A condition on memory that cannot be read is unknown, which is neither true nor
false; a filter that is unknown in the end keeps the hit back, and counts it in `BreakpointStats.filter_faults`.
Python's `and`, `or`, `not`, `in` and `a < b < c` cannot be redefined and are refused: use `&`, `|`, `~`, `is_in`, `contains` and
parentheses.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, NoReturn, TypeAlias, final

from vmitap.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vmitap._native import Hit

__all__ = ["Arg", "Bytes", "Cstr", "Filter", "Mem", "Number", "Reg", "Text", "Utf16"]

_Code: TypeAlias = tuple[tuple[object, ...], ...]

_MEMBERS = 4096
"""Numbers that `is_in` takes, at most."""
_SEARCHED = 4096
"""Bytes of a string that a filter looks at, at most."""


def _refuse_bool(what: object) -> NoReturn:
    msg = (
        f"{what!r} has no truth value: use & | ~ instead of `and` `or` `not`, is_in() and contains() instead of `in`, "
        "and (a < b) & (b < c) instead of a < b < c"
    )
    raise TypeError(msg)


@dataclass(frozen=True, eq=False, repr=False)
class _Expression:
    """What all expressions are: steps in postfix order, and their text."""

    _code: _Code
    _text: str
    _compound: bool = False

    def __repr__(self) -> str:
        return self._text

    def __bool__(self) -> bool:
        _refuse_bool(self)

    def _inner(self) -> str:
        return f"({self._text})" if self._compound else self._text


@dataclass(frozen=True, eq=False, repr=False)
class Number(_Expression):
    """A number that is known at a hit: an argument, a register, memory, or what is computed from them.

    >>> (Arg(1) - Reg.rax) // 8 != 0x2000
    ((Arg(1) - Reg.rax) // 8) != 0x2000
    """

    _signed: bool = False

    def _cast(self, bits: int, *, signed: bool) -> Number:
        name = f"{'i' if signed else 'u'}{bits}"
        return Number((*self._code, ("cast", bits, signed)), f"{self._inner()}.{name}", False, signed)

    @property
    def u8(self) -> Number:
        """Its lowest 8 bits."""
        return self._cast(8, signed=False)

    @property
    def u16(self) -> Number:
        """Its lowest 16 bits."""
        return self._cast(16, signed=False)

    @property
    def u32(self) -> Number:
        """Its lowest 32 bits: the upper half of an argument of 32 bits is undefined.

        >>> Arg(1).u32 == 5
        Arg(1).u32 == 5
        """
        return self._cast(32, signed=False)

    @property
    def i8(self) -> Number:
        """Its lowest 8 bits, as a number with a sign."""
        return self._cast(8, signed=True)

    @property
    def i16(self) -> Number:
        """Its lowest 16 bits, as a number with a sign."""
        return self._cast(16, signed=True)

    @property
    def i32(self) -> Number:
        """Its lowest 32 bits, as a number with a sign.

        >>> Arg(0).i32 < 0
        Arg(0).i32 < 0
        """
        return self._cast(32, signed=True)

    @property
    def i64(self) -> Number:
        """The same 64 bits, as a number with a sign."""
        return self._cast(64, signed=True)

    def is_in(self, values: Iterable[int]) -> Filter:
        """Whether it is one of these numbers, at most 4096; a `range` with step 1 takes no more time than a comparison.

        >>> Arg(1).is_in((1, 2, 4)) | Reg.rdi.is_in(range(0x1000, 0x2000))
        Arg(1).is_in((1, 2, 4)) | Reg.rdi.is_in(range(4096, 8192))
        """
        text = f"{self._inner()}.is_in({values!r})"
        if isinstance(values, range) and values.step == 1 and values:
            _check_int(text, values[0])
            _check_int(text, values[-1])
            return Filter((*self._code, ("within", values[0], values[-1])), text)
        wanted = tuple(islice(values, _MEMBERS + 1))
        if len(wanted) > _MEMBERS:
            raise InvalidArgumentError("values", f"{text}: more than {_MEMBERS} numbers; a range with step 1 may be of any length")
        for value in wanted:
            _check_int(text, value)
        return Filter((*self._code, ("one_of", wanted)), f"{self._inner()}.is_in({wanted!r})")

    def _compare(self, sign: str, other: object) -> Filter:
        text = f"{self._inner()} {sign} {_show(other)}"
        right = _number(text, other)
        if isinstance(other, int):
            low, high = (-(1 << 63), (1 << 63) - 1) if self._signed else (0, (1 << 64) - 1)
            if not low <= other <= high:
                hint = "" if self._signed else f"; with a sign it is {self._inner()}.i64 or .i32"
                raise InvalidArgumentError("expression", f"{text}: the left side lies between {low} and {high}{hint}")
        return Filter((*self._code, *right._code, ("compare", sign)), text, True)

    def __eq__(self, other: object) -> Filter:  # type: ignore[override]
        return self._compare("==", other)

    def __ne__(self, other: object) -> Filter:  # type: ignore[override]
        return self._compare("!=", other)

    def __lt__(self, other: int | Number) -> Filter:
        return self._compare("<", other)

    def __le__(self, other: int | Number) -> Filter:
        return self._compare("<=", other)

    def __gt__(self, other: int | Number) -> Filter:
        return self._compare(">", other)

    def __ge__(self, other: int | Number) -> Filter:
        return self._compare(">=", other)

    __hash__ = object.__hash__

    def _arith(self, sign: str, other: object, *, swapped: bool = False) -> Number:
        text = f"{self._inner()} {sign} {_show(other)}"
        if swapped:
            text = f"{_show(other)} {sign} {self._inner()}"
        left, right = self, _number(text, other)
        if swapped:
            left, right = right, left
        if sign in {"//", "%"} and (left._signed or right._signed):
            raise InvalidArgumentError("expression", f"{text}: only numbers without a sign are divided")
        signed = left._signed or (right._signed and sign not in {"<<", ">>"})
        return Number((*left._code, *right._code, ("arith", sign)), text, True, signed)

    def __add__(self, other: int | Number) -> Number:
        return self._arith("+", other)

    def __radd__(self, other: int) -> Number:
        return self._arith("+", other, swapped=True)

    def __sub__(self, other: int | Number) -> Number:
        return self._arith("-", other)

    def __rsub__(self, other: int) -> Number:
        return self._arith("-", other, swapped=True)

    def __mul__(self, other: int | Number) -> Number:
        return self._arith("*", other)

    def __rmul__(self, other: int) -> Number:
        return self._arith("*", other, swapped=True)

    def __floordiv__(self, other: int | Number) -> Number:
        return self._arith("//", other)

    def __rfloordiv__(self, other: int) -> Number:
        return self._arith("//", other, swapped=True)

    def __mod__(self, other: int | Number) -> Number:
        return self._arith("%", other)

    def __rmod__(self, other: int) -> Number:
        return self._arith("%", other, swapped=True)

    def __and__(self, other: int | Number) -> Number:
        return self._arith("&", other)

    def __rand__(self, other: int) -> Number:
        return self._arith("&", other, swapped=True)

    def __or__(self, other: int | Number) -> Number:
        return self._arith("|", other)

    def __ror__(self, other: int) -> Number:
        return self._arith("|", other, swapped=True)

    def __xor__(self, other: int | Number) -> Number:
        return self._arith("^", other)

    def __rxor__(self, other: int) -> Number:
        return self._arith("^", other, swapped=True)

    def __lshift__(self, other: int | Number) -> Number:
        return self._arith("<<", other)

    def __rlshift__(self, other: int) -> Number:
        return self._arith("<<", other, swapped=True)

    def __rshift__(self, other: int | Number) -> Number:
        return self._arith(">>", other)

    def __rrshift__(self, other: int) -> Number:
        return self._arith(">>", other, swapped=True)

    def __neg__(self) -> Number:
        return Number((("const", 0, True), *self._code, ("arith", "-")), f"-{self._inner()}", True, True)

    def __invert__(self) -> Number:
        return Number((*self._code, ("const", (1 << 64) - 1, False), ("arith", "^")), f"~{self._inner()}", True, self._signed)


def _show(value: object) -> str:
    if isinstance(value, _Expression):
        return value._inner()
    return hex(value) if isinstance(value, int) and not isinstance(value, bool) and value > 4096 else repr(value)


def _check_int(text: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        kind = type(value).__name__
        hint = "; put each comparison of & and | in parentheses" if isinstance(value, _Expression) else ""
        msg = f"{text}: a number is needed, not {kind}{hint}"
        raise TypeError(msg)
    if not -(1 << 63) <= value < 1 << 64:
        raise InvalidArgumentError("expression", f"{text}: {value} does not fit into 64 bits")
    return value


def _number(text: str, value: object) -> Number:
    if isinstance(value, Number):
        return value
    number = _check_int(text, value)
    return Number((("const", number, number < 0),), _show(value), False, number < 0)


@final
class Arg(Number):
    """Argument `n` of the function that is entered, from 0; right at its first instruction only.

    Where it is depends on the calling convention that the session or the breakpoint was given as `abi`. "sysv" (System V AMD64 ABI
    3.2.3): RDI, RSI, RDX, RCX, R8, R9, then the stack above the return address. "ms" (Microsoft x64): RCX, RDX, R8, R9, then the stack
    above the return address and 32 bytes of home space. Integers and pointers only.

    Raises:
        InvalidArgumentError: `n` is not 0 to 63.

    >>> vm.breakpoint("open_file", where=Arg(1) == 0).where
    Arg(1) == 0
    """

    def __init__(self, n: int) -> None:
        if not 0 <= _check_int(f"Arg({n!r})", n) <= 63:
            raise InvalidArgumentError("n", f"Arg({n}): arguments are numbered from 0 to 63")
        super().__init__((("argument", n),), f"Arg({n})")


@final
class Mem(Number):
    """The little-endian number of `size` bytes at a virtual address, under the page tables of the hit.

    Args:
        address: an address, or what computes one.
        size: 1, 2, 4 or 8. For more bytes there is `Bytes`.

    Raises:
        InvalidArgumentError: no such size.

    >>> Mem(Reg.rsp + 8, 4).i32 < 0
    Mem(Reg.rsp + 8, 4).i32 < 0
    """

    def __init__(self, address: int | Number, size: int = 8) -> None:
        text = f"Mem({_plain(address)}, {size!r})"
        if _check_int(text, size) not in {1, 2, 4, 8}:
            raise InvalidArgumentError("size", f"{text}: a number has 1, 2, 4 or 8 bytes; Bytes() reads more")
        super().__init__((*_number(text, address)._code, ("load", size)), text)


def _plain(value: object) -> str:
    return repr(value) if isinstance(value, _Expression) else _show(value)


def _register(name: str) -> Number:
    return Number((("register", name),), f"Reg.{name}")


@final
class Reg:
    """The vCPU's registers at the hit. `Reg.root` is CR3 without its flag bits, `Reg.ring` the privilege level.

    >>> (Reg.rax == 0) & (Reg.ring == 0)
    (Reg.rax == 0) & (Reg.ring == 0)
    """

    rax: ClassVar[Number] = _register("rax")
    rbx: ClassVar[Number] = _register("rbx")
    rcx: ClassVar[Number] = _register("rcx")
    rdx: ClassVar[Number] = _register("rdx")
    rsi: ClassVar[Number] = _register("rsi")
    rdi: ClassVar[Number] = _register("rdi")
    rsp: ClassVar[Number] = _register("rsp")
    rbp: ClassVar[Number] = _register("rbp")
    r8: ClassVar[Number] = _register("r8")
    r9: ClassVar[Number] = _register("r9")
    r10: ClassVar[Number] = _register("r10")
    r11: ClassVar[Number] = _register("r11")
    r12: ClassVar[Number] = _register("r12")
    r13: ClassVar[Number] = _register("r13")
    r14: ClassVar[Number] = _register("r14")
    r15: ClassVar[Number] = _register("r15")
    rip: ClassVar[Number] = _register("rip")
    rflags: ClassVar[Number] = _register("rflags")
    cr0: ClassVar[Number] = _register("cr0")
    cr2: ClassVar[Number] = _register("cr2")
    cr3: ClassVar[Number] = _register("cr3")
    cr4: ClassVar[Number] = _register("cr4")
    efer: ClassVar[Number] = _register("efer")
    cs: ClassVar[Number] = _register("cs")
    ss: ClassVar[Number] = _register("ss")
    fs_base: ClassVar[Number] = _register("fs_base")
    gs_base: ClassVar[Number] = _register("gs_base")
    kernel_gs_base: ClassVar[Number] = _register("kernel_gs_base")
    root: ClassVar[Number] = _register("root")
    ring: ClassVar[Number] = _register("ring")


@dataclass(frozen=True, eq=False, repr=False)
class Text(_Expression):
    """Bytes or a string in memory; `Bytes`, `Cstr` and `Utf16` are made, this is only their common part.

    >>> isinstance(Cstr(Arg(0)), vmitap.Text)
    True
    """

    _kind: str = ""
    _max: int = 0

    def _test(self, test: str, call: str, pattern: object) -> Filter:
        text = call.format(self._inner(), repr(pattern))
        encoded = _encoded(self._kind, text, pattern)
        if self._max > _SEARCHED:
            raise InvalidArgumentError("max", f"{text}: a filter looks at no more than {_SEARCHED} bytes")
        longest = self._max - (test == "equal" and self._kind != "bytes") * (2 if self._kind == "utf16" else 1)
        if len(encoded) > longest or (test == "equal" and self._kind == "bytes" and len(encoded) != longest):
            raise InvalidArgumentError("expression", f"{text}: never true, as {len(encoded)} bytes are compared with {self._max}")
        if self._kind != "bytes" and "\0" in (pattern if isinstance(pattern, str) else encoded.decode("latin-1")):
            raise InvalidArgumentError("expression", f"{text}: never true, as the string ends at a zero")
        return Filter((*self._code, ("text", self._kind, test, self._max, encoded)), text, test == "equal")

    def __eq__(self, other: object) -> Filter:  # type: ignore[override]
        return self._test("equal", "{} == {}", other)

    def __ne__(self, other: object) -> Filter:  # type: ignore[override]
        equal = self._test("equal", "{} != {}", other)
        return Filter((*equal._code, ("not",)), equal._text, True)

    __hash__ = object.__hash__

    def __contains__(self, pattern: object) -> bool:
        msg = f"{self!r}: Python's `in` cannot be part of a filter; use .contains({pattern!r})"
        raise TypeError(msg)

    def startswith(self, prefix: str | bytes) -> Filter:
        """Whether it begins with `prefix`.

        >>> Cstr(Arg(0)).startswith("/proc/")
        Cstr(Arg(0), max=256).startswith('/proc/')
        """
        return self._test("startswith", "{}.startswith({})", prefix)

    def endswith(self, suffix: str | bytes) -> Filter:
        """Whether it ends with `suffix`; false for a string without an end within `max`.

        >>> Cstr(Arg(0)).endswith(".so")
        Cstr(Arg(0), max=256).endswith('.so')
        """
        return self._test("endswith", "{}.endswith({})", suffix)

    def contains(self, part: str | bytes) -> Filter:
        """Whether `part` is somewhere in it, within `max` bytes.

        >>> Cstr(Arg(0), max=64).contains("shadow")
        Cstr(Arg(0), max=64).contains('shadow')
        """
        return self._test("contains", "{}.contains({})", part)


def _encoded(kind: str, text: str, pattern: object) -> bytes:
    if isinstance(pattern, str) and kind != "bytes":
        return pattern.encode("utf-16-le" if kind == "utf16" else "utf-8")
    if isinstance(pattern, bytes | bytearray | memoryview) and kind != "utf16":
        return bytes(pattern)
    wanted = {"bytes": "bytes are", "cstr": "bytes or a str are", "utf16": "a str is"}[kind]
    msg = f"{text}: {wanted} needed, not {type(pattern).__name__}"
    raise TypeError(msg)


def _place(kind: str, text: str, address: int | Number, length: int) -> tuple[_Code, str, bool, str, int]:
    if not 1 <= _check_int(text, length) <= 65536 or (kind == "utf16" and length % 2):
        raise InvalidArgumentError("max", f"{text}: {length} is no length of 1 to 65536 bytes")
    return _number(text, address)._code, text, False, kind, length


@final
class Bytes(Text):
    r"""`length` bytes at a virtual address, under the page tables of the hit.

    Raises:
        InvalidArgumentError: `length` is not 1 to 65536.

    >>> Bytes(Reg.rip, 2) == b"\x0f\x05"
    Bytes(Reg.rip, 2) == b'\x0f\x05'
    """

    def __init__(self, address: int | Number, length: int) -> None:
        super().__init__(*_place("bytes", f"Bytes({_plain(address)}, {length!r})", address, length))


@final
class Cstr(Text):
    """The string at a virtual address that ends in a zero byte; compared with bytes, or with a str as UTF-8.

    Args:
        address: an address, or what computes one.
        max: bytes looked at before giving up, 1 to 65536; no string is unbounded.

    Raises:
        InvalidArgumentError: no such `max`.

    >>> vm.breakpoint("open_file", where=Cstr(Arg(0)) == "/etc/motd").where
    Cstr(Arg(0), max=256) == '/etc/motd'
    """

    def __init__(self, address: int | Number, max: int = 256) -> None:  # noqa: A002
        super().__init__(*_place("cstr", f"Cstr({_plain(address)}, max={max!r})", address, max))


@final
class Utf16(Text):
    """The little-endian UTF-16 string at a virtual address that ends in a zero unit; compared with a str.

    Args:
        address: an address, or what computes one.
        max: bytes (not units) looked at before giving up, 2 to 65536, even.

    Raises:
        InvalidArgumentError: no such `max`.

    >>> Utf16(Arg(1)).endswith(".exe")
    Utf16(Arg(1), max=512).endswith('.exe')
    """

    def __init__(self, address: int | Number, max: int = 512) -> None:  # noqa: A002
        super().__init__(*_place("utf16", f"Utf16({_plain(address)}, max={max!r})", address, max))


@final
@dataclass(frozen=True, eq=False, repr=False)
class Filter(_Expression):
    """A condition on a hit. `a & b` holds if both do, `a | b` if either does, `~a` if `a` does not; `b` is looked at only if it matters.

    What counts (`every`, `once`, `rate`) is remembered for each breakpoint on its own, and counts only the hits that get that far:
    `Filter.ring(3) & Filter.every(10)` lets every tenth hit in ring 3 pass.

    >>> Filter.vcpu(0) & ~Filter.ring(3)
    Filter.vcpu(0) & ~Filter.ring(3)
    """

    def _join(self, sign: str, word: str, other: object) -> Filter:
        text = f"{self._inner()} {sign} {_show(other)}"
        if not isinstance(other, Filter):
            msg = f"{text}: a Filter is needed on both sides, not {type(other).__name__}; put comparisons in parentheses"
            raise TypeError(msg)
        return Filter((*self._code, *other._code, (word,)), text, True)

    def __and__(self, other: Filter) -> Filter:
        return self._join("&", "and", other)

    def __or__(self, other: Filter) -> Filter:
        return self._join("|", "or", other)

    def __invert__(self) -> Filter:
        return Filter((*self._code, ("not",)), f"~{self._inner()}")

    def __rand__(self, other: object) -> NoReturn:
        self._wrong_side("&", other)

    def __ror__(self, other: object) -> NoReturn:
        self._wrong_side("|", other)

    def _wrong_side(self, sign: str, other: object) -> NoReturn:
        msg = f"{_show(other)} {sign} {self._inner()}: a Filter is needed on both sides; put comparisons in parentheses"
        raise TypeError(msg)

    @staticmethod
    def parse(text: str) -> Filter:
        """The filter that a Python expression describes, as `vmitap trace --where` takes it; nothing of it is executed.

        Besides what can be written in Python it may use `and`, `or`, `not`, `in` and chained comparisons.

        Raises:
            InvalidArgumentError: it is no such expression; the message says where.

        >>> Filter.parse("0 < Arg(1) <= 4096 and 'passwd' in Cstr(Arg(0))")
        ((Arg(1) > 0) & (Arg(1) <= 4096)) & Cstr(Arg(0), max=256).contains('passwd')
        """
        from vmitap.where import parse_filter

        return parse_filter(text)

    @staticmethod
    def root(root: int) -> Filter:
        """Hits under these page tables: `root` is CR3 without its flag bits.

        >>> Filter.root(vm.registers(0).root)  # doctest: +ELLIPSIS
        Filter.root(0x...)
        """
        text = f"Filter.root({_show(root)})"
        return Filter((*(Reg.root == _check_int(text, root))._code,), text)

    @staticmethod
    def ring(ring: int) -> Filter:
        """Hits at this privilege level, 0 to 3.

        >>> Filter.ring(3)
        Filter.ring(3)
        """
        text = f"Filter.ring({ring!r})"
        if not 0 <= _check_int(text, ring) <= 3:
            raise InvalidArgumentError("ring", f"{text}: rings are numbered from 0 to 3")
        return Filter((*(Reg.ring == ring)._code,), text)

    @staticmethod
    def vcpu(vcpu: int) -> Filter:
        """Hits on this vCPU.

        >>> Filter.vcpu(0)
        Filter.vcpu(0)
        """
        text = f"Filter.vcpu({vcpu!r})"
        if not 0 <= _check_int(text, vcpu) <= 0xFFFF:
            raise InvalidArgumentError("vcpu", f"{text}: there is no such vCPU")
        return Filter((("vcpu",), ("const", vcpu, False), ("compare", "==")), text)

    @staticmethod
    def every(count: int) -> Filter:
        """The first hit, and every `count`-th after it.

        >>> bp = vm.breakpoint("open_file", where=Filter.every(2))
        >>> _ = vm.run(timeout=5, max_hits=3)
        >>> bp.stats.hits, bp.stats.filtered
        (3, 2)
        """
        text = f"Filter.every({count!r})"
        if _check_int(text, count) < 1:
            raise InvalidArgumentError("count", f"{text}: every {count}th hit is none")
        return Filter((("every", count),), text)

    @staticmethod
    def rate(per_second: float) -> Filter:
        """At most so many hits in a second; below 1, one in `1 / per_second` seconds.

        >>> Filter.rate(0.5)
        Filter.rate(0.5)
        """
        text = f"Filter.rate({per_second!r})"
        if not isinstance(per_second, int | float) or not 1e-6 <= per_second <= 1e9:
            raise InvalidArgumentError("per_second", f"{text}: a rate lies between 0.000001 and 1,000,000,000")
        return Filter((("rate", float(per_second)),), text)

    @staticmethod
    def once() -> Filter:
        """The first hit only.

        >>> bp = vm.breakpoint("open_file", where=Filter.once())
        >>> vm.run(timeout=1).hits
        1
        """
        return Filter((("once",),), "Filter.once()")

    @staticmethod
    def predicate(function: Callable[[Hit], bool]) -> Filter:
        """Hits for which `function` returns True. It is called while the vCPU stands still: put it behind what keeps most hits back.

        The only part of a filter that enters Python. What it raises is a `HandlerError`, and the hit does not count.

        >>> where = Filter.once() & Filter.predicate(lambda hit: hit.args[0] != 0)
        >>> bp = vm.breakpoint("open_file", where=where)
        >>> vm.run(timeout=1).py_calls
        1
        """
        if not callable(function):
            msg = f"Filter.predicate({function!r}): a function is needed"
            raise TypeError(msg)
        name = getattr(function, "__qualname__", repr(function))
        return Filter((("predicate", function),), f"Filter.predicate({name})")
