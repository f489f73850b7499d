"""What the bindings promise beyond their examples: threads, errors, lifetimes, pickling."""

from __future__ import annotations

import gc
import logging
import pickle
import threading
import time
import weakref
from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import Access, Arg, OnWrite, Reg, Verdict, VmiEventResponse
from vmitap.testing import Breakpoint as Int3
from vmitap.testing import mock

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmitap import Breakpoint, Hit, View, Vm, VmiEvent


def first_hit(vm: Vm, target: str = "open_file", **more: object) -> Hit:
    return next(vm.events(vm.breakpoint(target, **more), timeout=5))  # type: ignore[arg-type]


def for_ever(vm: Vm) -> None:
    """Makes the guest spin at the entry of a function: JMP to itself."""
    vm.write("open_file", b"\xeb\xfe")


# --- watches and writes ---


def test_a_watch_reports_accesses_before_they_happen(vm: Vm) -> None:
    watch = vm.watch("check_licence", 4, Access.X)
    hit = next(vm.events(watch, timeout=5))
    assert (hit.access, hit.address, hit.breakpoint) == (Access.X, watch.address, watch)


def test_a_watch_refuses_what_it_cannot_watch(vm: Vm) -> None:
    with pytest.raises(vmitap.InvalidArgumentError, match="length"):
        vm.watch("open_file", 0, Access.R)
    with pytest.raises(vmitap.InvalidArgumentError, match="access"):
        vm.watch("open_file", 4, Access.NONE)
    assert len(vm.breakpoints) == 0


def test_asking_needs_somebody_to_ask(vm: Vm) -> None:
    with pytest.raises(vmitap.InvalidArgumentError, match="ask"):
        vm.breakpoint("open_file", on_write=OnWrite.ASK)
    with pytest.raises(vmitap.InvalidArgumentError, match="ask"):
        vm.breakpoint("open_file", ask=lambda hit: OnWrite.DENY)
    vm.breakpoint("open_file", on_write=OnWrite.ASK, ask=lambda hit: OnWrite.DENY)


PHYSMAP = 0xFFFF_8880_0000_0000
"""Where the demo guest sees all of its memory (guests/demo/kernel.h)."""


def writes_itself(vm: Vm) -> int:
    """Makes the guest write 0x99 over a byte 0x40 behind the entry of a function, and spin; returns where."""
    target = vm.symbol("open_file+0x40")
    # The text is mapped read-only, but the guest has a writable map of all its memory:
    # MOV RAX, imm64; MOV BYTE PTR [RAX], 0x99; JMP to itself
    alias = (PHYSMAP + vm.translate(target)).to_bytes(8, "little")
    vm.write("open_file", b"\x48\xb8" + alias + b"\xc6\x00\x99\xeb\xfe")
    return target


@pytest.mark.parametrize("answer", [OnWrite.REAPPLY, OnWrite.REMOVE, OnWrite.DENY])
@pytest.mark.parametrize("of_session", [False, True])
def test_a_write_is_put_to_whoever_is_to_be_asked(answer: OnWrite, of_session: bool) -> None:
    asked: list[Hit] = []

    def ask(hit: Hit) -> OnWrite:
        asked.append(hit)
        return answer

    with vmitap.attach("demo", on_write=OnWrite.ASK if of_session else None) as vm:
        target = writes_itself(vm)
        before = vm.read_u8(target)
        bp = vm.breakpoint(target, on_write=None if of_session else OnWrite.ASK, ask=ask)
        result = vm.run(timeout=0.3)
        assert result.reason == "timeout"
        (hit,) = asked
        assert (hit.breakpoint, hit.address, hit.pa) == (bp, PHYSMAP + vm.translate(target), vm.translate(target))
        assert hit.access == Access.W
        assert hit.regs.rip == vm.symbol("open_file+10")
        assert (result.py_calls, bp.stats.py_calls, vm.stats.hidden_writes) == (1, 1, 1)
        assert vm.read_u8(target) == (before if answer is OnWrite.DENY else 0x99)
        assert bp.state == ("removed" if answer is OnWrite.REMOVE else "active")
        assert vm.stats.removed_by_write == (1 if answer is OnWrite.REMOVE else 0)


def test_what_is_no_policy_is_a_type_error_and_the_write_happens(vm: Vm) -> None:
    target = writes_itself(vm)
    vm.breakpoint(target, on_write=OnWrite.ASK, ask=lambda hit: OnWrite.ASK)
    with pytest.raises(vmitap.HandlerError, match="TypeError"):
        vm.run(timeout=5)
    vm.run(timeout=0.1)
    assert vm.read_u8(target) == 0x99


def test_the_vm_of_a_hit_means_its_vcpu() -> None:
    with vmitap.attach("demo", vcpus=2) as vm:
        vcpus: list[int] = []

        def handler(hit: Hit) -> None:
            assert hit.vm.registers().rip == vm.registers(hit.vcpu).rip == hit.address
            vcpus.append(hit.vcpu)

        vm.breakpoint("check_integrity", handler)
        vm.run(timeout=30, max_hits=1)
        assert vcpus


# --- iteration ---


def test_a_hit_is_handed_out_after_the_vcpu_went_on(vm: Vm) -> None:
    bp = vm.breakpoint("open_file")
    events = vm.events(bp, timeout=5)
    hits = [next(events) for _ in range(3)]
    assert [hit.breakpoint for hit in hits] == [bp] * 3
    with pytest.raises(vmitap.StaleContextError):
        _ = hits[0].vm
    assert events.result is None
    events.close()
    assert events.result is not None
    assert (events.result.reason, events.result.hits) == ("stopped", 3)


def test_what_there_is_no_room_for_is_counted(vm: Vm) -> None:
    vm.breakpoint("open_file")
    events = vm.events(queue=2)
    result = vm.run(timeout=5, max_hits=5)
    assert (events.lost, result.lost, vm.stats.lost) == (3, 3, 3)
    assert len({next(events).timestamp for _ in range(2)}) == 2


def test_every_owner_of_an_event_gets_its_hit(vm: Vm) -> None:
    both = [vm.breakpoint("open_file"), vm.breakpoint("open_file")]
    events = vm.events(timeout=5)
    assert [next(events).breakpoint for _ in range(2)] == both


# --- threads and signals ---


def test_stop_from_another_thread_ends_the_run(vm: Vm) -> None:
    for_ever(vm)
    threading.Timer(0.1, vm.stop).start()
    result = vm.run(timeout=30)
    assert result.reason == "stopped"
    assert 0.05 < result.elapsed < 1


def test_a_handler_that_sleeps_past_the_end_of_a_run_is_the_last_one_called(vm: Vm) -> None:
    calls: list[Hit] = []

    def slow(hit: Hit) -> None:
        calls.append(hit)
        time.sleep(0.2)

    for_ever(vm)
    vm.breakpoint("open_file", slow)
    assert vm.run(timeout=0.1).reason == "timeout"
    assert len(calls) == 1


def test_a_run_ends_in_time(vm: Vm) -> None:
    for_ever(vm)
    result = vm.run(timeout=0.2)
    assert result.reason == "timeout"
    assert 0.2 <= result.elapsed < 0.4


def test_other_threads_read_while_the_guest_runs(vm: Vm) -> None:
    read: list[bytes] = []
    errors: list[BaseException] = []

    def reader() -> None:
        try:
            end = time.monotonic() + 0.3
            while time.monotonic() < end:
                read.append(vm.read("open_file", 8))
            with pytest.raises(vmitap.SessionBusyError):
                vm.run()
        except BaseException as error:
            errors.append(error)
        finally:
            vm.stop()

    thread = threading.Thread(target=reader)

    def begin(hit: Hit) -> None:
        if not thread.ident:
            thread.start()

    for_ever(vm)
    vm.breakpoint("open_file", begin)
    result = vm.run(timeout=30)
    thread.join()
    assert (result.reason, errors) == ("stopped", [])
    # A thread that never rests takes the interpreter for 5 ms at a time.
    assert result.hits == result.py_calls > 5
    assert len(read) > 5
    assert len(set(read)) == 1


def test_detach_from_another_thread_ends_the_run(vm: Vm) -> None:
    done: list[bool] = []

    def detach() -> None:
        vm.detach()
        done.append(vm.closed)

    thread = threading.Thread(target=detach)

    def begin(hit: Hit) -> None:
        if not thread.ident:
            thread.start()

    for_ever(vm)
    vm.breakpoint("open_file", begin)
    assert vm.run(timeout=30).reason == "detached"
    thread.join(5)
    assert done == [True]


# --- lifetimes ---


def test_a_session_nobody_holds_is_ended_and_collected() -> None:
    class Mark:
        pass

    mark = Mark()
    vm = vmitap.attach("demo")

    def handler(hit: Hit, mark: Mark = mark, vm: Vm = vm) -> None:
        vm.symbol("open_file")

    bp = vm.breakpoint("open_file", handler, tag=mark)
    alive = weakref.ref(mark)
    del mark, handler, bp, vm
    gc.collect()
    assert alive() is None


def test_leaving_with_restores_the_guest_after_an_error() -> None:
    vm = vmitap.attach("demo")
    bp = vm.breakpoint("open_file")
    with pytest.raises(ZeroDivisionError), vm:
        raise ZeroDivisionError
    assert vm.closed
    assert bp.state == "removed"
    assert len(vm.breakpoints) == 0
    with pytest.raises(vmitap.StaleContextError):
        vm.read("open_file", 1)
    vm.stop()


def test_a_hit_survives_pickling(vm: Vm) -> None:
    hit = first_hit(vm, key=("k", 1), tag={"a": 1})
    copy: Hit = pickle.loads(pickle.dumps(hit))
    for name in ("vcpu", "args", "address", "pa", "symbol", "access", "view", "root", "ring", "key", "tag", "step", "timestamp", "hold"):
        assert getattr(copy, name) == getattr(hit, name), name
    assert copy.regs == hit.regs
    for use in (lambda: copy.vm, lambda: copy.breakpoint):
        with pytest.raises(vmitap.StaleContextError):
            use()
    error = pickle.loads(pickle.dumps(vmitap.HandlerError(hit, ValueError("x"))))
    assert str(error) == "the handler at open_file raised ValueError: x"


# --- arguments and errors ---


def test_many_are_inserted_or_none(vm: Vm) -> None:
    with pytest.raises(vmitap.TranslationError):
        vm.insert_many(["open_file", 1 << 47])
    with pytest.raises(vmitap.BreakpointConflictError):
        vm.insert_many(["open_file", "check_licence", "open_file"], key="one")
    assert (len(vm.breakpoints), vm.stats.shadow_frames) == (0, 0)
    assert len(vm.insert_many(["open_file", "open_file"])) == 2


def test_keys_that_are_equal_are_one_owner(vm: Vm) -> None:
    vm.breakpoint("open_file", key=1)
    with pytest.raises(vmitap.BreakpointConflictError):
        vm.breakpoint("open_file", key=1.0)
    vm.breakpoint("open_file", key="1")
    with pytest.raises(TypeError):
        vm.breakpoint("open_file", key=[])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda vm: vm.read(-1, 4), vmitap.InvalidArgumentError),
        (lambda vm: vm.read(1 << 64, 4), vmitap.InvalidArgumentError),
        (lambda vm: vm.read("open_file", -1), vmitap.InvalidArgumentError),
        (lambda vm: vm.read(1 << 47, 4), vmitap.TranslationError),
        (lambda vm: vm.read_pa(vm.memory.size - 1, 2), vmitap.OutOfRangeError),
        (lambda vm: vm.read_pa(0, 1 << 40), vmitap.OutOfRangeError),
        (lambda vm: vm.write_u8("boot_copy", 256), vmitap.InvalidArgumentError),
        (lambda vm: vm.registers(1), vmitap.VcpuNotFoundError),
        (lambda vm: vm.registers(-1), vmitap.VcpuNotFoundError),
        (lambda vm: vm.registers(1 << 70), vmitap.VcpuNotFoundError),
        (lambda vm: vm.set_registers(0, xyz=1), vmitap.InvalidArgumentError),
        (lambda vm: vm.set_registers(0, rax=-1), vmitap.InvalidArgumentError),
        (lambda vm: vm.run(timeout=-1), vmitap.InvalidArgumentError),
        (lambda vm: vm.run(max_hits=-1), vmitap.InvalidArgumentError),
        (lambda vm: vm.events(queue=0), vmitap.InvalidArgumentError),
        (lambda vm: vm.breakpoint("open_file", deadline=-1), vmitap.InvalidArgumentError),
        (lambda vm: vm.breakpoint("open_file", view=vm.views.default), vmitap.DefaultViewError),
        (lambda vm: vm.breakpoint("open_file", view=vmitap.View(99)), vmitap.ViewNotFoundError),
        (lambda vm: vm.breakpoint("open_file", handler=1), TypeError),
        (lambda vm: vm.breakpoint(1.5), TypeError),
        (lambda vm: vm.insert_many("open_file"), TypeError),
        (lambda vm: vm.watch("open_file", 1, 1), TypeError),
        (lambda vm: vm.memory.read_into(0, b"1234"), BufferError),
        (lambda vm: vm.inject(3, kind="other"), vmitap.InvalidArgumentError),
        (lambda vm: Verdict.step(0), vmitap.InvalidArgumentError),
        (lambda vm: vm.views.destroy(vm.views.default), vmitap.DefaultViewError),
        (lambda vm: vmitap.attach("xen:1"), vmitap.AttachError),
        (lambda vm: vmitap.attach("demo", vcpus=9), vmitap.InvalidArgumentError),
        (lambda vm: vmitap.attach("demo", vcpus=-1), vmitap.InvalidArgumentError),
    ],
)
def test_bad_arguments_raise_and_change_nothing(vm: Vm, call: Callable[[Vm], object], error: type[Exception]) -> None:
    with pytest.raises(error):
        call(vm)
    assert len(vm.breakpoints) == 0


def test_memory_takes_any_buffer(vm: Vm, scratch: int) -> None:
    for data in (b"abcd", bytearray(b"abcd"), memoryview(b"aXbXcXdX")[::2]):
        vm.write(scratch, b"\0" * 4)
        vm.write(scratch, data)
        assert vm.read(scratch, 4) == b"abcd"
    page = bytearray(4)
    vm.memory.read_into(vm.translate(scratch), page)
    assert page == b"abcd"
    vm.write(scratch, b"\xff\xfe\0")
    assert vm.read_cstr(scratch) == "\\xff\\xfe"
    with pytest.raises(vmitap.StringTooLongError):
        vm.read_cstr(scratch, limit=2)


def test_symbols_match_shell_patterns(vm: Vm) -> None:
    import fnmatch

    names = [symbol.name for symbol in vm.symbols]
    for pattern in ("*", "open_*", "*file", "*e?*", "open_file", "?pen_file", "", "**x*"):
        assert [symbol.name for symbol in vm.symbols.match(pattern)] == [name for name in names if fnmatch.fnmatchcase(name, pattern)]


# --- the lower floor ---


class Recorder:
    """A controller that passes everything on to one of ours, and keeps a list."""

    def __init__(self, vm: Vm) -> None:
        self.inner = vmitap.BreakpointController(vm)
        self.calls: list[str] = []
        self.fail = ""

    def _call(self, name: str, number: int, view: View) -> None:
        if name == self.fail:
            raise ZeroDivisionError(name)
        self.calls.append(name)
        getattr(self.inner, name)(number, view)

    def check_event(self, event: VmiEvent, /) -> tuple[View, int] | None:
        return self.inner.check_event(event)

    def insert_breakpoint(self, pa: int, view: View, /) -> None:
        self._call("insert_breakpoint", pa, view)

    def remove_breakpoint(self, pa: int, view: View, /) -> None:
        self._call("remove_breakpoint", pa, view)

    def monitor(self, gfn: int, view: View, /) -> None:
        self._call("monitor", gfn, view)

    def unmonitor(self, gfn: int, view: View, /) -> None:
        self._call("unmonitor", gfn, view)


def test_a_controller_can_be_a_python_object(vm: Vm) -> None:
    controller = Recorder(vm)
    manager = vmitap.BreakpointManager(vm, controller)
    root, view, va = vm.registers(0).root, vm.views.tap, vm.symbol("open_file")
    assert manager.insert(va, root, view, key="a", tag=1, is_global=True)
    assert not manager.insert(va, root, view, key="a", tag=2, is_global=True)
    assert manager.insert(va, root, view, key="b", is_global=True)
    assert manager.insert(0x1234_5678_9000, root, view)
    assert [(each.key, each.tag, each.pa is None) for each in manager] == [("a", 1, False), ("b", None, False), (None, None, True)]
    step, reinject = VmiEventResponse.fast_single_step(vm.views.default), VmiEventResponse.reinject()
    while True:
        event = vm.wait_event(timeout=5)
        assert event is not None
        if manager.contains_by_event(event, "a"):
            break
        vm.respond(event, reinject if event.reason == "breakpoint" else step)
    assert [each.key for each in manager.get_all_by_event(event)] == ["a", "b"]
    vm.respond(event, step)
    assert manager.remove(va, root, view, key="b")
    controller.fail = "remove_breakpoint"
    with pytest.raises(ZeroDivisionError):
        manager.remove(va, root, view, key="a")
    assert len(manager) == 2
    controller.fail = ""
    manager.clear()
    assert controller.calls[:2] == ["monitor", "insert_breakpoint"]
    assert controller.calls[-2:] == ["remove_breakpoint", "unmonitor"]


def test_what_a_controller_planted_goes_with_the_session() -> None:
    with vmitap.attach("demo") as vm:
        controller = vmitap.BreakpointController(vm)
        pa, view = vm.translate("open_file"), vm.views.create()
        controller.monitor(pa >> 12, view)
        controller.insert_breakpoint(pa, view)
        core = vmitap.VmiCore(vm)
        assert core.frames_in_use == 1
    with pytest.raises(vmitap.StaleContextError):
        controller.remove_breakpoint(pa, view)


def test_an_event_is_answered_once_and_by_its_own_session(vm: Vm) -> None:
    view = vm.views.create()
    vmitap.VmiCore(vm).set_memory_access(vm.translate("open_file") >> 12, view, Access.RW)
    vm.views.switch_to(view)
    event = vm.wait_event(timeout=5)
    assert event is not None
    with vmitap.attach("demo") as other, pytest.raises(vmitap.NoPendingEventError):
        other.respond(event, VmiEventResponse.continue_())
    vm.respond(event, VmiEventResponse.fast_single_step(vm.views.default))
    later = vm.wait_event(timeout=5)
    assert later is not None
    with pytest.raises(vmitap.NoPendingEventError):
        vm.respond(event, VmiEventResponse.continue_())
    vm.respond(later, VmiEventResponse.fast_single_step(vm.views.default))


def test_what_the_core_logs_arrives_in_the_logger_named_vmitap(vm: Vm, caplog: pytest.LogCaptureFixture) -> None:
    def lose_the_stack(hit: Hit) -> Verdict:
        hit.vm.set_registers(rsp=0x7000_0000_0000)
        return Verdict.return_from_function(1)

    def fail(_: Hit) -> None:
        raise ValueError

    vm.breakpoint("open_file", lose_the_stack)
    vm.breakpoint("open_file", fail)
    # The event cannot be answered as it was to be, but what the handler raised is told first: the other goes to the log.
    with pytest.raises(vmitap.HandlerError):
        vm.run(timeout=5)
    records = [record for record in caplog.records if record.name == "vmitap"]
    assert [record.levelname for record in records] == ["WARNING"]
    assert "0x700000000000" in records[0].getMessage()


def test_records_beyond_those_that_can_wait_are_counted_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "vmitap")
    events = 20_000
    with mock() as guest:
        guest.vm.breakpoint("open_file", capture={"a": Arg(0)}, on_return={"b": Reg.rax})
        # The stack holds no address that could be returned to, which is said of each call. They are thousands before Python has its turn.
        stack = guest.put((1 << 50).to_bytes(8, "little"))
        guest.script([Int3("open_file", regs={"rsp": stack})] * events)
        guest.run(timeout=60)
        assert guest.vm.stats.returns_lost == events
    told = [record.getMessage() for record in caplog.records]
    lost = [int(text.split()[0]) for text in told if "records were lost" in text]
    assert lost
    assert sum("is not tapped" in text for text in told) + sum(lost) == events


def test_a_console_that_is_full_keeps_what_came_first_and_says_so_once(vm: Vm, caplog: pytest.LogCaptureFixture) -> None:
    # MOV AL, 'x'; OUT 0xE9, AL; JMP back to it.
    vm.write("open_file", bytes.fromhex("b078 e6e9 ebfc"))
    kept = 1 << 20
    for _ in range(600):
        vm.run(timeout=0.1)
        if len(vm.console) == kept:
            break
    vm.run(timeout=0.1)
    assert (len(vm.console), vm.console[-1]) == (kept, "x")
    assert caplog.text.count("the guest's console has reached 1048576 bytes") == 1


def test_the_log_reaches_python(vm: Vm, caplog: pytest.LogCaptureFixture) -> None:
    vm.detach()
    assert [record for record in caplog.records if record.name != "vmitap"] == []


def test_breakpoints_are_found(vm: Vm) -> None:
    bp: Breakpoint = vm.breakpoint("open_file", key="k", tag="t")
    found = (vm.breakpoints.at("open_file"), vm.breakpoints.on_page("open_file"), vm.breakpoints.by_key("k"), vm.breakpoints.by_tag("t"))
    assert found == ([bp],) * 4
    assert vm.breakpoints.at(bp.address + 1) == []
    assert bp in vm.breakpoints
    assert None not in vm.breakpoints
