"""What must be shown, on real guest code: hits and calls are equal, the guest sees nothing, and whatever goes wrong is a typed error."""

import os
import pickle
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vmitap
from vmitap import Access, OnWrite, Verdict
from vmitap.cli.truth import FUNCTIONS, READ_KINDS, Truth

ENDLESS = "mode=calls calls=1000000000000"


@pytest.fixture(scope="session")
def calls_guest(build_guest: Callable[..., str]) -> str:
    return build_guest("calls.S")


@pytest.fixture(scope="session")
def patch_guest(build_guest: Callable[..., str]) -> str:
    return build_guest("patch.S")


@pytest.fixture
def demo() -> Iterator[vmitap.Vm]:
    with vmitap.attach("demo", cmdline="rounds=4") as vm:
        yield vm


def finish(vm: vmitap.Vm) -> Truth:
    """Lets the guest come to its end."""
    assert vm.run(timeout=60).reason == "idle"
    truth = Truth.read(vm)
    assert truth.finished
    return truth


def assert_unseen(truth: Truth) -> None:
    assert min(truth.vcpu_checks) > 0
    assert truth.mismatches == dict.fromkeys(READ_KINDS, 0)
    assert truth.hashes == truth.golden
    assert not truth.tampering_seen


def mismatches(vm: vmitap.Vm) -> dict[str, int]:
    """The counters of a guest made from tests/guests/reads.inc."""
    first = vm.symbol("mismatches")
    return {kind: vm.read_u64(first + 8 * n) for n, kind in enumerate(READ_KINDS)}


def show_readable(vm: vmitap.Vm, *names: str) -> dict[int, str]:
    """The same breakpoints with nothing hidden: copies of the pages that the guest can read. Returns names by address."""
    core, view = vmitap.VmiCore(vm), vm.views.create(Access.RWX)
    places = [vm.translate(name) for name in names]
    for gfn in {pa >> 12 for pa in places}:
        page = bytearray(core.read(gfn << 12, 4096))
        for pa in places:
            if pa >> 12 == gfn:
                page[pa & 0xFFF] = 0xCC
        frame = core.allocate_frame()
        core.write(frame << 12, page)
        core.remap(view, gfn, frame)
    vm.views.switch_to(view)
    return {vm.symbol(name): name for name in names}


def drive(vm: vmitap.Vm, names: dict[int, str]) -> dict[str, int]:
    """Runs a guest with breakpoints of `show_readable` to its end; returns hits by name."""
    hits = dict.fromkeys(names.values(), 0)
    while (event := vm.wait_event(timeout=60)) is not None:
        if event.reason == "breakpoint" and event.registers.rip in names:
            hits[names[event.registers.rip]] += 1
            vm.respond(event, vmitap.VmiEventResponse.fast_single_step(vm.views.default))
        elif event.reason == "breakpoint":
            vm.respond(event, vmitap.VmiEventResponse.reinject())
        else:
            vm.respond(event, vmitap.VmiEventResponse.continue_())
    return hits


# Hits and what the guest sees


def test_a_hundred_thousand_calls_are_a_hundred_thousand_hits() -> None:
    with vmitap.attach("demo", cmdline="mode=calls calls=100000") as vm:
        bp = vm.breakpoint("open_file")
        result = vm.run(timeout=60)
        truth = Truth.read(vm)
        assert result.reason == "idle"
        assert (result.hits, result.py_calls, result.lost) == (100_000, 0, 0)
        assert bp.stats.hits == truth.calls["open_file"] == 100_000
        assert truth.checks == 10
        assert_unseen(truth)


def test_a_handler_is_called_once_for_each_call_with_its_own_arguments() -> None:
    numbers: list[int] = []
    with vmitap.attach("demo", cmdline="mode=calls calls=2000 check=0") as vm:
        vm.breakpoint("open_file", lambda hit: numbers.append(hit.args[1] >> 32))
        assert vm.run(timeout=60).py_calls == 2000
    # Ten parts, each with a loop of its own.
    assert numbers == list(range(200)) * 10


@pytest.mark.parametrize("vcpus", [1, 2])
def test_no_kind_of_read_sees_a_breakpoint_from_any_vcpu(vcpus: int) -> None:
    with vmitap.attach("demo", vcpus=vcpus, cmdline="rounds=4") as vm:
        untapped = finish(vm)
    with vmitap.attach("demo", vcpus=vcpus, cmdline="rounds=4") as vm:
        breakpoints = dict(zip(FUNCTIONS, vm.insert_many(FUNCTIONS), strict=True))
        truth = finish(vm)
        assert {name: bp.stats.hits for name, bp in breakpoints.items()} == truth.calls == untapped.calls
        assert len(truth.vcpu_checks) == vcpus
        assert_unseen(truth)
        assert truth.hashes == untapped.hashes
        assert vm.stats.hidden_reads > 0
        assert truth.own_breakpoints == untapped.own_breakpoints > 0
        assert vm.stats.reinjected == 0 or vm.stats.reinjected == truth.own_breakpoints
        assert "0 mismatches" in vm.console


@pytest.mark.parametrize("vcpus", [1, 2])
def test_with_hiding_off_the_guest_sees_it(vcpus: int) -> None:
    with vmitap.attach("demo", vcpus=vcpus, cmdline="rounds=4") as vm:
        hits = drive(vm, show_readable(vm, *FUNCTIONS))
        truth = Truth.read(vm)
        assert truth.finished
        assert hits == truth.calls
        assert truth.tampering_seen
        assert min(truth.vcpu_mismatches) > 0
        # `crossing` looks at page boundaries, where no function begins; `compare` compares with a copy that the guest made when the
        # breakpoints were there already. The next test but one is about those.
        assert {kind for kind, count in truth.mismatches.items() if count} >= set(READ_KINDS) - {"crossing", "compare"}
        assert "TAMPERING SEEN" in vm.console


def test_a_breakpoint_in_the_last_byte_of_a_page_and_two_on_one_page_are_hidden_from_every_kind_of_read(calls_guest: str) -> None:
    with vmitap.attach(calls_guest, cmdline="n=1000 every=100") as vm:
        f, g, h = vm.insert_many(["f", "g", "h"])
        assert g.address & 0xFFF == 0xFFF
        assert f.address >> 12 == h.address >> 12
        assert vm.run(timeout=60).reason == "idle"
        assert (f.stats.hits, g.stats.hits, h.stats.hits) == (1000, vm.read_u64("g_count"), vm.read_u64("h_count"))
        assert g.stats.hits == h.stats.hits > 9
        assert vm.read_u64("f_sum") == sum(range(1000))
        assert vm.read_u64("wrong_results") == 0
        assert mismatches(vm) == dict.fromkeys(READ_KINDS, 0)


def test_with_hiding_off_every_kind_of_read_sees_it(calls_guest: str) -> None:
    # The reference hashes are made by the guest before the first call, so that the breakpoints come after that.
    with vmitap.attach(calls_guest, cmdline="n=100 every=50") as vm:
        first = vm.breakpoint("f")
        vm.run(timeout=60, max_hits=1)
        first.remove()
        drive(vm, show_readable(vm, "f", "g", "h"))
        assert all(count > 0 for count in mismatches(vm).values()), mismatches(vm)


def test_reads_of_a_page_with_a_breakpoint_give_the_original_bytes(demo: vmitap.Vm) -> None:
    before = demo.read("open_file", 64)
    bp = demo.breakpoint("open_file")
    assert demo.read("open_file", 64) == before
    assert demo.read_pa(demo.translate("open_file"), 64) == before
    assert demo.memory.read(demo.translate("open_file"), 64) == before
    bp.remove()
    assert demo.read("open_file", 64) == before


# Handlers that do something else than look


def test_a_handler_that_raises_arrives_with_its_hit_and_the_guest_goes_on(demo: vmitap.Vm) -> None:
    calls = 0

    @demo.breakpoint("open_file")
    def third_time_unlucky(_hit: vmitap.Hit) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise LookupError("no luck")

    with pytest.raises(vmitap.HandlerError, match="no luck") as caught:
        demo.run(timeout=60)
    assert caught.value.hit.symbol == "open_file"
    assert isinstance(caught.value.error, LookupError)
    assert caught.value.__cause__ is caught.value.error
    truth = finish(demo)
    assert calls == truth.calls["open_file"]
    assert_unseen(truth)


def test_what_is_no_exception_comes_out_of_run_as_it_is(demo: vmitap.Vm) -> None:
    def leave(_hit: vmitap.Hit) -> None:
        raise SystemExit(3)

    bp = demo.breakpoint("open_file", leave)
    with pytest.raises(SystemExit):
        demo.run(timeout=60)
    bp.remove()
    assert_unseen(finish(demo))


@pytest.mark.parametrize("how", ["verdict", "method"])
def test_a_handler_can_ask_to_detach(demo: vmitap.Vm, how: str) -> None:
    calls = 0

    @demo.breakpoint("open_file")
    def enough(hit: vmitap.Hit) -> Verdict | None:
        nonlocal calls
        calls += 1
        if how == "verdict":
            return Verdict.detach()
        hit.vm.detach()
        return None

    result = demo.run(timeout=60)
    assert (result.reason, calls) == ("detached", 1)
    assert demo.closed
    with pytest.raises(vmitap.StaleContextError):
        demo.run()


def test_a_handler_can_insert_a_thousand_breakpoints(calls_guest: str) -> None:
    with vmitap.attach(calls_guest, cmdline="n=1000 every=100") as vm:
        # One page of nothing lies in front of f; the guest reads it, and never executes it.
        places = [vm.symbol("tapped_start") + 4 * n for n in range(1000)]

        @vm.breakpoint("f")
        def plant(hit: vmitap.Hit) -> None:
            if hit.args[0] == 10:
                hit.vm.insert_many(places)

        assert vm.run(timeout=60).reason == "idle"
        assert len(vm.breakpoints) == 1001
        assert {bp.state for bp in vm.breakpoints} == {"active"}
        assert vm.read_u64("f_count") == 1000
        assert mismatches(vm) == dict.fromkeys(READ_KINDS, 0)


def test_a_breakpoint_inserted_by_a_handler_takes_effect_at_once(demo: vmitap.Vm) -> None:
    inserted: list[vmitap.Breakpoint] = []

    @demo.breakpoint("open_file")
    def once(hit: vmitap.Hit) -> None:
        if not inserted:
            inserted.append(hit.vm.breakpoint("read_file"))

    truth = finish(demo)
    assert inserted[0].stats.hits == truth.calls["read_file"]
    assert_unseen(truth)


def test_a_handler_past_its_deadline_is_an_error_with_its_hit_and_the_guest_goes_on(demo: vmitap.Vm) -> None:
    slow = True

    def sleep(_hit: vmitap.Hit) -> None:
        nonlocal slow
        if slow:
            slow = False
            time.sleep(0.05)

    bp = demo.breakpoint("check_licence", sleep, deadline=0.02)
    with pytest.raises(vmitap.DeadlineExceededError) as caught:
        demo.run(timeout=60)
    assert caught.value.hit.symbol == "check_licence"
    assert caught.value.deadline == pytest.approx(0.02)
    assert 0.05 <= caught.value.elapsed < 5
    truth = finish(demo)
    assert bp.stats.hits == truth.calls["check_licence"]
    assert_unseen(truth)


def test_a_verdict_can_answer_in_place_of_the_function(demo: vmitap.Vm) -> None:
    @demo.breakpoint("check_licence")
    def accept(_hit: vmitap.Hit) -> Verdict:
        return Verdict.return_from_function(1)

    truth = finish(demo)
    assert truth.licences_accepted == 4
    assert truth.licences_refused == truth.calls["check_licence"] == 0
    assert "all features on" in demo.console
    assert_unseen(truth)


def test_run_inside_a_handler_is_refused(demo: vmitap.Vm) -> None:
    caught: list[vmitap.SessionBusyError] = []

    @demo.breakpoint("open_file")
    def again(hit: vmitap.Hit) -> None:
        with pytest.raises(vmitap.SessionBusyError) as error:
            hit.vm.run()
        caught.append(error.value)

    demo.run(timeout=60, max_hits=1)
    assert [error.op for error in caught] == ["run"]


def test_a_live_guest_is_refused_after_its_handler(demo: vmitap.Vm) -> None:
    hits: list[vmitap.Hit] = []
    demo.breakpoint("open_file", hits.append)
    demo.run(timeout=60, max_hits=1)
    with pytest.raises(vmitap.StaleContextError):
        _ = hits[0].vm.read("open_file", 1)


def test_a_hit_can_be_pickled_and_says_what_it_has_lost(demo: vmitap.Vm) -> None:
    bp = demo.breakpoint("open_file", tag=("any", "thing"), key="owner")
    hit = next(demo.events(bp, timeout=60))
    copy = pickle.loads(pickle.dumps(hit))
    for name in ("vcpu", "address", "pa", "symbol", "args", "ring", "root", "access", "view", "key", "tag", "step", "timestamp", "hold"):
        assert getattr(copy, name) == getattr(hit, name), name
    assert copy.regs.to_dict() == hit.regs.to_dict()
    assert hit.breakpoint is bp
    with pytest.raises(vmitap.StaleContextError):
        _ = copy.breakpoint


# Writes to code


def test_under_reapply_code_that_overwrites_its_tapped_byte_runs_and_stays_tapped(patch_guest: str) -> None:
    with vmitap.attach(patch_guest, cmdline="n=50") as vm:
        bp = vm.breakpoint("f", on_write=OnWrite.REAPPLY)
        assert vm.run(timeout=60).reason == "idle"
        assert (bp.stats.hits, bp.state) == (50, "active")
        assert vm.read_u64("wrong_results") == 0
        assert vm.stats.hidden_writes == 50
        assert vm.read("f", 6) == b"\xb8" + struct.pack("<I", 50) + b"\xc3"


def test_under_remove_the_write_happens_and_the_breakpoint_goes(patch_guest: str) -> None:
    with vmitap.attach(patch_guest, cmdline="n=50") as vm:
        bp = vm.breakpoint("f", on_write=OnWrite.REMOVE)
        assert vm.run(timeout=60).reason == "idle"
        assert (bp.stats.hits, bp.state) == (1, "removed")
        assert vm.stats.removed_by_write == 1
        assert vm.stats.shadow_frames == 0
        assert vm.read_u64("wrong_results") == 0


def test_under_deny_the_write_is_thrown_away_and_the_guest_goes_on(patch_guest: str) -> None:
    with vmitap.attach(patch_guest, cmdline="n=50") as vm:
        before = vm.read("f", 8)
        bp = vm.breakpoint("f", on_write=OnWrite.DENY)
        assert vm.run(timeout=60).reason == "idle"
        assert (bp.stats.hits, bp.state) == (50, "active")
        assert vm.read("f", 8) == before
        # Call 0 is answered with 0; so are all others.
        assert (vm.read_u64("wrong_results"), vm.read_u64("f_returned")) == (49, 0)


def test_under_ask_the_function_decides_each_time(patch_guest: str) -> None:
    asked: list[vmitap.Hit] = []

    def ask(hit: vmitap.Hit) -> OnWrite:
        asked.append(hit)
        return OnWrite.REAPPLY if len(asked) <= 10 else OnWrite.DENY if len(asked) <= 20 else OnWrite.REMOVE

    with vmitap.attach(patch_guest, cmdline="n=50") as vm:
        bp = vm.breakpoint("f", on_write=OnWrite.ASK, ask=ask)
        assert vm.run(timeout=60).reason == "idle"
        assert len(asked) == 21
        assert {(hit.address, hit.access) for hit in asked} == {(vm.symbol("f"), Access.W)}
        assert (bp.stats.hits, bp.state) == (21, "removed")
        # The calls 11 to 20 were answered with 10: the ten writes before them were thrown away.
        assert vm.read_u64("wrong_results") == 10


def test_a_watch_sees_each_write_before_it_takes_effect(patch_guest: str) -> None:
    seen: list[tuple[int, bytes]] = []
    with vmitap.attach(patch_guest, cmdline="n=50") as vm:
        vm.watch("f", 8, Access.W, lambda hit: seen.append((hit.address, hit.vm.read("f", 5))))
        assert vm.run(timeout=60).reason == "idle"
        assert seen == [(vm.symbol("f"), b"\xb8" + struct.pack("<I", n)) for n in range(50)]
        assert vm.read_u64("wrong_results") == 0


def test_a_watch_and_a_breakpoint_on_one_page_both_work(patch_guest: str) -> None:
    with vmitap.attach(patch_guest, cmdline="n=50") as vm:
        watch = vm.watch("f", 8, Access.W)
        bp = vm.breakpoint("f")
        assert vm.run(timeout=60).reason == "idle"
        assert (watch.stats.hits, bp.stats.hits) == (50, 50)
        assert vm.read_u64("wrong_results") == 0


@pytest.mark.parametrize(("policy", "wrong"), [(OnWrite.REAPPLY, 0), (OnWrite.DENY, 49)])
def test_a_tapped_instruction_that_overwrites_its_own_page_is_a_write_like_any_other(patch_guest: str, policy: OnWrite, wrong: int) -> None:
    with vmitap.attach(patch_guest, cmdline="n=50 inside=1") as vm:
        store, called = vm.breakpoint("patch_f"), vm.breakpoint("f", on_write=policy)
        assert vm.run(timeout=60).reason == "idle"
        assert (store.stats.hits, called.stats.hits, vm.stats.hidden_writes) == (50, 50, 50)
        assert vm.read_u64("wrong_results") == wrong


@pytest.mark.parametrize("how", ["mov", "xchg", "xadd"])
def test_code_that_is_overwritten_behind_a_breakpoint_is_executed_as_it_is_now(patch_guest: str, how: str) -> None:
    with vmitap.attach(patch_guest, cmdline=f"n=50 {how}=1") as vm:
        bp = vm.breakpoint("f_entry")
        assert vm.run(timeout=60).reason == "idle"
        assert (bp.stats.hits, bp.state) == (50, "active")
        assert vm.read_u64("wrong_results") == 0
        assert vm.stats.hidden_writes == 50


@pytest.mark.parametrize("how", ["mov", "xchg", "xadd"])
def test_an_instruction_that_reads_and_writes_is_a_write(patch_guest: str, how: str) -> None:
    with vmitap.attach(patch_guest, cmdline=f"n=50 {how}=1") as vm:
        bp = vm.breakpoint("f", on_write=OnWrite.REMOVE)
        assert vm.run(timeout=60).reason == "idle"
        assert vm.read_u64("wrong_results") == 0
        assert (bp.stats.hits, bp.state, vm.stats.removed_by_write) == (1, "removed", 1)


# Ends of a run and of a session


def test_ctrl_c_comes_out_of_run_within_half_a_second_and_the_guest_is_usable() -> None:
    with vmitap.attach("demo", cmdline=ENDLESS) as vm:
        bp = vm.breakpoint("open_file")
        sent: list[float] = []

        def interrupt() -> None:
            sent.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(0.3, interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            vm.run(timeout=30)
        assert time.perf_counter() - sent[0] < 0.5
        timer.join()
        before = bp.stats.hits
        assert vm.run(timeout=30, max_hits=5).hits == 5
        assert bp.stats.hits == before + 5


def test_stop_from_another_thread_ends_the_run() -> None:
    with vmitap.attach("demo", cmdline=ENDLESS) as vm:
        vm.breakpoint("open_file")
        timer = threading.Timer(0.2, vm.stop)
        timer.start()
        begin = time.perf_counter()
        assert vm.run(timeout=30).reason == "stopped"
        assert 0.1 < time.perf_counter() - begin < 1
        timer.join()


def test_a_timeout_ends_the_run_and_the_next_one_goes_on() -> None:
    with vmitap.attach("demo", cmdline=ENDLESS) as vm:
        bp = vm.breakpoint("open_file")
        result = vm.run(timeout=0.2)
        assert result.reason == "timeout"
        assert 0.15 < result.elapsed < 1
        before = bp.stats.hits
        assert before == result.hits > 0
        vm.run(timeout=30, max_hits=7)
        assert bp.stats.hits == before + 7


def test_removing_a_breakpoint_puts_everything_back(demo: vmitap.Vm) -> None:
    core, gfn = vmitap.VmiCore(demo), demo.translate("open_file") >> 12
    before = core.read(gfn << 12, 4096)
    frames = core.frames_in_use
    bp = demo.breakpoint("open_file")
    assert core.memory_access(gfn, demo.views.tap) == Access.X
    assert core.frames_in_use == frames + 1
    demo.run(timeout=60, max_hits=3)
    bp.remove()
    assert core.memory_access(gfn, demo.views.tap) == Access.RWX
    assert core.frames_in_use == frames
    assert core.read(gfn << 12, 4096) == before
    assert_unseen(finish(demo))


@pytest.mark.parametrize("way", ["normal", "exception"])
def test_leaving_with_ends_the_session_and_takes_every_breakpoint_out(way: str) -> None:
    def use() -> tuple[vmitap.Vm, vmitap.Breakpoint]:
        with vmitap.attach("demo") as vm:
            kept.append(vm)
            kept_breakpoints.append(vm.breakpoint("open_file"))
            vm.run(timeout=60, max_hits=1)
            if way == "exception":
                raise RuntimeError("on its way")
        return kept[0], kept_breakpoints[0]

    kept: list[vmitap.Vm] = []
    kept_breakpoints: list[vmitap.Breakpoint] = []
    if way == "exception":
        with pytest.raises(RuntimeError, match="on its way"):
            use()
    else:
        use()
    assert kept[0].closed
    assert kept_breakpoints[0].state == "removed"
    with pytest.raises(vmitap.StaleContextError):
        kept[0].read("open_file", 1)
    kept[0].detach()


# Bad input: a typed error with the data in it, and nothing changed


def elf(
    *, physical: int = 0x100000, offset: int = 0x1000, filesz: int = 16, memsz: int = 16, segments: int = 1, machine: int = 62
) -> bytes:
    """A small ELF image with one segment, in which everything can be wrong."""
    header = struct.pack("<4sBBBB8x", b"\x7fELF", 2, 1, 1, 0)
    header += struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0x100000, 64, 0, 0, 64, 56, segments, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 7, offset, 0x100000, physical, filesz, memsz, 4096)
    return (header + segment).ljust(0x1000, b"\0") + b"\xfa\xf4" * 8


def test_the_image_the_hostile_ones_are_made_from_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.elf"
    path.write_bytes(elf())
    with vmitap.attach(f"emu:{path}") as vm:
        assert vm.run(timeout=10).reason == "idle"


HOSTILE = {
    "empty": b"",
    "no ELF": b"#!/bin/sh\n" * 100,
    "cut in the header": elf()[:40],
    "cut in the program headers": elf()[:100],
    "cut in the segment": elf()[:0x1008],
    "a segment beyond the file": elf(offset=0x100000),
    "an offset that wraps": elf(offset=(1 << 64) - 8),
    "a size that wraps": elf(filesz=(1 << 64) - 16, memsz=(1 << 64) - 16),
    "more in the file than in memory": elf(filesz=16, memsz=8),
    "a segment beyond memory": elf(physical=1 << 40),
    "a segment that wraps": elf(physical=(1 << 64) - 8),
    "a segment in the loader's tables": elf(physical=0x2000),
    "more segments than there are": elf(segments=0xFFFE),
    "another machine": elf(machine=183),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_truncated_or_hostile_image_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "guest.elf"
    path.write_bytes(data)
    with pytest.raises(vmitap.ImageError) as caught:
        vmitap.attach(f"emu:{path}")
    assert str(path) in caught.value.what
    assert caught.value.reason


@pytest.mark.parametrize("target", ["nonsense", "emu:", "emu:/no/such/file", "xen:1", "dump:/no/such/file", ""])
def test_no_such_target_says_which_and_what_to_do(target: str) -> None:
    with pytest.raises(vmitap.AttachError) as caught:
        vmitap.attach(target)
    assert caught.value.target == target
    assert caught.value.reason
    assert caught.value.hint


@pytest.mark.parametrize(("memory", "vcpus"), [(4097, None), (1 << 50, None), (None, 0), (None, 9)])
def test_an_impossible_machine_is_refused(memory: int | None, vcpus: int | None) -> None:
    with pytest.raises(vmitap.InvalidArgumentError) as caught:
        vmitap.attach("demo", memory=memory, vcpus=vcpus)
    assert caught.value.what == ("memory" if memory else "vcpus")


NON_CANONICAL = 0x0000_8000_0000_0000
UNMAPPED = 0x0000_7000_0000_0000

WRONG: dict[str, tuple[Callable[[vmitap.Vm], object], type[vmitap.VmitapError], dict[str, object]]] = {
    "reading an unmapped address": (lambda vm: vm.read(UNMAPPED, 8), vmitap.TranslationError, {"va": UNMAPPED, "fault": "not-present"}),
    "writing an unmapped address": (lambda vm: vm.write(UNMAPPED, b"x"), vmitap.TranslationError, {"va": UNMAPPED, "fault": "not-present"}),
    "watching an unmapped address": (
        lambda vm: vm.watch(UNMAPPED, 8, Access.W),
        vmitap.TranslationError,
        {"va": UNMAPPED, "fault": "not-present"},
    ),
    "a good and a bad address": (
        lambda vm: vm.insert_many(["open_file", NON_CANONICAL]),
        vmitap.TranslationError,
        {"va": NON_CANONICAL, "fault": "non-canonical"},
    ),
    "a non-canonical address": (
        lambda vm: vm.read(NON_CANONICAL, 8),
        vmitap.TranslationError,
        {"va": NON_CANONICAL, "fault": "non-canonical", "level": None},
    ),
    "tapping a non-canonical address": (
        lambda vm: vm.breakpoint(NON_CANONICAL),
        vmitap.TranslationError,
        {"va": NON_CANONICAL, "fault": "non-canonical"},
    ),
    "a view that is not there": (
        lambda vm: vm.breakpoint("open_file", view=vmitap.View(77)),
        vmitap.ViewNotFoundError,
        {"view": 77},
    ),
    "switching to a view that is not there": (lambda vm: vm.views.switch_to(vmitap.View(77)), vmitap.ViewNotFoundError, {"view": 77}),
    "hiding in the default view": (lambda vm: vm.breakpoint("open_file", view=vm.views.default), vmitap.DefaultViewError, {}),
    "an unknown symbol": (lambda vm: vm.breakpoint("opne_file"), vmitap.SymbolNotFoundError, {"name": "opne_file"}),
    "a good and an unknown symbol": (lambda vm: vm.insert_many(["open_file", "x"]), vmitap.SymbolNotFoundError, {"name": "x"}),
    "reading past memory": (
        lambda vm: vm.read_pa(vm.memory.size - 4, 8),
        vmitap.OutOfRangeError,
        {"length": 8},
    ),
    "writing past memory": (lambda vm: vm.write_pa(vm.memory.size, b"x"), vmitap.OutOfRangeError, {"length": 1}),
    "a string without an end": (lambda vm: vm.read_cstr("text_start", 4), vmitap.VmitapError, {}),
    "a vCPU that is not there": (lambda vm: vm.registers(5), vmitap.VcpuNotFoundError, {"vcpu": 5, "count": 1}),
    "a register that is not there": (lambda vm: vm.set_registers(0, eax=1), vmitap.InvalidArgumentError, {}),  # type: ignore[call-arg]
    "an empty watch": (lambda vm: vm.watch("open_file", 0, Access.R), vmitap.InvalidArgumentError, {"what": "length"}),
}


@pytest.mark.parametrize(("do", "kind", "data"), WRONG.values(), ids=WRONG.keys())
def test_bad_input_is_a_typed_error_with_its_data_and_changes_nothing(
    do: Callable[[vmitap.Vm], object], kind: type[vmitap.VmitapError], data: dict[str, object]
) -> None:
    with vmitap.attach("demo", cmdline="rounds=2") as vm:
        core = vmitap.VmiCore(vm)

        def state() -> tuple[object, ...]:
            memory = vm.read_pa(0, vm.info.memory_size)
            return memory, core.frames_in_use, len(vm.breakpoints), len(vm.views), vm.views.of(0), vm.registers(0).to_dict()

        before = state()
        with pytest.raises(kind) as caught:
            do(vm)
        for name, value in data.items():
            assert getattr(caught.value, name) == value, name
        assert str(caught.value)
        assert state() == before
        assert_unseen(finish(vm))


def test_an_unknown_symbol_comes_with_the_nearest_names(demo: vmitap.Vm) -> None:
    with pytest.raises(vmitap.SymbolNotFoundError) as caught:
        demo.symbol("opne_file")
    assert caught.value.nearest[0] == "open_file"
    assert isinstance(caught.value, LookupError)
    assert "open_file" in str(caught.value)


def test_the_same_owner_twice_at_one_address_is_refused(demo: vmitap.Vm) -> None:
    demo.breakpoint("open_file", key="owner")
    with pytest.raises(vmitap.BreakpointConflictError) as caught:
        demo.breakpoint("open_file", key="owner")
    assert caught.value.address == demo.symbol("open_file")
    assert len(demo.breakpoints) == 1


def test_an_event_is_answered_once(demo: vmitap.Vm) -> None:
    controller, pa, view = vmitap.BreakpointController(demo), demo.translate("open_file"), demo.views.tap
    controller.monitor(pa >> 12, view)
    controller.insert_breakpoint(pa, view)
    go_on = vmitap.VmiEventResponse.fast_single_step(demo.views.default)
    while (event := demo.wait_event(timeout=60)) is not None and (event.reason, event.pa) != ("breakpoint", pa):
        # The guest makes a copy of its code when it begins, and has an INT3 of its own.
        demo.respond(event, go_on if event.reason == "memory-access" else vmitap.VmiEventResponse.reinject())
    assert event is not None
    assert controller.check_event(event) == (view, pa >> 12)
    demo.respond(event, go_on)
    with pytest.raises(vmitap.NoPendingEventError) as caught:
        demo.respond(event, vmitap.VmiEventResponse.continue_())
    assert caught.value.vcpu == 0


def test_two_sessions_are_two_guests() -> None:
    with vmitap.attach("demo", cmdline="rounds=2") as one, vmitap.attach("demo", cmdline="rounds=3") as two:
        bp = one.breakpoint("open_file")
        assert finish(two).rounds == 3
        assert bp.stats.hits == 0
        truth = finish(one)
        assert bp.stats.hits == truth.calls["open_file"]
        assert_unseen(truth)
