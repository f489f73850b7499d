"""What expressions are worth at a hit: each operator, cast and register against Python's own arithmetic and the hit's registers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import Bytes, Cstr, Filter, InvalidArgumentError, Number, Reg, Utf16, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmitap import Hit, Vm

ROOT = Path(__file__).parents[2]
WORD = 1 << 64
TOP = 1 << 63

# `a` and `b` are registers, `s` is `a` with a sign. 64 bits that wrap are Python's arithmetic, less what does not fit.
ARITHMETIC = [
    *("a + b", "a + 5", "5 + a", "a + -5", "s + b", "-5 + s"),
    *("a - b", "a - 5", "5 - a", "b - a - a", "s - 5", "5 - s"),
    *("a * b", "a * 7", "7 * a", "s * -3", "-3 * a"),
    *("a // b", "a // 7", "1000 // a"),
    *("a % b", "a % 7", "1000 % a"),
    *("a & b", "a & 0xff0", "0xff0 & a", "s & -8", "-8 & s"),
    *("a | b", "a | 0xff0", "0xff0 | a", "s | b"),
    *("a ^ b", "a ^ 0xff0", "0xff0 ^ a", "s ^ -1"),
    *("a << b % 130", "a << 4", "1 << a % 130", "s << 3", "a << 64", "a << (s & 3)"),
    *("a >> b", "a >> 4", "0xf000 >> a", "s >> 3", "s >> b", "s >> 64", "-100 >> a", "a >> (s & 3)"),
    *("-a", "~a", "-s", "~s", "-(a + 1) * ~b"),
]
CASTS = {"u8": 8, "u16": 16, "u32": 32, "i8": 8, "i16": 16, "i32": 32, "i64": 64}
COMPARISONS = [
    *(f"a {sign} b" for sign in ("==", "!=", "<", "<=", ">", ">=")),
    *(f"s {sign} b" for sign in ("==", "!=", "<", "<=", ">", ">=")),
    *(f"s {sign} -1" for sign in ("==", "!=", "<", "<=", ">", ">=")),
    *(f"5 {sign} a" for sign in ("==", "!=", "<", "<=", ">", ">=")),
    *(f"-1 {sign} s" for sign in ("==", "!=", "<", "<=", ">", ">=")),
    *("a + b == 12", "s >> 1 < 0", "a * b == 35", "(a ^ b) % 5 != 2", f"a >> (s & 1) > {TOP}"),
    *("(a > 5) & (b > 5)", "(a > 5) | (b > 5)", "~(a > 5)", "~((a > 5) | (b == 7)) & (b != 64)"),
]
MEMBERS: list[tuple[str, tuple[int, ...] | range]] = [
    ("a", (5, 64, WORD - 1)),
    ("a", (5,)),
    ("a", ()),
    ("a", range(5, 65)),
    ("a", range(WORD - 2, WORD)),
    ("a", range(1, 100, 3)),
    ("s", (-1, 5)),
    ("s", range(-2, 1)),
    ("s", (WORD - 1, TOP)),
]
PAIRS = [
    *((0, 0), (5, 7), (7, 5), (1, 63), (3, 64), (64, 65), (5, WORD - 1), (WORD - 1, 5), (WORD - 1, WORD - 1)),
    *((TOP, 1), (TOP - 1, TOP), (TOP, TOP), (0x1234_5678_9ABC_DEF0, 0xFFFF_FFFF), (0x8080_8080_8080_8080, 128), (100, 0)),
]


def meant(value: int, *, signed: bool) -> int:
    """What a word of 64 bits holds of a number."""
    value %= WORD
    return value - WORD if signed and value >= TOP else value


def in_python(text: str, a: int, b: int) -> int | None:
    """What Python itself makes of an expression; None: it divides by zero."""
    try:
        return int(eval(text, {"a": a, "b": b, "s": meant(a, signed=True)}))
    except ZeroDivisionError:
        return None


def of_registers(text: str) -> Number | Filter:
    """The same expression, to be looked at in the guest."""
    expression = eval(text, {"a": Reg.r12, "b": Reg.r13, "s": Reg.r12.i64})
    assert isinstance(expression, Number | Filter)
    return expression


def parsed(text: str) -> Filter:
    """The same condition, read as the command line reads it."""
    for name, register in (("a", "Reg.r12"), ("b", "Reg.r13"), ("s", "Reg.r12.i64")):
        text = re.sub(rf"\b{name}\b", register, text)
    return Filter.parse(text)


@pytest.fixture
def spot(vm: Vm) -> int:
    """Where the guest jumps to itself for ever."""
    spot = vm.registers().rip
    vm.write(spot, b"\xeb\xfe")
    return spot


def run_with_pairs(vm: Vm, spot: int) -> None:
    """Executes the instruction at `spot` once with each pair in R12 and R13, and with its number in R14."""
    pairs = [{"r12": a, "r13": b, "r14": number} for number, (a, b) in enumerate(PAIRS)]
    following = iter(pairs[1:])
    vm.set_registers(0, **pairs[0])

    def go_on(hit: Hit) -> Verdict:
        pair = next(following, None)
        return Verdict.set_registers(**pair) if pair else Verdict.pause()

    vm.breakpoint(spot, go_on, key="pairs")
    assert vm.run(timeout=20).reason == "paused"


def test_numbers_are_what_python_computes_in_64_bits(vm: Vm, spot: int) -> None:
    capture: dict[str, Number] = {}
    for text in ARITHMETIC:
        expression = of_registers(text)
        assert isinstance(expression, Number)
        capture[text] = expression
    vm.breakpoint(spot, capture=capture)
    run_with_pairs(vm, spot)
    table = vm.recording.to_arrow()
    for text in ARITHMETIC:
        signed = ("s" in text and "(s" not in text) or text.startswith("-") or "-5" in text
        assert str(table.schema.field(text).type) == ("int64" if signed else "uint64"), text
        expected = [in_python(text, a, b) for a, b in PAIRS]
        assert table[text].to_pylist() == [None if each is None else meant(each, signed=signed) for each in expected], text


def test_casts_take_the_lowest_bits(vm: Vm, spot: int) -> None:
    vm.breakpoint(
        spot, capture={name: getattr(Reg.r12, name) for name in CASTS} | {f"of {name}": -getattr(Reg.r12, name) for name in CASTS}
    )
    run_with_pairs(vm, spot)
    table = vm.recording.to_arrow()
    for name, bits in CASTS.items():
        lowest = [a % (1 << bits) for a, _ in PAIRS]
        expected = [value - (1 << bits) if name[0] == "i" and value >> (bits - 1) else value for value in lowest]
        assert table[name].to_pylist() == expected, name
        assert table[f"of {name}"].to_pylist() == [meant(-value, signed=True) for value in expected], name
        assert str(table.schema.field(name).type) == name.replace("u", "uint").replace("i", "int").replace("uintnt", "uint")


def passed(vm: Vm, spot: int, conditions: list[Filter]) -> list[list[int]]:
    """The numbers of the pairs for which each condition holds."""
    points = [vm.breakpoint(spot, where=each, capture={str(number): Reg.r14}) for number, each in enumerate(conditions)]
    run_with_pairs(vm, spot)
    table = vm.recording.to_arrow()
    found = [[pair for pair in table[str(number)].to_pylist() if pair is not None] for number in range(len(conditions))]
    assert [point.stats.filtered for point in points] == [len(PAIRS) - len(pairs) for pairs in found]
    return found


def test_conditions_hold_where_python_says_so(vm: Vm, spot: int) -> None:
    conditions = [of_registers(text) for text in COMPARISONS]
    again = [parsed(text) for text in COMPARISONS]
    assert [repr(each) for each in conditions] == [repr(each) for each in again]
    found = passed(vm, spot, [each for each in conditions if isinstance(each, Filter)])
    for text, pairs in zip(COMPARISONS, found, strict=True):
        # What `~` does to True is not what it does to a condition.
        truth = [in_python(text.replace("~(", "1 - ("), a, b) for a, b in PAIRS]
        assert pairs == [number for number, holds in enumerate(truth) if holds], text


def test_members_are_those_of_python(vm: Vm, spot: int) -> None:
    found = passed(vm, spot, [{"a": Reg.r12, "s": Reg.r12.i64}[name].is_in(values) for name, values in MEMBERS])
    for (name, values), pairs in zip(MEMBERS, found, strict=True):
        signed = name == "s"
        assert pairs == [number for number, (a, _) in enumerate(PAIRS) if meant(a, signed=signed) in values], (name, values)
    assert sum(bool(pairs) for pairs in found) >= 6


def test_strings_of_every_kind_are_compared(vm: Vm, spot: int) -> None:
    text = "Zoë.exe"
    wide, narrow = vm.symbol("boot_copy"), vm.symbol("boot_copy") + 64
    vm.write(wide, f"{text}\0more".encode("utf-16-le"))
    vm.write(narrow, f"{text}\0more".encode())
    holding: list[Filter] = []
    for string in (Utf16(Reg.r12, max=64), Cstr(Reg.r13, max=64)):
        holding += [
            string == text,
            string != "Zoe.exe",
            string != "Zoë",
            string.startswith("Zoë"),
            string.endswith(".exe"),
            string.contains("oë.e"),
        ]
    holding += [Utf16(Reg.r12) == "Zoë.exe", Bytes(Reg.r12, 4) == "Zo".encode("utf-16-le"), Bytes(Reg.r12, 3) != b"Zoe"]
    # Not half a unit further on, where the same bytes are.
    failing = [~each for each in holding] + [Utf16(Reg.r12 + 1, max=64).startswith("oë"), Utf16(Reg.r12, max=64).contains("more")]
    failing += [Utf16(Reg.r12, max=64).contains("\u6f00\uebff"), Utf16(Reg.r12, max=8).endswith(".exe"), Utf16(Reg.r12) == text.lower()]
    points = [vm.breakpoint(spot, where=each) for each in holding + failing]
    vm.set_registers(0, r12=wide, r13=narrow)
    vm.breakpoint(spot, key="control")
    vm.run(timeout=20, max_hits=len(holding) + 1)
    wrong = [str(point.where) for number, point in enumerate(points) if point.stats.hits != (number < len(holding))]
    assert wrong == []
    assert {point.stats.filter_faults for point in points} == {0}


GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
VALUES = {
    **{name: 0x101 + number for number, name in enumerate(GENERAL)},
    "rax": TOP + 1,
    "r15": WORD - 1,
    "rflags": 0xAD7,
    "cr2": 0xC2000,
    "cs": 0x23,
    "ss": 0x1B,
    "ring": 3,
    "fs_base": 0xF500,
    "gs_base": 0x6500,
    "kernel_gs_base": 0xFFFF_8000_0000_6600,
}
"""What tests/guests/registers.S has in them."""


def test_every_register_is_the_hits(build_guest: Callable[..., str]) -> None:
    names = [name for name in vars(Reg) if not name.startswith("_")]
    hits: list[Hit] = []
    with vmitap.attach(build_guest("registers.S")) as vm:
        physical = vm.translate("spot")
        spot = 0x100_0000_0000 + physical % 4096
        vm.breakpoint(spot, hits.append, root=vm.registers().root, capture={f"r.{name}": getattr(Reg, name) for name in names})
        assert vm.run(timeout=20).reason == "idle"
        assert vm.read_u64("done") == 1
        (captured,) = vm.recording.to_arrow().to_pylist()
    (hit,) = hits
    row = {name: captured[f"r.{name}"] for name in names}
    of_hit = {name: hit.ring if name == "ring" else getattr(hit.regs, name) for name in names}
    assert row == of_hit
    assert row.items() >= VALUES.items()
    assert (row["rip"], row["root"], row["cr3"]) == (spot, hit.root, hit.root | 8)
    # All that could be taken for each other differ.
    assert len(set(row.values())) == len(names) == 30


def test_the_registers_are_those_that_rust_knows() -> None:
    known = re.findall(r'^    \w+ "(\w+)" =>', (ROOT / "src" / "arch" / "amd64" / "register.rs").read_text(), re.MULTILINE)
    assert [name for name in vars(Reg) if not name.startswith("_")] == known


def test_what_is_divided_has_no_sign() -> None:
    for text in ("s // 2", "2 // s", "s % 2", "a % -2", "b // s", "-5 % a"):
        with pytest.raises(InvalidArgumentError, match=r"(?s)//|%.*only numbers without a sign"):
            of_registers(text)
