"""Hits and calls are equal, and the guest sees nothing: the point of it all."""

import pytest

from demo_guest import READ_KINDS, assert_unseen, finish, start_demo, symbols
from domain import Start, attach


@pytest.mark.seconds(5)
def test_every_call_is_a_hit_and_no_kind_of_read_finds_anything(start: Start) -> None:
    start_demo(start, "mode=calls calls=300 parts=1", vcpus=1, kinds=READ_KINDS)
    with attach("xen:demo") as vm:
        bp = vm.breakpoint(symbols()["open_file"])
        seen = finish(vm)
        assert bp.stats.hits == seen.calls["open_file"] == 300
        assert vm.stats.hidden_reads > 4096
        assert_unseen(seen, READ_KINDS)


def test_a_handler_is_called_with_the_arguments_of_each_call(start: Start) -> None:
    numbers: list[int] = []
    start_demo(start, "mode=calls calls=200 parts=1 check=0", vcpus=1)
    with attach("xen:demo") as vm:
        vm.breakpoint(symbols()["open_file"], lambda hit: numbers.append(hit.args[1] >> 32))
        finish(vm)
    assert numbers == list(range(200))
