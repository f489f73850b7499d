"""Whichever call of the driver fails, wherever a controller raises: nothing has changed, the error says what it was, a retry does all."""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import Access
from vmitap.testing import Breakpoint, MockVm, mock

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

MEMORY = 4 << 20
# A slot of the topmost table that nothing uses: what is mapped there is mapped for the test alone.
SLOT = 224
ERRNOS = itertools.cycle([errno.EPERM, errno.ENOMEM, errno.EBUSY, errno.EINVAL, errno.ENODEV, errno.EIO])


class World:
    """A guest that stands still, with everything that keeps books of breakpoints."""

    def __init__(self, controller: type[Raising] | None = None) -> None:
        self.mock = mock(vcpus=2, memory=MEMORY)
        vm = self.vm = self.mock.vm
        self.core, self.root, self.view = vmitap.VmiCore(vm), vm.registers().root, vm.views.tap
        self.raising = controller(vm) if controller else None
        planter = self.raising or vmitap.BreakpointController(vm)
        self.manager = vmitap.BreakpointManager(vm, planter)
        self.tables = vmitap.PageTableMonitor(vm, None if self.raising else planter)  # type: ignore[arg-type]
        self.made: list[vmitap.Breakpoint] = []
        self.events: list[vmitap.PageTableEvent] = []
        self.event: vmitap.VmiEvent | None = None
        code = range(vm.translate("text_start") >> 12, (vm.translate("boot_copy") >> 12) + 2)
        # Page tables are made from the other end.
        self.pages = [*code, *range((MEMORY >> 12) - 24, MEMORY >> 12)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.mock.__exit__(kind, error, traceback)

    def alias(self, symbol: str) -> int:
        """Where a symbol is once more while `map_alias` holds."""
        return SLOT << 39 | self.vm.symbol(symbol) & ((1 << 39) - 1)

    def map_alias(self, on: bool) -> None:
        own = self.root + (self.vm.symbol("open_file") >> 39) % 512 * 8
        self.vm.write_pa(self.root + SLOT * 8, self.vm.read_pa(own, 8) if on else bytes(8))

    def insert(self, symbol: str | int, view: vmitap.View | None = None, **more: object) -> bool:
        address = symbol if isinstance(symbol, int) else self.vm.symbol(symbol)
        return self.manager.insert(address, self.root, view or self.view, **more)  # type: ignore[arg-type]

    def managed(self) -> list[tuple[object, ...]]:
        return sorted((each.address, each.view.id, str(each.key), each.pa or 0, each.is_global) for each in self.manager)

    def access(self, pages: range | list[int]) -> dict[tuple[int, int], Access]:
        of = {(view.id, gfn): self.core.memory_access(gfn, view) for view in self.vm.views for gfn in pages}
        return {at: access for at, access in of.items() if access != Access.RWX}

    def state(self) -> dict[str, object]:
        vm = self.vm
        return {
            "memory": vm.read_pa(0, MEMORY),
            "access": self.access(self.pages),
            "frames": self.core.frames_in_use,
            "views": [view.id for view in vm.views],
            "of": [vm.views.of(vcpu).id for vcpu in (0, 1)],
            "registers": [vm.registers(vcpu) for vcpu in (0, 1)],
            "breakpoints": [(bp.address, bp.state, bp.key, bp.tag, bp.stats.hits) for bp in vm.breakpoints],
            "made": [bp.state for bp in self.made],
            "managed": self.managed(),
            "monitored": (len(self.tables), self.tables.tables),
        }


def assert_same(found: dict[str, object], wanted: dict[str, object]) -> None:
    different = {key for key in wanted if found[key] != wanted[key]}
    assert {key: (found[key], wanted[key]) for key in different - {"memory"}} == {}
    assert "memory" not in different


def failure(kind: type[BaseException], work: Callable[[], object]) -> BaseException | None:
    """What `work` raises of that kind."""
    try:
        work()
    except kind as error:
        return error
    return None


def assert_told(error: BaseException | None, guest: MockVm, number: int) -> None:
    """The error is of the call that failed."""
    assert isinstance(error, vmitap.DriverError)
    assert (error.op, error.errno) == (guest.failed_call, number)


def each_call_failing(make: Callable[[], World], do: Callable[[World], object]) -> int:
    """Fails each driver call of `do` in turn; returns how many there are."""
    with make() as world:
        do(world)
        wanted = world.state()
    for n, number in zip(itertools.count(1), ERRNOS, strict=False):
        with make() as world:
            before = world.state()
            world.mock.fail_nth(n, number)
            error = failure(vmitap.DriverError, lambda: do(world))
            if world.mock.failed_call is None:
                assert error is None
                world.mock.fail_nth(0)
                assert_same(world.state(), wanted)
                return n - 1
            assert_told(error, world.mock, number)
            world.mock.fail_nth(0)
            assert_same(world.state(), before)
            do(world)
            assert_same(world.state(), wanted)
    raise AssertionError


def empty() -> World:
    return World()


def tapped() -> World:
    """Breakpoints on two pages, one that waits, one that is disabled, a watch and a monitor; a second view."""
    world = World()
    vm = world.vm
    vm.views.create()
    world.made = [
        vm.breakpoint("open_file", key="a", tag=1),
        vm.breakpoint("boot_copy", key="b"),
        vm.breakpoint(world.alias("open_file"), key="c"),
        vm.breakpoint("read_file", key="d"),
        vm.watch(world.mock.put(bytes(8)), 8, Access.W),
        vm.monitor_events(cr="cr3", msr=[0x10, 0xC000_0082], cpuid=True),
        vm.monitor_events(cr=["cr3", "cr4"]),
    ]
    world.made[3].disable()
    world.made[6].disable()
    return world


def waiting() -> World:
    world = World()
    world.made = [world.vm.breakpoint(world.alias("open_file"))]
    return world


def second(world: World) -> vmitap.View:
    return list(world.vm.views)[-1]


SESSION: dict[str, tuple[Callable[[], World], Callable[[World], object], int]] = {
    "breakpoint": (empty, lambda w: w.made.append(w.vm.breakpoint("open_file", key="k", tag="t")), 5),
    "breakpoint that waits": (empty, lambda w: w.made.append(w.vm.breakpoint(w.alias("open_file"))), 5),
    "breakpoint in a view": (tapped, lambda w: w.vm.breakpoint("open_file", view=second(w)), 5),
    "insert_many": (empty, lambda w: w.vm.insert_many(["open_file", "read_file", "boot_copy", w.alias("open_file")]), 10),
    "watch": (empty, lambda w: w.vm.watch("boot_copy", 8, Access.RW), 2),
    "monitor_events": (empty, lambda w: w.vm.monitor_events(cr=["cr0", "cr3"], msr=[1, 2], cpuid=True), 5),
    "disable": (tapped, lambda w: w.made[0].disable(), 2),
    "disable what waits": (waiting, lambda w: w.made[0].disable(), 2),
    "disable a watch": (tapped, lambda w: w.made[4].disable(), 1),
    "disable a monitor": (tapped, lambda w: w.made[5].disable(), 3),
    "enable": (tapped, lambda w: w.made[3].enable(), 5),
    "enable a monitor": (tapped, lambda w: w.made[6].enable(), 1),
    "remove": (tapped, lambda w: w.made[1].remove(), 2),
    "remove a watch": (tapped, lambda w: w.made[4].remove(), 1),
    "remove a monitor": (tapped, lambda w: w.made[5].remove(), 3),
    "remove_many": (tapped, lambda w: w.vm.breakpoints.remove_many(w.made), 8),
    "write": (tapped, lambda w: w.vm.write("open_file", b"\x90" * 40), 3),
    "write_pa": (tapped, lambda w: w.vm.write_pa(w.vm.translate("boot_copy") + 1, b"\x90" * 5000), 3),
    "write_u64": (tapped, lambda w: w.vm.write_u64("boot_copy", 7), 3),
    "a view is made": (tapped, lambda w: w.vm.views.create(Access.RX), 2),
    "a view is destroyed": (tapped, lambda w: w.vm.views.destroy(second(w)), 2),
    "a view is switched to": (tapped, lambda w: w.vm.views.switch_to(second(w)), 1),
    "set_registers": (tapped, lambda w: w.vm.set_registers(1, rax=7), 1),
    "inject": (tapped, lambda w: w.vm.inject(3, vcpu=1), 1),
}


@pytest.mark.parametrize("name", SESSION)
def test_whichever_call_of_an_operation_fails_nothing_has_changed_and_a_retry_does_it(name: str) -> None:
    make, do, least = SESSION[name]
    calls = each_call_failing(make, do)
    assert calls >= least, calls


def managed(controller: type[Raising] | None = None) -> World:
    """Two owners at one place, one of them in two views; one on another page; one that waits in both views, whose page came and is told."""
    world = World(controller)
    other = world.vm.views.create()
    assert world.insert("open_file", key="b", is_global=True)
    for view in (world.view, other):
        assert world.insert("open_file", view, key="a", is_global=True)
        assert world.insert(world.alias("boot_copy"), view, key="alias")
    assert world.insert("boot_copy", key="a")
    assert world.tables.monitor(world.alias("boot_copy"), world.root) is None
    world.map_alias(True)
    world.events = world.tables.process()
    assert [event.kind for event in world.events] == ["page-in"]
    world.mock.script([Breakpoint("open_file")])
    world.event = world.vm.wait_event(timeout=1)
    assert world.event is not None
    return world


def planted(controller: type[Raising] | None = None) -> World:
    """The same, with what waited planted, and its page gone again."""
    world = managed(controller)
    assert world.manager.handle_page_table_events(world.events) == 2
    world.map_alias(False)
    world.events = world.tables.process()
    assert [event.kind for event in world.events] == ["page-out"]
    return world


def by_event(world: World) -> object:
    assert world.event is not None
    return world.manager.remove_by_event(world.event, "a")


MANAGER: dict[str, tuple[Callable[..., World], Callable[[World], object], int]] = {
    "insert": (managed, lambda w: w.insert("read_file", key="new"), 3),
    "insert on another page": (managed, lambda w: w.insert("boot_copy", second(w), key="new"), 4),
    "insert_with_hint": (
        managed,
        lambda w: w.manager.insert_with_hint(0x1234_5000, w.root, w.view, w.vm.translate("boot_copy") + 9, key="new"),
        1,
    ),
    "remove": (managed, lambda w: w.manager.remove(w.vm.symbol("boot_copy"), w.root, w.view, key="a"), 2),
    "remove_with_hint": (planted, lambda w: w.manager.remove_with_hint(w.alias("boot_copy"), w.root, second(w), None, key="alias"), 2),
    "remove_by_event": (managed, by_event, 2),
    "remove_by_view": (planted, lambda w: w.manager.remove_by_view(second(w)), 2),
    "page-in": (managed, lambda w: w.manager.handle_page_table_events(w.events), 4),
    "page-out": (planted, lambda w: w.manager.handle_page_table_events(w.events), 2),
}


@pytest.mark.parametrize("name", MANAGER)
def test_whichever_call_of_a_managers_operation_fails_nothing_has_changed_and_a_retry_does_it(name: str) -> None:
    make, do, least = MANAGER[name]
    calls = each_call_failing(make, do)
    assert calls >= least, calls


TABLES: dict[str, tuple[Callable[..., World], Callable[[World], object], int]] = {
    "monitor": (empty, lambda w: w.tables.monitor(w.vm.symbol("open_file"), w.root), 10),
    "monitor what is not mapped": (managed, lambda w: w.tables.monitor(0x1234_5000, w.root), 1),
    "unmonitor": (managed, lambda w: w.tables.unmonitor(w.alias("boot_copy"), w.root), 1),
}


@pytest.mark.parametrize("name", TABLES)
def test_whichever_call_of_a_page_table_monitor_fails_nothing_has_changed_and_a_retry_does_it(name: str) -> None:
    make, do, least = TABLES[name]
    calls = each_call_failing(make, do)
    assert calls >= least, calls


def test_no_event_is_lost_whichever_call_fails_while_tables_are_looked_at() -> None:
    """Of two pages the first is looked up before a call for the second fails: what was found out is told by the next call."""
    symbols = ("open_file", "boot_copy", "text_end")
    for n in itertools.count(1):
        with World() as world:
            for symbol in symbols:
                world.tables.monitor(world.alias(symbol), world.root)
            world.map_alias(True)
            world.mock.fail_nth(n, errno.ENOMEM)
            events: list[vmitap.PageTableEvent] = []
            error = failure(vmitap.DriverError, lambda: events.extend(world.tables.process()))  # noqa: B023
            if world.mock.failed_call is not None:
                assert_told(error, world.mock, errno.ENOMEM)
                events = world.tables.process()
            found = {(event.kind, event.address, event.pa) for event in events}
            assert len(found) == len(events)
            world.mock.fail_nth(0)
            assert found == {("page-in", world.alias(symbol), world.vm.translate(symbol)) for symbol in symbols}, f"call {n}"
            assert world.tables.process() == []
        if error is None:
            assert n > 5
            return


@pytest.mark.parametrize("what", ["manager", "tables"])
def test_clear_takes_out_what_it_can_and_a_retry_does_the_rest(what: str) -> None:
    for n in itertools.count(1):
        with planted() as world:
            books: vmitap.BreakpointManager | vmitap.PageTableMonitor = world.manager if what == "manager" else world.tables
            world.mock.fail_nth(n, errno.EBUSY)
            error = failure(vmitap.UndoFailedError, books.clear)
            if world.mock.failed_call is None:
                assert (error, n > 1) == (None, True)
                return
            assert isinstance(error, vmitap.UndoFailedError)
            assert_told(error.cause, world.mock, errno.EBUSY)
            world.mock.fail_nth(0)
            assert len(books) > 0
            books.clear()
            assert len(books) == 0
            world.manager.clear()
            world.tables.clear()
            assert (world.access(range(MEMORY >> 12)), world.core.frames_in_use) == ({}, 0)


def test_whichever_call_fails_while_an_event_is_handled_it_is_told_and_the_event_is_answered() -> None:
    for n in itertools.count(1):
        with World() as world:
            seen: list[int] = []
            world.vm.breakpoint("open_file", lambda hit, seen=seen: seen.append(hit.vcpu))  # type: ignore[misc]
            world.mock.script([Breakpoint("open_file"), Breakpoint("open_file", vcpu=1)])
            world.mock.fail_nth(n, errno.EAGAIN)
            error = failure(vmitap.DriverError, world.mock.run)
            if world.mock.failed_call is not None:
                assert_told(error, world.mock, errno.EAGAIN)
                world.mock.run()
            assert (sorted(answer.vcpu for answer in world.mock.answers), world.mock.waiting) == ([0, 1], 0)
            if world.mock.failed_call is None:
                assert (error, seen, n > 4) == (None, [0, 1], True)
                return


# --- controllers of one's own ---


class Raising:
    """A controller that passes everything on to one of ours, but raises at a call that it is told."""

    def __init__(self, vm: vmitap.Vm) -> None:
        self.inner = vmitap.BreakpointController(vm)
        self.left = 0
        self.error: type[BaseException] = ZeroDivisionError

    def _count(self) -> None:
        if self.left:
            self.left -= 1
            if not self.left:
                raise self.error("a controller that raises")

    def check_event(self, event: vmitap.VmiEvent, /) -> tuple[vmitap.View, int] | None:
        self._count()
        return self.inner.check_event(event)

    def insert_breakpoint(self, pa: int, view: vmitap.View, /) -> None:
        self._count()
        self.inner.insert_breakpoint(pa, view)

    def remove_breakpoint(self, pa: int, view: vmitap.View, /) -> None:
        self._count()
        self.inner.remove_breakpoint(pa, view)

    def monitor(self, gfn: int, view: vmitap.View, /) -> None:
        self._count()
        self.inner.monitor(gfn, view)

    def unmonitor(self, gfn: int, view: vmitap.View, /) -> None:
        self._count()
        self.inner.unmonitor(gfn, view)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("name", MANAGER)
def test_wherever_a_controller_raises_nothing_has_changed_and_a_retry_does_it(name: str, error: type[BaseException]) -> None:
    make, do, _ = MANAGER[name]
    with make(Raising) as world:
        do(world)
        wanted = world.state()
    for n in itertools.count(1):
        with make(Raising) as world:
            assert world.raising is not None
            before = world.state()
            world.raising.left, world.raising.error = n, error
            raised = failure(error, lambda: do(world))
            if world.raising.left > 0:
                assert (raised, n > 1) == (None, True)
                return
            assert str(raised) == "a controller that raises", f"call {n}"
            assert_same(world.state(), before)
            do(world)
            assert_same(world.state(), wanted)


def test_of_three_events_the_others_are_carried_out_where_a_controller_raises_and_a_retry_does_the_rest() -> None:
    symbols = ("open_file", "boot_copy", "text_start")

    def waiting() -> World:
        world = World(Raising)
        for symbol in symbols:
            assert world.insert(world.alias(symbol))
            world.tables.monitor(world.alias(symbol), world.root)
        world.map_alias(True)
        world.events = world.tables.process()
        assert len(world.events) == 3
        return world

    failed = set()
    for n in itertools.count(1):
        with waiting() as world:
            assert world.raising is not None
            world.raising.left = n
            if failure(ZeroDivisionError, lambda: world.manager.handle_page_table_events(world.events)):
                here = {each.address: each.pa for each in world.manager}
                [at] = [at for at, event in enumerate(world.events) if here[event.address] is None]
                failed.add(at)
                assert world.manager.handle_page_table_events(world.events) == 1
            done = world.raising.left > 0
            assert {each.address: each.pa for each in world.manager} == {event.address: event.pa for event in world.events}
            world.raising.left = 0
            world.manager.clear()
            assert world.core.frames_in_use == 0
        if done:
            assert failed == {0, 1, 2}
            return
