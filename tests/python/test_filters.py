"""Filters: which hits count, what they cost Python (nothing), and what is refused when they are built."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import Access, Arg, Bytes, Cstr, Filter, InvalidArgumentError, Mem, Number, Reg, Utf16
from vmitap.where import parse_filter

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmitap import Hit, Vm

PATHS = ["/opt/app/app.conf", "/opt/app/data.db", "/etc/update.conf", "/etc/motd", "/home/alice/notes.txt", "/var/log/app.log"]
"""What the demo guest opens first."""


def opened(where: Filter | None, hits: int = 6) -> list[str]:
    """The paths whose hits pass, until as many have passed; at most 10 of them."""
    paths: list[str] = []
    with vmitap.attach("demo") as vm:
        vm.breakpoint("open_file", lambda hit: paths.append(hit.vm.read_cstr(hit.args[0])), where=where)
        vm.run(timeout=20, max_hits=hits)
    return paths


# --- what passes ---


def test_the_demo_guest_opens_what_these_tests_rely_on() -> None:
    assert opened(None) == PATHS


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (Cstr(Arg(0)) == "/etc/motd", ["/etc/motd", "/etc/motd"]),
        (Cstr(Arg(0)) == b"/etc/motd", ["/etc/motd", "/etc/motd"]),
        (Cstr(Arg(0)).startswith("/opt/app/d"), ["/opt/app/data.db", "/opt/app/data.db"]),
        (Cstr(Arg(0)).endswith(".log"), ["/var/log/app.log", "/var/log/app.log"]),
        (Cstr(Arg(0)).contains("alice"), ["/home/alice/notes.txt", "/home/alice/notes.txt"]),
        (Bytes(Arg(0), 5) == b"/opt/", ["/opt/app/app.conf", "/opt/app/data.db"]),
        (Mem(Arg(0), 4) == int.from_bytes(b"/etc", "little"), ["/etc/update.conf", "/etc/motd"]),
        (Arg(1) != 0, ["/var/log/app.log", "/var/log/app.log"]),
        (Arg(1).is_in((65, 66)), ["/var/log/app.log", "/var/log/app.log"]),
        (Arg(1).is_in(range(60, 66)), ["/var/log/app.log", "/var/log/app.log"]),
        ((Arg(1) & 0x40) >> 6 == 1, ["/var/log/app.log", "/var/log/app.log"]),
        (Arg(3) - 20 == (1 << 64) - 11, ["/etc/motd", "/etc/motd"]),
        ((Arg(3).i64 - 20) * 2 == -22, ["/etc/motd", "/etc/motd"]),
        (-Arg(3) == -9, ["/etc/motd", "/etc/motd"]),
        (~Arg(3) == (1 << 64) - 10, ["/etc/motd", "/etc/motd"]),
        (Arg(3) * 3 % 10 == 7, ["/etc/motd", "/etc/motd"]),
        (Cstr(Arg(0)).contains("app") & ~(Arg(3) == 17), ["/opt/app/data.db", "/var/log/app.log"]),
        (Filter.ring(0) & Filter.vcpu(0) & Filter.every(3), ["/opt/app/app.conf", "/etc/motd"]),
        ((Arg(1) == 0) & Filter.every(3), ["/opt/app/app.conf", "/etc/motd"]),
        (Filter.once() | (Arg(1) == 65), ["/opt/app/app.conf", "/var/log/app.log"]),
    ],
    ids=repr,
)
def test_a_filter_lets_the_right_hits_pass(where: Filter, expected: list[str]) -> None:
    assert opened(where, 2) == expected


def test_a_filter_on_the_root_lets_one_process_pass() -> None:
    roots: dict[str, int] = {}
    with vmitap.attach("demo") as vm:

        @vm.breakpoint("open_file")
        def each(hit: Hit) -> None:
            roots.setdefault(hit.vm.read_cstr(hit.args[0]), hit.regs.cr3)

        vm.run(timeout=20, max_hits=12)
    one, other = roots["/etc/update.conf"], roots["/opt/app/app.conf"]
    assert one != other
    assert opened(Filter.root(one), 2) == ["/etc/update.conf", "/etc/update.conf"]
    assert opened(Filter.root(other), 2) == ["/opt/app/app.conf", "/opt/app/data.db"]
    assert "/etc/update.conf" not in opened(~Filter.root(one), 6)


def test_a_filter_on_the_vcpu_tells_vcpus_apart() -> None:
    seen: list[int] = []
    with vmitap.attach("demo", vcpus=2) as vm:
        vm.breakpoint("open_file", lambda hit: seen.append(hit.vcpu))
        wheres = (Filter.vcpu(0), Filter.vcpu(1), ~Filter.vcpu(1), Filter.vcpu(2))
        points = [vm.breakpoint("open_file", where=where) for where in wheres]
        while not 10 < seen.count(1) < len(seen) - 10:
            vm.run(timeout=20, max_hits=10)
        zero, one = seen.count(0), seen.count(1)
        assert [point.stats.hits for point in points] == [zero, one, zero, 0]
        assert [point.stats.filtered for point in points] == [one, zero, one, zero + one]


def test_the_text_of_a_filter_is_the_filter() -> None:
    for text, expected in [
        ("Cstr(Arg(0)) == '/etc/motd'", ["/etc/motd"]),
        ("'/etc/motd' == Cstr(Arg(0))", ["/etc/motd"]),
        ("'alice' in Cstr(Arg(0), max=64) and not Filter.ring(3)", ["/home/alice/notes.txt"]),
        ("60 < Arg(1).u32 <= 65 or Arg(3) in (9, 10)", ["/etc/motd"]),
        ("Arg(1) in range(60, 2 * 33)", ["/var/log/app.log"]),
        ("'app' not in Cstr(Arg(0)) and 'data' not in Cstr(Arg(0))", ["/etc/update.conf"]),
        ("0xfff < Reg.rdi and Mem(Reg.rsp) > 5 and (Cstr(Arg(0)).endswith('.db') | Filter.ring(2))", ["/opt/app/data.db"]),
    ]:
        where = Filter.parse(text)
        assert opened(where, 1) == expected, text
        assert repr(parse_filter(repr(where))) == repr(where)


def test_filtered_hits_are_counted_and_never_enter_python() -> None:
    with vmitap.attach("demo", cmdline="mode=calls calls=20000 check=0") as vm:
        bp = vm.breakpoint("open_file", lambda hit: None, where=Arg(1) >> 32 == 1_000_000)
        result = vm.run(timeout=60)
        assert (result.reason, result.hits, result.filtered, result.py_calls) == ("idle", 0, 20_000, 0)
        assert (bp.stats.hits, bp.stats.filtered, bp.stats.filter_faults, bp.stats.py_calls) == (0, 20_000, 0, 0)


def test_a_filter_over_unmapped_memory_keeps_the_hit_back_and_is_counted(vm: Vm) -> None:
    for where in (Cstr(Arg(1) + 16) == "x", ~(Mem(Arg(1)) == 5), Mem((1 << 64) - 4) == 0):
        bp = vm.breakpoint("open_file", where=where & (Arg(1) == 0))
        control = vm.breakpoint("open_file", key="control")
        vm.run(timeout=20, max_hits=6)
        control.remove()
        assert bp.stats.hits == 0
        assert 0 < bp.stats.filter_faults <= bp.stats.filtered
        bp.remove()


def test_what_decides_without_the_unmapped_memory_decides(vm: Vm) -> None:
    unknown = Mem(0x10) == 0
    either = vm.breakpoint("open_file", where=unknown | (Arg(0) != 0), key="either")
    both = vm.breakpoint("open_file", where=~(unknown & (Arg(0) == 0)), key="both")
    vm.run(timeout=20, max_hits=4)
    assert either.stats.hits == both.stats.hits == 2


def test_filters_of_several_breakpoints_at_one_address_are_their_own(vm: Vm) -> None:
    called: list[str] = []
    vm.breakpoint("open_file", lambda hit: called.append("motd"), where=Cstr(Arg(0)) == "/etc/motd")
    vm.breakpoint("open_file", lambda hit: called.append("db"), where=Cstr(Arg(0)).endswith(".db"))
    vm.breakpoint("open_file", lambda hit: called.append("none"), where=Arg(0) == 0)
    vm.run(timeout=20, max_hits=3)
    assert called == ["db", "motd", "motd"]


def test_what_a_filter_counts_is_counted_for_each_breakpoint(vm: Vm) -> None:
    first, second = vm.insert_many(["open_file", "close_file"], where=Filter.once())
    vm.breakpoint("open_file", key="control")
    vm.run(timeout=20, max_hits=20)
    assert (first.stats.hits, second.stats.hits) == (1, 1)
    assert min(first.stats.filtered, second.stats.filtered) > 0


def test_rates_are_kept(vm: Vm) -> None:
    with vmitap.attach("demo", cmdline="mode=calls calls=1000000000000 check=0") as busy:
        bp = busy.breakpoint("open_file", where=Filter.rate(100))
        elapsed = busy.run(timeout=0.5).elapsed
        assert bp.stats.hits in range(100, 100 * (int(elapsed) + 1) + 1)
        assert bp.stats.filtered > 100


def test_arguments_are_found_by_the_convention_that_was_given(vm: Vm) -> None:
    slots: dict[tuple[str, int], int] = {}

    def remember(hit: Hit) -> None:
        for abi, number, offset in [("sysv", 6, 8), ("sysv", 8, 24), ("ms", 4, 0x28), ("ms", 5, 0x30)]:
            slots[abi, number] = hit.vm.read_u64(hit.regs.rsp + offset)
        slots["ms", 0], slots["ms", 1], slots["ms", 3] = hit.regs.rcx, hit.regs.rdx, hit.regs.r9
        slots["sysv", 0], slots["sysv", 3], slots["sysv", 5] = hit.regs.rdi, hit.regs.rcx, hit.regs.r9

    with vmitap.attach("demo") as guest:
        guest.breakpoint("open_file", remember)
        guest.run(timeout=20, max_hits=1)
    for (abi, number), value in slots.items():
        with vmitap.attach("demo", abi=abi) as guest:  # type: ignore[arg-type]
            here = guest.breakpoint("open_file", where=(Arg(number) == value) & Filter.every(10**9), key="session")
            other = guest.breakpoint("open_file", where=(Arg(number) == value) & Filter.every(10**9), abi=abi, key="own")  # type: ignore[arg-type]
            guest.run(timeout=20, max_hits=2)
            assert (here.stats.hits, other.stats.hits, here.stats.filtered) == (1, 1, 0), (abi, number)
    with pytest.raises(InvalidArgumentError, match="neither"):
        vm.breakpoint("open_file", abi="fastcall")  # type: ignore[arg-type]


def test_watches_have_filters_too(vm: Vm) -> None:
    address = vm.symbol("files")
    every = vm.watch(address, 4096, Access.RW, where=Filter.every(2))
    never = vm.watch(address, 4096, Access.RW, where=Reg.rip == 0, key="never")
    vm.run(timeout=20, max_hits=5)
    assert (every.stats.hits, every.stats.filtered) == (5, 4)
    assert (never.stats.hits, never.stats.filtered) == (0, 9)


# --- predicates ---


def test_only_a_predicate_enters_python_and_only_where_it_matters(vm: Vm) -> None:
    asked: list[str] = []

    def is_motd(hit: Hit) -> bool:
        asked.append(hit.vm.read_cstr(hit.args[0]))
        return asked[-1] == "/etc/motd"

    bp = vm.breakpoint("open_file", where=Cstr(Arg(0)).startswith("/etc/") & Filter.predicate(is_motd))
    result = vm.run(timeout=20, max_hits=1)
    assert asked == ["/etc/update.conf", "/etc/motd"]
    assert (result.hits, result.py_calls, bp.stats.py_calls) == (1, 2, 2)
    assert bp.stats.filtered == result.filtered == 3


def test_a_handler_is_called_after_its_predicate_said_yes(vm: Vm) -> None:
    order: list[object] = []

    def writes(hit: Hit) -> bool:
        order.append("asked")
        return hit.args[1] != 0

    vm.breakpoint("open_file", lambda hit: order.append(hit.args[1]), where=Filter.predicate(writes))
    vm.run(timeout=20, max_hits=1)
    assert order == ["asked"] * 6 + [65]


def test_predicates_compose_with_everything_else(vm: Vm) -> None:
    yes, no = Filter.predicate(lambda hit: True), Filter.predicate(lambda hit: False)
    passing = [yes, ~no, yes & ~no, no | yes, ~(yes & no), (no & yes) | yes]
    keeping = [no, ~yes, yes & no, no | no, ~(yes | no)]
    points = [vm.breakpoint("open_file", where=where, key=n) for n, where in enumerate(passing + keeping)]
    vm.run(timeout=20, max_hits=len(passing))
    assert [bp.stats.hits for bp in points] == [1] * len(passing) + [0] * len(keeping)
    assert [bp.stats.filtered for bp in points] == [0] * len(passing) + [1] * len(keeping)


def test_what_a_predicate_raises_is_a_handler_error_and_the_hit_does_not_count(vm: Vm) -> None:
    def fails(hit: Hit) -> bool:
        msg = "no idea"
        raise ValueError(msg)

    bp = vm.breakpoint("open_file", where=Filter.predicate(fails))
    for _ in range(2):
        with pytest.raises(vmitap.HandlerError, match="no idea"):
            vm.run(timeout=20)
    assert (bp.stats.hits, bp.stats.filtered) == (0, 2)


def test_a_predicate_returns_a_bool(vm: Vm) -> None:
    vm.breakpoint("open_file", where=Filter.predicate(lambda hit: 1))  # type: ignore[arg-type, return-value]
    with pytest.raises(vmitap.HandlerError, match="returns True or False"):
        vm.run(timeout=20)


def test_a_predicate_that_holds_its_session_does_not_keep_it_alive() -> None:
    class Mark:
        pass

    mark = Mark()
    alive = weakref.ref(mark)
    vm = vmitap.attach("demo")

    def predicate(hit: Hit, kept: tuple[object, ...] = (vm, mark)) -> bool:
        return hit in kept

    vm.breakpoint("open_file", where=Filter.predicate(predicate))
    del vm, mark, predicate
    gc.collect()
    assert alive() is None


# --- what is refused, and what is shown ---


@pytest.mark.parametrize(
    ("build", "place"),
    [
        (lambda: bool(Arg(0)), "Arg(0) has no truth value"),
        (lambda: bool(Arg(0) > 5), "Arg(0) > 5 has no truth value"),
        (lambda: (Arg(0) > 5) and (Arg(1) > 5), "Arg(0) > 5 has no truth value: use & | ~ instead of `and`"),
        (lambda: not Filter.ring(3), "Filter.ring(3) has no truth value"),
        (lambda: 1 < Arg(0) < 5, "Arg(0) > 1 has no truth value"),
        (lambda: Arg(0) in (1, 2), "Arg(0) == 1 has no truth value"),
        (lambda: "a" in Cstr(Arg(0)), "Cstr(Arg(0), max=256): Python's `in` cannot be part of a filter; use .contains('a')"),
        (lambda: Arg(0) == "a", "Arg(0) == 'a': a number is needed, not str"),
        (lambda: Arg(0) > 1.5, "Arg(0) > 1.5: a number is needed, not float"),  # type: ignore[operator]
        (lambda: Arg(0) + b"a", "Arg(0) + b'a': a number is needed, not bytes"),  # type: ignore[operator]
        (lambda: Arg(0) == True, "Arg(0) == True: a number is needed, not bool"),  # noqa: E712
        (lambda: Arg("rdi"), "Arg('rdi'): a number is needed, not str"),  # type: ignore[arg-type]
        (lambda: Arg(0) > 5 & Filter.ring(3), "5 & Filter.ring(3): a Filter is needed on both sides; put comparisons in parentheses"),
        (lambda: Filter.ring(3) & Arg(0), "Filter.ring(3) & Arg(0): a Filter is needed on both sides, not Arg"),  # type: ignore[operator]
        (lambda: Filter.ring(3) | True, "Filter.ring(3) | True: a Filter is needed on both sides, not bool"),  # type: ignore[operator]
        (lambda: Cstr(Arg(0)) == 5, "Cstr(Arg(0), max=256) == 5: bytes or a str are needed, not int"),
        (lambda: Cstr(Arg(0)) == Cstr(Arg(1)), "Cstr(Arg(0), max=256) == Cstr(Arg(1), max=256): bytes or a str are needed, not Cstr"),
        (lambda: Utf16(Arg(0)) == b"a", "Utf16(Arg(0), max=512) == b'a': a str is needed, not bytes"),
        (lambda: Bytes(Arg(0), 1) == "a", "Bytes(Arg(0), 1) == 'a': bytes are needed, not str"),
        (lambda: Cstr(Filter.ring(3)), "Cstr(Filter.ring(3), max=256): a number is needed, not Filter"),  # type: ignore[arg-type]
        (lambda: Mem("open_file"), "Mem('open_file', 8): a number is needed, not str"),  # type: ignore[arg-type]
        (lambda: Filter.predicate(5), "Filter.predicate(5): a function is needed"),  # type: ignore[arg-type]
        (lambda: Arg(0).is_in(("a",)), "Arg(0).is_in(('a',)): a number is needed, not str"),  # type: ignore[arg-type]
        (lambda: Filter.every(1.5), "Filter.every(1.5): a number is needed, not float"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_type_is_a_type_error_when_the_filter_is_built_with_the_place(build: Callable[[], object], place: str) -> None:
    with pytest.raises(TypeError) as caught:
        build()
    assert str(caught.value).startswith(place)


@pytest.mark.parametrize(
    ("build", "place"),
    [
        (lambda: Arg(64), r"Arg\(64\): arguments are numbered from 0 to 63"),
        (lambda: Arg(-1), r"Arg\(-1\)"),
        (lambda: Arg(0) == -1, r"Arg\(0\) == -1: the left side lies between 0 and \d+; with a sign it is Arg\(0\).i64"),
        (lambda: Arg(0).i32 + 1 << 1 == 1 << 63, "lies between"),
        (lambda: Arg(0) == 1 << 64, "does not fit into 64 bits"),
        (lambda: Arg(0).is_in((1 << 64,)), "does not fit"),
        (lambda: Arg(0).is_in(range(0, 10**12, 2)), "more than 4096"),
        (lambda: Arg(0).i64 // 2, "only numbers without a sign are divided"),
        (lambda: Mem(Arg(0), 3), r"Mem\(Arg\(0\), 3\)"),
        (lambda: Cstr(Arg(0), max=0), "max=0"),
        (lambda: Cstr(Arg(0), max=1 << 30), "no length of 1 to 65536"),
        (lambda: Utf16(Arg(0), max=7), "no length"),
        (lambda: Cstr(Arg(0), max=4) == "long", "never true"),
        (lambda: Cstr(Arg(0)) == "a\0b", "ends at a zero"),
        (lambda: Bytes(Arg(0), 4) == b"abc", "never true"),
        (lambda: Cstr(Arg(0), max=5000).contains("a"), "no more than 4096"),
        (lambda: Filter.ring(4), "0 to 3"),
        (lambda: Filter.vcpu(-1), "no such vCPU"),
        (lambda: Filter.every(0), "none"),
        (lambda: Filter.rate(0), "a rate lies between"),
        (lambda: Filter.rate(float("nan")), "a rate lies between"),
    ],
)
def test_a_wrong_value_is_refused_when_the_filter_is_built_with_the_place(build: Callable[[], object], place: str) -> None:
    with pytest.raises(InvalidArgumentError, match=place):
        build()


def test_a_wrong_register_is_refused_when_the_filter_is_built() -> None:
    with pytest.raises(AttributeError, match="raxx"):
        Reg.raxx  # type: ignore[attr-defined]  # noqa: B018


def test_what_is_no_filter_is_refused_by_the_breakpoint_and_nothing_is_planted(vm: Vm) -> None:
    for wrong in (Arg(0), True, "Arg(0) > 5", lambda hit: True):
        with pytest.raises(TypeError, match=r"where is a vmitap\.Filter"):
            vm.breakpoint("open_file", where=wrong)  # type: ignore[arg-type]
    long = Filter.ring(0)
    for _ in range(400):
        long &= Arg(0) != 5
    nested: Number = Reg.rsp
    for _ in range(20):
        nested = Arg(0) + (Arg(1) * nested)
    for where in (long, nested == 0):
        with pytest.raises(InvalidArgumentError, match=r"where: .* in "):
            vm.breakpoint("open_file", where=where)
    assert len(vm.breakpoints) == 0


def test_filters_do_not_change() -> None:
    with pytest.raises(AttributeError):
        Filter.ring(3)._text = "x"  # type: ignore[misc]


def test_a_filter_prints_as_it_is_written() -> None:
    for where in [
        ~((Arg(1) + 5 > Reg.rax) & Filter.root(0x1000)) | Filter.rate(10),
        ((3 - Arg(0)) << 2 == 0x10000) & Cstr(Mem(Reg.rdi + 8), max=10).startswith(b"\xff"),
        Utf16(0x1000).contains("ü") | (Bytes(Arg(0).u32, 3) != b"abc"),
        Filter.vcpu(1) & Filter.every(7) & Filter.once() | Arg(2).is_in((1, 2)),
    ]:
        assert repr(eval(repr(where))) == repr(where)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "is no expression"),
        ("Arg(1)", "is no condition"),
        ("Arg(1) ==", "is no expression"),
        ("Arg(1) == foo", "'foo' at column 11"),
        ("__import__('os').system('true')", "at column 1"),
        ("Filter.predicate(print)", "at column 1"),
        ("Filter.parse('1')", "no such function"),
        ("Arg.__init__.__globals__", "column 1"),
        ("Reg.__class__ == 5", "no such register"),
        ("Arg(0)._code == 5", "column 1"),
        ("(lambda: 5)() == 5", "column"),
        ("[x for x in (1,)] == 5", "column 1"),
        ("Arg(1) ** 2 == 4", "operator"),
        ("2 ** 999999 < Arg(0)", "operator"),
        ("1 << 99999999 < Arg(0)", "column"),
        ("Arg(0) is 5", "`is`"),
        ("Arg(1) and Filter.ring(3)", "a condition is needed"),
        ("'a' in Arg(0)", "`in` needs"),
        ("Arg(0, **{})  == 1", "not part of a filter"),
        ("Arg(*[0]) == 1", "column"),
        ("Arg(99) == 1", "0 to 63"),
        ("Arg(0) == -1", "lies between"),
        ("Cstr(Arg(0), maximum=5) == 'a'", "maximum"),
        ("Arg(0) in range(0, 10000000000000, 2)", "more than 4096"),
        ("f'{Arg(0)}' == 1", "column 1"),
        ("(" * 500 + "Arg(0)" + ")" * 500 + " == 1", ""),
        ("~" * 5000 + "Filter.ring(3)", ""),
        ("Arg(0) == " + "9" * 9000, ""),
        ("Arg(0) == 1 or " * 2000 + "Arg(0) == 1", "longer than"),
        ("\0", ""),
    ],
)
def test_text_that_is_no_filter_is_refused_with_the_place_and_nothing_is_executed(text: str, place: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Filter.parse(text)
    assert caught.value.what in {"where", "expression", "n", "max", "values"}
    assert place in str(caught.value)
