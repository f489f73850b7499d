"""Filters and captured columns as text: a Python expression is taken apart, and only what is known is built. Nothing is executed.

>>> parse_filter("Arg(1) == 0 or not Filter.ring(3)")
(Arg(1) == 0) | ~Filter.ring(3)
"""

from __future__ import annotations

import ast
from operator import add, and_, mul, or_, sub, xor
from typing import TYPE_CHECKING, TypeAlias

from vmitap.capture import Backtrace, Capturable, Stack, Struct
from vmitap.errors import InvalidArgumentError
from vmitap.filters import Arg, Bytes, Cstr, Filter, Mem, Number, Reg, Text, Utf16

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["parse_capture", "parse_filter"]

_Field: TypeAlias = Number | Text
_Value: TypeAlias = (
    Number | Text | Backtrace | Stack | Struct | Filter | int | float | str | bytes | tuple[int, ...] | range | dict[str, _Field]
)

_LONGEST = 10_000
_CONSTRUCTORS: dict[str, Callable[..., Number | Text | Backtrace | Stack | Struct]] = {
    "Arg": Arg,
    "Mem": Mem,
    "Bytes": Bytes,
    "Cstr": Cstr,
    "Utf16": Utf16,
    "Stack": Stack,
    "Struct": Struct,
    "Backtrace": Backtrace,
}
_FILTERS: dict[str, Callable[..., Filter]] = {name: getattr(Filter, name) for name in ("root", "ring", "vcpu", "every", "rate", "once")}
_CASTS = ("u8", "u16", "u32", "i8", "i16", "i32", "i64")
_METHODS = ("startswith", "endswith", "contains", "is_in")
_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.BitXor: "^",
    ast.LShift: "<<",
    ast.RShift: ">>",
}
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_CONSTANT: dict[str, Callable[[int, int], int]] = {"+": add, "-": sub, "*": mul, "&": and_, "|": or_, "^": xor}
_MIRRORED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}


def parse_filter(text: str, what: str = "where") -> Filter:
    """The filter that `text` describes; see `Filter.parse`."""
    value = _Parser(what, text).parse()
    if not isinstance(value, Filter):
        raise InvalidArgumentError(what, f"{text!r} is no condition: compare it with something")
    return value


def parse_capture(text: str, what: str = "capture") -> tuple[str, Capturable]:
    """A column as `NAME=EXPRESSION`, or as an expression that is its own name.

    >>> parse_capture("path=Cstr(Arg(0), max=64)")
    ('path', Cstr(Arg(0), max=64))
    >>> parse_capture("task=Struct(Reg.gs_base, {'pid': Mem(16, 4)})")
    ('task', Struct(Reg.gs_base, {'pid': Mem(16, 4)}))
    """
    name, sign, rest = text.partition("=")
    name = name.strip()
    if not sign or not name.replace(".", "_").isidentifier() or rest.startswith("="):
        name, rest = text.strip(), text
    value = _Parser(what, rest).parse()
    if not isinstance(value, Number | Text | Backtrace | Stack | Struct):
        raise InvalidArgumentError(what, f"{rest!r} cannot be captured: a number, a string, Struct(...), Stack(...) or Backtrace(...) can")
    return name, value


class _Parser:
    def __init__(self, what: str, text: str) -> None:
        self._what = what
        self._text = text

    def parse(self) -> _Value:
        if len(self._text) > _LONGEST:
            raise InvalidArgumentError(self._what, f"the expression is longer than {_LONGEST} characters")
        try:
            tree = ast.parse(self._text.strip(), mode="eval")
            return self._value(tree.body)
        except SyntaxError as error:
            raise InvalidArgumentError(self._what, f"{self._text!r} is no expression: {error.msg} at column {error.offset}") from None
        except (RecursionError, MemoryError):
            raise InvalidArgumentError(self._what, "the expression is nested too deeply") from None
        except ValueError as error:
            if isinstance(error, InvalidArgumentError):
                raise
            raise InvalidArgumentError(self._what, f"{self._text!r} is no expression: {error}") from None

    def _error(self, node: ast.AST, why: str) -> InvalidArgumentError:
        column = getattr(node, "col_offset", 0) + 1
        part = ast.get_source_segment(self._text.strip(), node) or self._text
        return InvalidArgumentError(self._what, f"{part!r} at column {column}: {why}")

    def _value(self, node: ast.expr) -> _Value:
        match node:
            case ast.Constant(value=bool() | None):
                raise self._error(node, "compare with a number, a string or bytes")
            case ast.Constant(value=int() | float() | str() | bytes() as value):
                return value
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
                return tuple(self._integer(part) for part in parts)
            case ast.Dict(keys=keys, values=values):
                return {self._name(key, node): self._field(value) for key, value in zip(keys, values, strict=True)}
            case ast.Attribute(value=ast.Name(id="Reg"), attr=name):
                register = getattr(Reg, name, None)
                if isinstance(register, Number):
                    return register
                raise self._error(node, "there is no such register")
            case ast.Attribute(value=inner, attr=name) if name in _CASTS:
                number = self._value(inner)
                cast = getattr(number, name, None) if isinstance(number, Number) else None
                if isinstance(cast, Number):
                    return cast
                raise self._error(node, f"only numbers have .{name}")
            case ast.Call():
                return self._call(node)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                operand = self._value(inner)
                if isinstance(operand, int | float | Number):
                    return -operand
                raise self._error(node, "only numbers are negated")
            case ast.UnaryOp(op=ast.Not() | ast.Invert() as op, operand=inner):
                operand = self._value(inner)
                if isinstance(operand, Filter) or (isinstance(operand, Number) and isinstance(op, ast.Invert)):
                    return ~operand
                raise self._error(node, "only a condition can be negated")
            case ast.BoolOp(op=op, values=parts):
                return self._bool(op, parts)
            case ast.BinOp(left=left, op=op, right=right):
                return self._arithmetic(node, self._value(left), op, self._value(right))
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self._chain(left, ops, others)
            case ast.Name(id=name):
                raise self._error(node, f"there is no {name!r}: a filter looks at Arg(n), Reg.rax, Mem(...), Cstr(...) and the like")
        raise self._error(node, "this is not part of a filter")

    def _name(self, node: ast.expr | None, whole: ast.expr) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        raise self._error(node or whole, "the name of a field is needed")

    def _field(self, node: ast.expr) -> _Field:
        value = self._value(node)
        if isinstance(value, Number | Text):
            return value
        raise self._error(node, "a field is Mem, Bytes, Cstr or Utf16 at an offset")

    def _integer(self, node: ast.expr) -> int:
        value = self._value(node)
        if isinstance(value, int):
            return value
        raise self._error(node, "a number is needed")

    def _bool(self, op: ast.boolop, parts: list[ast.expr]) -> Filter:
        joined: Filter | None = None
        for part in parts:
            value = self._value(part)
            if not isinstance(value, Filter):
                raise self._error(part, "a condition is needed")
            both = isinstance(op, ast.And)
            joined = value if joined is None else (joined & value if both else joined | value)
        assert joined is not None  # noqa: S101 - the grammar has two parts at least
        return joined

    def _arithmetic(self, node: ast.BinOp, left: _Value, op: ast.operator, right: _Value) -> _Value:
        sign = _ARITHMETIC.get(type(op))
        if sign is None:
            raise self._error(node, "this operator is not part of a filter")
        if isinstance(left, int) and isinstance(right, int) and (fold := _CONSTANT.get(sign)) and max(abs(left), abs(right)) < 1 << 64:
            # Bounded: what does not fit into 64 bits is refused where it is used.
            return fold(left, right)
        if isinstance(left, Filter) and isinstance(right, Filter) and sign in {"&", "|"}:
            return left & right if sign == "&" else left | right
        if isinstance(left, int) and isinstance(right, Number):
            return right._arith(sign, left, swapped=True)
        if isinstance(left, Number) and isinstance(right, int | Number):
            return left._arith(sign, right)
        raise self._error(node, "numbers are needed on both sides, or conditions in parentheses around & and |")

    def _chain(self, left: ast.expr, ops: list[ast.cmpop], others: list[ast.expr]) -> Filter:
        joined: Filter | None = None
        for op, right in zip(ops, others, strict=True):
            part = self._compare(left, op, right)
            joined = part if joined is None else joined & part
            left = right
        assert joined is not None  # noqa: S101 - a comparison has an operator
        return joined

    def _compare(self, left_node: ast.expr, op: ast.cmpop, right_node: ast.expr) -> Filter:
        left, right = self._value(left_node), self._value(right_node)
        if isinstance(op, ast.In | ast.NotIn):
            found = self._inside(left, right, right_node)
            return found if isinstance(op, ast.In) else ~found
        sign = _COMPARISONS.get(type(op))
        if sign is None:
            raise self._error(right_node, "`is` is not part of a filter")
        if not isinstance(left, Number | Text):
            left, right, sign = right, left, _MIRRORED[sign]
        try:
            if isinstance(left, Number):
                return left._compare(sign, right)
            if isinstance(left, Text) and sign in {"==", "!="}:
                return left == right if sign == "==" else left != right
        except TypeError as error:
            raise self._error(right_node, str(error)) from None
        raise self._error(left_node, f"there is nothing here that {sign} could compare")

    def _inside(self, left: _Value, right: _Value, node: ast.expr) -> Filter:
        if isinstance(right, Text) and isinstance(left, str | bytes):
            return right.contains(left)
        if isinstance(left, Number) and isinstance(right, tuple | range):
            return left.is_in(right)
        raise self._error(node, "`in` needs a string in Cstr(…), or a number in (1, 2, …) or range(…)")

    def _call(self, node: ast.Call) -> _Value:
        arguments = [self._value(each) for each in node.args]
        if any(each.arg is None for each in node.keywords):
            raise self._error(node, "** is not part of a filter")
        named = {str(each.arg): self._value(each.value) for each in node.keywords}
        function = self._function(node.func)
        try:
            return function(*arguments, **named)
        except (TypeError, OverflowError) as error:
            raise self._error(node, str(error)) from None

    def _function(self, node: ast.expr) -> Callable[..., _Value]:
        match node:
            case ast.Name(id="range"):
                return range
            case ast.Name(id=name) if name in _CONSTRUCTORS:
                return _CONSTRUCTORS[name]
            case ast.Attribute(value=ast.Name(id="Filter"), attr=name) if name in _FILTERS:
                return _FILTERS[name]
            case ast.Attribute(value=inner, attr=name) if name in _METHODS:
                method = getattr(self._value(inner), name, None)
                if isinstance(self._value(inner), Number | Text) and method is not None:
                    return method  # type: ignore[no-any-return]
        raise self._error(node, "there is no such function in a filter")
