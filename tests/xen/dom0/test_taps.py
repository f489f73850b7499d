"""Several taps at once, taps in another view, and the control: what is not hidden is seen."""

import pytest

import vmitap
from demo_guest import FUNCTIONS, KERNEL_WINDOW, READ_KINDS, assert_unseen, begin, finish, start_demo, symbols, truth
from domain import Start, attach, wait_for
from vmitap import Access


def test_two_taps_on_one_page_count_their_own_calls(start: Start) -> None:
    start_demo(start, "rounds=2")
    first, second = "open_file", "read_file"
    assert symbols()[first] >> 12 == symbols()[second] >> 12
    with attach("xen:demo") as vm:
        taps = {name: vm.breakpoint(symbols()[name]) for name in (first, second)}
        seen = finish(vm)
        assert {name: tap.stats.hits for name, tap in taps.items()} == {name: seen.calls[name] for name in taps}
        assert min(seen.calls[name] for name in taps) > 0
        assert_unseen(seen)


def test_many_taps_at_once_each_count_their_own_calls(start: Start) -> None:
    start_demo(start, "rounds=2 check=0")
    with attach("xen:demo") as vm:
        taps = dict(zip(FUNCTIONS, vm.insert_many([symbols()[name] for name in FUNCTIONS]), strict=True))
        seen = finish(vm)
        assert seen.finished
        assert {name: tap.stats.hits for name, tap in taps.items()} == seen.calls
        assert seen.own_breakpoints > 0


def test_two_vcpus_that_hammer_one_function_lose_no_hit(start: Start) -> None:
    start_demo(start, "mode=calls calls=500 parts=1 callers=1 check=0")
    with attach("xen:demo") as vm:
        tap = vm.breakpoint(symbols()["open_file"])
        seen = finish(vm)
        assert tap.stats.hits == seen.calls["open_file"] == 500 * vm.vcpus


def test_a_tap_in_another_view_is_hit_only_while_the_guest_is_in_that_view(start: Start) -> None:
    start_demo(start, "mode=calls calls=100 parts=1 check=0", vcpus=1)
    with attach("xen:demo") as vm:
        own = vm.views.create()
        tap, other = vm.breakpoint(symbols()["open_file"], view=own), vm.breakpoint(symbols()["call_loop"])
        vm.views.switch_to(own)
        seen = finish(vm)
        assert (tap.stats.hits, other.stats.hits) == (100, 0)
        assert seen.calls["open_file"] == 100


def test_what_is_not_hidden_is_seen(start: Start) -> None:
    """The same breakpoint in a copy that may be read: the checks of the other tests can fail."""
    start_demo(start, "mode=calls calls=20 parts=1 callers=1", kinds=READ_KINDS)
    pa = symbols()["open_file"] - KERNEL_WINDOW
    hits = 0
    with attach("xen:demo") as vm:
        core, view = vmitap.VmiCore(vm), vm.views.create(Access.RWX)
        page = bytearray(core.read(pa & ~0xFFF, 4096))
        page[pa & 0xFFF] = 0xCC
        frame = core.allocate_frame()
        core.write(frame << 12, page)
        core.remap(view, pa >> 12, frame)
        vm.views.switch_to(view)
        begin(vm)
        while (event := vm.wait_event(timeout=60)) is not None:
            assert event.reason == "breakpoint"
            hits += 1
            vm.respond(event, vmitap.VmiEventResponse.fast_single_step(vm.views.default))
        seen = truth(vm)
    assert seen.finished
    assert hits == seen.calls["open_file"] == 20 * seen.vcpus
    assert seen.tampering_seen
    assert min(seen.vcpu_mismatches) > 0


@pytest.mark.parametrize("on_write", [vmitap.OnWrite.REAPPLY, vmitap.OnWrite.REMOVE])
@pytest.mark.seconds(1.5)
def test_a_write_to_a_hidden_page_does_what_its_policy_says(start: Start, on_write: vmitap.OnWrite) -> None:
    """The guest's checker writes each word of its text as it finds it (`lock xadd` of 0), the tapped one among them."""
    guest = start_demo(start, "mode=calls calls=10 parts=2", vcpus=1, kinds=["xadd"])
    with attach("xen:demo", on_write=on_write) as vm:
        tap = vm.breakpoint(symbols()["open_file"])
        seen = finish(vm)
        removed = on_write is vmitap.OnWrite.REMOVE
        assert vm.stats.hidden_writes > 0
        assert vm.stats.removed_by_write == (1 if removed else 0)
        # A tap that the first check removed misses the calls of the second part.
        assert tap.stats.hits == (5 if removed else 10)
        assert seen.calls["open_file"] == 10
        if on_write is vmitap.OnWrite.REAPPLY:
            assert_unseen(seen, ["xadd"])
    wait_for("the guest's verdict", lambda: "integrity:" in guest.console)


@pytest.mark.seconds(1.5)
def test_a_write_that_asks_is_asked_about_with_its_hit(start: Start) -> None:
    start_demo(start, "mode=calls calls=10 parts=2", vcpus=1, kinds=["xadd"])
    asked: list[bool] = []

    def ask(hit: vmitap.Hit) -> vmitap.OnWrite:
        asked.append(hit.access is not None and Access.W in hit.access)
        return vmitap.OnWrite.REAPPLY

    with attach("xen:demo") as vm:
        tap = vm.breakpoint(symbols()["open_file"], on_write=vmitap.OnWrite.ASK, ask=ask)
        seen = finish(vm)
        assert asked == [True] * seen.checks == [True] * 2
        assert tap.stats.hits == seen.calls["open_file"] == 10
        assert_unseen(seen, ["xadd"])


def test_a_write_that_cannot_be_thrown_away_is_an_error_and_the_guest_goes_on(start: Start) -> None:
    """Xen's emulator can leave out what an instruction writes, but not with a locked one."""
    guest = start_demo(start, "mode=calls calls=10 parts=2", vcpus=1, kinds=["xadd"])
    with attach("xen:demo", on_write=vmitap.OnWrite.DENY) as vm:
        vm.breakpoint(symbols()["open_file"])
        begin(vm)
        with pytest.raises(vmitap.NotSupportedError, match="throwing away"):
            vm.run(timeout=60)
    wait_for("the guest's verdict", lambda: "integrity:" in guest.console)
    assert ", 0 mismatches" in guest.console


def test_a_watch_sees_every_write_to_what_it_watches(start: Start) -> None:
    start_demo(start, "mode=calls calls=20 parts=1 check=0", vcpus=1)
    counter = symbols()["truth"] + 0x100  # calls of open_file
    with attach("xen:demo") as vm:
        watch = vm.watch(counter, 8, Access.W)
        seen = finish(vm)
        assert watch.stats.hits == seen.calls["open_file"] == 20
