"""What a hit and an insertion cost, in VM exits and hypercalls as Xen's own trace counts them."""

import pytest

from demo_guest import finish, start_demo, symbols
from domain import Start, attach
from xentrace import NOTIFY, SETUP, Trace, table

CALLS = 400


# How far other work of dom0 may show in the counts.
NOISE = 20


@pytest.mark.parametrize(
    ("stepping", "notifies", "monitor_traps"),
    # Toggled, Xen arms the trap once more before it hears that it is over (vmx_intr_assist): a second exit that nobody is told of.
    [("auto", 1, 0), ("fast", 1, 1), ("toggle", 2, 2)],
)
@pytest.mark.seconds(1.5)
def test_a_hit_costs_so_many_exits_and_hypercalls(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stepping: str, notifies: int, monitor_traps: int
) -> None:
    monkeypatch.setenv("VMITAP_XEN_STEPPING", stepping)
    start_demo(start, f"mode=calls calls={CALLS} parts=1 check=0", vcpus=1)
    with attach("xen:demo") as vm:
        tap = vm.breakpoint(symbols()["open_file"])
        with Trace() as trace:
            assert finish(vm).calls["open_file"] == CALLS
        assert tap.stats.hits == CALLS
    exits, calls = trace.exits, trace.hypercalls
    others = sum(calls[name] for name in SETUP)
    columns = ["stepping", "hits", "INT3 exits", "monitor traps", "EPT violations", NOTIFY, "all other calls of the driver"]
    row = (stepping, CALLS, exits["exception"], exits["monitor trap"], exits["EPT violation"], calls[NOTIFY], others)
    with capsys.disabled():
        print(table("a hit", columns, [row]))
    assert exits["exception"] == CALLS
    assert exits["monitor trap"] == CALLS * monitor_traps
    assert CALLS * notifies <= calls[NOTIFY] <= CALLS * notifies + NOISE
    assert others <= NOISE


def test_an_insertion_costs_by_pages_and_not_by_taps(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    start_demo(start, "mode=calls calls=1 parts=1 check=0", vcpus=1)
    rows: list[tuple[object, ...]] = []
    with attach("xen:demo") as vm:
        vm.breakpoint(symbols()["timer_tick"]).remove()  # the pool of frames is there
        where, root = symbols()["open_file"], vm.registers(0).cr3 & ~0xFFF  # not looked up at each insertion
        fresh = symbols()["copy_user"]
        assert fresh >> 12 != where >> 12
        cases = {
            "the first on a page": [where],
            "the second on it": [where + 4],
            "100 more on it": [where + 8 + n for n in range(100)],
            "40 at once on a fresh page": [fresh + n for n in range(40)],
        }
        for name, places in cases.items():
            with Trace() as trace:
                vm.insert_many(places, root=root)
            rows.append((name, len(places), *(trace.hypercalls[call] for call in SETUP), trace.hypercalls["mmu_update"]))
    with capsys.disabled():
        print(table("an insertion", ["what", "taps", *SETUP, "mmu_update"], rows))
    # What changes the domain; the one domctl is a look at the vCPU's paging, the mmu_updates are maps of its page tables and of the page.
    changes = [int(str(row[2])) + int(str(row[3])) for row in rows]
    looks = [int(str(row[4])) for row in rows]
    # The first one also has the four page tables on the way watched, which the others share.
    assert changes == [2 + 4, 0, 0, 2]
    assert max(looks) <= 1
    # The page, and the first time those tables; dom0 has some of its own. None is for each tap.
    assert max(int(str(row[6])) for row in rows) <= 5
