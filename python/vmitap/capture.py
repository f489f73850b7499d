"""What to capture at a hit, beyond the numbers and strings of `vmitap.filters`: structs, a slice of the stack, a backtrace.

Each entry of `capture={...}` becomes a column of `vm.recording`; what cannot be read is a missing value, never an exception.

>>> from vmitap import Arg, Backtrace, Cstr, Mem, Struct
>>> columns = {"path": Cstr(Arg(0), max=64), "flags": Arg(1).u32, "callers": Backtrace(4)}
>>> bp = vm.breakpoint("open_file", capture=columns, on_return={"fd": Reg.rax.i32})
>>> _ = vm.run(timeout=5, max_hits=3)
>>> vm.recording.columns[7:]
['path', 'flags', 'callers', 'fd', 'duration_ns']
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias, final

from vmitap.errors import InvalidArgumentError
from vmitap.filters import Number, Reg, Text, _check_int, _number, _plain

__all__ = ["Backtrace", "Stack", "Struct"]


@final
class Backtrace:
    """The addresses a function was called from, nearest first, as a list; right at its first instruction only.

    The first one is on top of the stack, the others are found by frame pointers (RBP) as long as those are sound: code that was compiled
    without them ends the list early.

    Args:
        depth: how many at most, 1 to 64.

    >>> Backtrace(8)
    Backtrace(8)
    """

    def __init__(self, depth: int = 8) -> None:
        if not 1 <= _check_int(f"Backtrace({depth!r})", depth) <= 64:
            raise InvalidArgumentError("depth", f"Backtrace({depth}): a backtrace has 1 to 64 addresses")
        self._depth = depth

    def __repr__(self) -> str:
        return f"Backtrace({self._depth})"


@final
class Stack:
    """The `length` bytes from the stack pointer up.

    >>> Stack(64)
    Stack(64)
    """

    def __init__(self, length: int) -> None:
        if not 1 <= _check_int(f"Stack({length!r})", length) <= 65536:
            raise InvalidArgumentError("length", f"Stack({length}): {length} is no length of 1 to 65536 bytes")
        self._length = length

    def __repr__(self) -> str:
        return f"Stack({self._length})"


@final
class Struct:
    """Fields of a struct in memory, each a column `name.field`. The address of a field is its offset in the struct.

    >>> from vmitap import Arg, Cstr, Mem
    >>> head = Struct(Arg(0), {"first": Mem(0, 1), "rest": Cstr(1, max=32)})
    >>> bp = vm.breakpoint("open_file", capture={"head": head})
    >>> vm.recording.columns[7:]
    ['head.first', 'head.rest']
    """

    def __init__(self, address: int | Number, fields: Mapping[str, Number | Text]) -> None:
        text = f"Struct({_plain(address)}, {dict(fields)!r})"
        base = _number(text, address)
        self._text = text
        self._fields: dict[str, Number | Text] = {}
        for name, field in fields.items():
            if not isinstance(name, str) or not isinstance(field, Number | Text):
                msg = f"{text}: {name!r}: {field!r} is no field; a field is Mem, Bytes, Cstr or Utf16 at an offset"
                raise TypeError(msg)
            first, *rest = field._code
            if first[0] != "const":
                raise InvalidArgumentError("fields", f"{text}: {name!r}: {field!r} does not begin with an offset")
            code = (*base._code, first, ("arith", "+"), *rest)
            if isinstance(field, Number):
                self._fields[name] = Number(code, field._text, field._compound, field._signed)
            else:
                self._fields[name] = Text(code, field._text, field._compound, field._kind, field._max)
        if not self._fields:
            raise InvalidArgumentError("fields", f"{text}: a struct has a field at least")

    def __repr__(self) -> str:
        return self._text


Capturable: TypeAlias = Number | Text | Struct | Stack | Backtrace
"""What can be a value of `capture`."""


def _columns(what: str, given: object) -> list[tuple[str, str, int, Number | Text]]:
    """Name, kind, size and expression of each column."""
    if not isinstance(given, Mapping):
        msg = f"{what} is a dict of columns, such as {{'size': Arg(2)}}, not {type(given).__name__}"
        raise TypeError(msg)
    found: list[tuple[str, str, int, Number | Text]] = []
    for name, value in given.items():
        if not isinstance(name, str):
            msg = f"{what}: the name of a column is a str, not {type(name).__name__}"
            raise TypeError(msg)
        match value:
            case Struct():
                found += [(f"{name}.{field}", *_column(part)) for field, part in value._fields.items()]
            case Stack():
                found.append((name, "bytes", value._length, Reg.rsp))
            case Backtrace():
                found.append((name, "backtrace", value._depth, Reg.rsp))
            case Number() | Text():
                found.append((name, *_column(value)))
            case _:
                msg = f"{what}: {name!r}: {value!r} cannot be captured; a number, a string, Struct, Stack or Backtrace can"
                raise TypeError(msg)
    return found


def _column(value: Number | Text) -> tuple[str, int, Number | Text]:
    if isinstance(value, Text):
        return value._kind, value._max, value
    last = value._code[-1]
    bits = last[1] if last[0] == "cast" else 8 * int(str(last[1])) if last[0] == "load" else 64
    return "number", int(str(bits)) // 8, value
