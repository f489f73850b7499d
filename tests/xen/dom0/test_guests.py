"""The guests by themselves: what they say when nobody taps them is what the other tests compare with."""

from domain import VCPUS, Start, wait_for


def test_the_demo_guest_runs_to_its_end_on_xen(start: Start) -> None:
    guest = start("demo", "/job/demo.elf", f"rounds=3 tick=1000000 vcpus={VCPUS}")
    wait_for("the guest's verdict", lambda: "integrity:" in guest.console)
    assert f"integrity: {3 * VCPUS} checks, 0 mismatches" in guest.console


def test_the_demo_guest_calls_a_function_as_often_as_it_is_told_to(start: Start) -> None:
    guest = start("demo", "/job/demo.elf", f"mode=calls calls=1000 vcpus={VCPUS}")
    wait_for("the guest's verdict", lambda: "integrity:" in guest.console)
    assert ", 0 mismatches" in guest.console
