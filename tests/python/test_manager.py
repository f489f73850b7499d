"""What a manager of breakpoints promises, through Python and on the demo guest: owners, identities, roots, and what remains of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import OnWrite, VmiEventResponse

if TYPE_CHECKING:
    from collections.abc import Hashable

UNMAPPED = 0x7000_0000_0000


class Loop:
    """A manager with a loop of its own."""

    def __init__(self, vm: vmitap.Vm) -> None:
        self.vm = vm
        self.controller = vmitap.BreakpointController(vm)
        self.manager = vmitap.BreakpointManager(vm, self.controller)
        self.root, self.view = vm.registers().root, vm.views.tap
        self.step = VmiEventResponse.fast_single_step(vm.views.default)

    def insert(self, symbol: str, **more: object) -> bool:
        return self.manager.insert(self.vm.symbol(symbol), self.root, self.view, **more)  # type: ignore[arg-type]

    def next(self, symbol: str) -> vmitap.VmiEvent:
        """The next event at a symbol; others are answered."""
        va = self.vm.symbol(symbol)
        while (event := self.vm.wait_event(timeout=30)) is not None:
            if event.reason == "breakpoint" and event.registers.rip == va:
                return event
            own = event.reason == "breakpoint" and self.controller.is_breakpoint(event)
            self.vm.respond(event, VmiEventResponse.reinject() if own else self.step)
        raise AssertionError(f"{symbol} was not reached")

    def keys(self, event: vmitap.VmiEvent) -> list[Hashable]:
        return [each.key for each in self.manager.get_all_by_event(event)]


@pytest.fixture
def loop(vm: vmitap.Vm) -> Loop:
    return Loop(vm)


def test_any_hashable_is_a_key_and_any_object_a_tag(loop: Loop) -> None:
    tags: list[object] = [None, [1, 2], {"a": object()}, loop, lambda: 3]
    keys: list[Hashable] = [("a", 1), frozenset({2}), 3, "3", None]
    for key, tag in zip(keys, tags, strict=True):
        assert loop.insert("open_file", key=key, tag=tag, is_global=True)
    event = loop.next("open_file")
    found = loop.manager.get_all_by_event(event)
    assert [each.key for each in found] == keys
    assert all(each.tag is tag for each, tag in zip(found, tags, strict=True))
    for key, tag in zip(keys, tags, strict=True):
        one = loop.manager.get_by_event(event, key)
        assert one is not None
        assert (one.tag is tag, one.pa) == (True, event.pa)
    assert not loop.manager.contains_by_event(event, "nobody")
    with pytest.raises(TypeError):
        loop.insert("open_file", key=[])
    loop.vm.respond(event, loop.step)


def test_a_duplicate_keeps_the_first_tag_and_another_flag_is_refused(loop: Loop) -> None:
    assert loop.insert("open_file", key=1, tag="first")
    assert not loop.insert("open_file", key=1.0, tag="second")
    with pytest.raises(vmitap.BreakpointConflictError):
        loop.insert("open_file", key=1, is_global=True)
    assert [(each.key, each.tag, each.is_global) for each in loop.manager] == [(1, "first", False)]


@pytest.mark.parametrize("pa", [1 << 52, 2**64 - 1])
def test_a_hint_that_no_physical_address_can_be_is_refused_and_nothing_is_there(loop: Loop, pa: int) -> None:
    va = loop.vm.symbol("open_file")
    with pytest.raises(vmitap.InvalidArgumentError, match="more than 52 bits") as caught:
        loop.manager.insert_with_hint(va, loop.root, loop.view, pa)
    assert (caught.value.what, list(loop.manager)) == ("pa", [])
    assert loop.manager.insert(va, loop.root, loop.view)


def test_a_global_one_and_one_of_the_events_root_both_match_also_with_the_same_key(loop: Loop) -> None:
    loop.insert("open_file", key="k", tag="global", is_global=True)
    loop.insert("open_file", key="other", is_global=True)
    event = loop.next("open_file")
    here, va = event.registers.root, event.registers.rip
    assert here != loop.root
    assert loop.manager.insert(va, here, loop.view, key="k", tag="bound")
    assert [(each.key, each.tag) for each in loop.manager.get_all_by_event(event)] == [("k", "global"), ("other", None), ("k", "bound")]
    # The more exact one is the one of that key.
    found = loop.manager.get_by_event(event, "k")
    assert found is not None
    assert (found.tag, found.root, found.is_global) == ("bound", here, False)
    assert loop.manager.remove(va, here, loop.view, key="k")
    found = loop.manager.get_by_event(event, "k")
    assert found is not None
    assert found.tag == "global"
    loop.vm.respond(event, loop.step)


def test_globals_over_several_roots_and_pages_are_one_identity(loop: Loop) -> None:
    loop.insert("open_file", key="k", is_global=True)
    event = loop.next("open_file")
    here, va = event.registers.root, event.registers.rip
    assert loop.manager.insert(va, here, loop.view, key="k", is_global=True)
    # Under a third one it is on another page, as the caller knows.
    elsewhere = loop.vm.translate("boot_copy")
    assert loop.manager.insert_with_hint(va, 0x7000, loop.view, elsewhere, key="k", is_global=True)
    assert len(loop.manager) == 1
    assert vmitap.VmiCore(loop.vm).frames_in_use == 2
    assert loop.manager.contains_by_address(va, 0x1234_5000, loop.view)
    assert loop.manager.remove(va, 0x7000, loop.view, key="k")
    assert (len(loop.manager), loop.keys(event)) == (0, [])
    assert vmitap.VmiCore(loop.vm).frames_in_use == 0
    loop.vm.respond(event, loop.step)


def test_removal_by_event_takes_the_same_one_out_of_every_view(loop: Loop) -> None:
    other = loop.vm.views.create()
    va = loop.vm.symbol("open_file")
    for view in (loop.view, other):
        for key in ("k", "rest"):
            assert loop.manager.insert(va, loop.root, view, key=key, is_global=True)
    assert loop.manager.insert_with_hint(va, 0x7000, loop.view, None, key="k", is_global=True)
    event = loop.next("open_file")
    assert loop.manager.remove_by_event(event, "nobody") is None
    assert loop.manager.remove_by_event(event, "k") is False
    assert sorted((str(each.key), each.view.id) for each in loop.manager) == [("rest", loop.view.id), ("rest", other.id)]
    assert loop.manager.remove_by_view(other) == 1
    assert loop.manager.remove_by_event(event, "rest") is True
    assert (len(loop.manager), loop.manager.remove_by_view(loop.view)) == (0, 0)
    loop.vm.respond(event, loop.step)


def test_what_is_planted_is_removed_whatever_the_address_is_mapped_to_by_then(loop: Loop) -> None:
    vm, root = loop.vm, loop.root
    # The low addresses once more at UNMAPPED, and later no more.
    entry, mapping = root + 224 * 8, vm.read_pa(root, 8)
    pa = vm.translate("open_file")
    for change in (bytes(8), mapping[:1] + bytes([mapping[1]]) + bytes(6)):
        vm.write_pa(entry, mapping)
        assert loop.manager.insert(UNMAPPED + pa, root, loop.view, key="k")
        assert [each.pa for each in loop.manager] == [pa]
        vm.write_pa(entry, change)
        assert loop.manager.remove(UNMAPPED + pa, root, loop.view, key="k")
        assert (len(loop.manager), vmitap.VmiCore(vm).frames_in_use) == (0, 0)
    assert loop.manager.insert(UNMAPPED, root, loop.view)
    assert [each.pa for each in loop.manager] == [None]
    assert loop.manager.remove(UNMAPPED, root, loop.view)
    assert not loop.manager.remove(UNMAPPED, root, loop.view)


def test_a_hint_that_is_out_of_date_removes_what_is_planted_and_what_waits(loop: Loop) -> None:
    vm, root = loop.vm, loop.root
    entry, mapping, pa = root + 224 * 8, vm.read_pa(root, 8), vm.translate("open_file")
    for hint in (None, pa, pa + 0x1000):
        for is_planted in (True, False):
            vm.write_pa(entry, mapping)
            assert loop.manager.insert_with_hint(UNMAPPED + pa, root, loop.view, pa if is_planted else None, key="k")
            vm.write_pa(entry, bytes(8))
            assert not loop.manager.remove_with_hint(UNMAPPED + pa, root, loop.view, hint, key="other")
            assert loop.manager.remove_with_hint(UNMAPPED + pa, root, loop.view, hint, key="k")
            assert not loop.manager.remove_with_hint(UNMAPPED + pa, root, loop.view, hint, key="k")
            assert (len(loop.manager), vmitap.VmiCore(vm).frames_in_use) == (0, 0)


def test_removal_by_event_and_by_view_goes_by_what_is_planted(loop: Loop) -> None:
    """The page of the breakpoint that was hit is mapped no more when it is removed: planted in one view, pending in the other."""
    vm, other = loop.vm, loop.vm.views.create()
    assert loop.insert("open_file", key="k", is_global=True)
    event = loop.next("open_file")
    root, va, pa = event.registers.root, event.registers.rip, event.pa
    assert loop.manager.insert(va, root, loop.view, key="own")
    for key in ("k", "own"):
        assert loop.manager.insert_with_hint(va, root, other, None, key=key, is_global=key == "k")
    low = vm.symbol("boot_copy")
    for view in (loop.view, other):
        assert loop.manager.insert(low, loop.root, view, key="low")
    entries = [table + (va >> 39) % 512 * 8 for table in {root, loop.root}]
    mappings = [vm.read_pa(entry, 8) for entry in entries]
    for entry in entries:
        vm.write_pa(entry, bytes(8))
    with pytest.raises(vmitap.TranslationError):
        vm.translate(va, root)
    assert {each.pa for each in loop.manager.get_all_by_event(event)} == {pa}
    assert loop.manager.remove_by_event(event, "own") is False
    assert loop.manager.remove_by_event(event, "k") is True
    assert sorted((each.key, each.view.id) for each in loop.manager) == [("low", loop.view.id), ("low", other.id)]
    assert (loop.manager.remove_by_view(other), loop.manager.remove_by_view(loop.view)) == (1, 1)
    assert (len(loop.manager), vmitap.VmiCore(vm).frames_in_use) == (0, 0)
    for entry, mapping in zip(entries, mappings, strict=True):
        vm.write_pa(entry, mapping)
    loop.vm.respond(event, loop.step)
    assert vm.run(timeout=30).reason == "idle"
    assert " checks, 0 mismatches" in vm.console


# --- the session's own breakpoints ---


def test_breakpoints_are_found_by_address_page_key_and_tag_while_they_are_there(vm: vmitap.Vm) -> None:
    key, tag = ("files", 1), {"any": ["thing"]}
    opened = vm.breakpoint("open_file", key=key, tag=tag)
    read, waiting = vm.breakpoint("read_file", key=key), vm.breakpoint(UNMAPPED, tag=tag)
    assert list(vm.breakpoints) == [opened, read, waiting]
    assert (vm.breakpoints.at("open_file"), vm.breakpoints.at(UNMAPPED)) == ([opened], [waiting])
    assert vm.breakpoints.by_key(("files", 1)) == [opened, read]
    assert vm.breakpoints.by_tag({"any": ["thing"]}) == [opened, waiting]
    assert vm.breakpoints.on_page(UNMAPPED + 4095) == [waiting]
    assert opened in vm.breakpoints.on_page("open_file")
    opened.disable()
    assert vm.breakpoints.at("open_file") == [opened]
    vm.breakpoints.remove_many(vm.breakpoints.by_key(key))
    assert (list(vm.breakpoints), opened.state, read.state) == ([waiting], "removed", "removed")
    # Its key is free again.
    assert vm.breakpoint("open_file", key=key).state == "active"


def test_many_are_put_in_and_taken_out_by_page(vm: vmitap.Vm) -> None:
    start, end = vm.symbol("text_start"), vm.symbol("text_end")
    everywhere = vm.insert_many(range(start, end, 16))
    watch = vm.watch("boot_copy", 8, vmitap.Access.W)
    assert len(everywhere) == (end - start) // 16
    assert vm.stats.shadow_frames >= (end - start) // 4096
    page = vm.breakpoints.on_page(start)
    assert len(page) == 256
    vm.breakpoints.remove_many(page)
    assert {bp.state for bp in page} == {"removed"}
    assert len(vm.breakpoints) == len(everywhere) + 1 - 256
    vm.breakpoints.remove_many([*everywhere, watch, watch])
    assert (len(vm.breakpoints), vm.stats.shadow_frames, watch.state) == (0, 0, "removed")
    with vmitap.attach("demo") as other, pytest.raises(vmitap.InvalidArgumentError):
        vm.breakpoints.remove_many([other.breakpoint("open_file")])


def test_a_breakpoint_for_one_hit_is_gone_before_the_vcpu_goes_on(vm: vmitap.Vm) -> None:
    seen: list[int] = []
    once = vm.breakpoint("open_file", lambda hit: seen.append(hit.vcpu), once=True)
    silent = vm.breakpoint("open_file", once=True)
    steady = vm.breakpoint("open_file")
    pending = vm.breakpoint(UNMAPPED, once=True)
    many = vm.insert_many(["read_file", "close_file"], once=True)
    assert vm.run(timeout=30).reason == "idle"
    assert (len(seen), once.stats.hits, silent.stats.hits, once.state, silent.state) == (1, 1, 1, "removed", "removed")
    assert steady.stats.hits > 100
    assert [(bp.stats.hits, bp.state) for bp in many] == [(1, "removed")] * 2
    assert pending.state == "pending"
    assert " checks, 0 mismatches" in vm.console


def test_hits_are_counted_while_it_is_enabled(vm: vmitap.Vm) -> None:
    bp = vm.breakpoint("open_file", on_write=OnWrite.DENY)
    vm.run(timeout=30, max_hits=10)
    bp.disable()
    other = vm.breakpoint("open_file")
    vm.run(timeout=30, max_hits=10)
    assert (bp.stats.hits, other.stats.hits) == (10, 10)
    bp.enable()
    vm.run(timeout=30, max_hits=10)
    assert (bp.stats.hits, other.stats.hits) == (15, 15)
