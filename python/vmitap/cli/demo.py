"""`vmitap demo`: a guest is tapped and asked whether it noticed; then the same without hiding, so that the answer means something."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import click

import vmitap
from vmitap.cli import exits
from vmitap.cli.options import json_option
from vmitap.cli.output import Output, per_second
from vmitap.cli.truth import READ_KINDS, Truth

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmitap import Hit, Vm
    from vmitap.cli.output import Json

TAPPED = ("open_file", "read_file", "check_licence", "spawn_task", "send_packet")

# Seconds after which a guest that has not come to its end is given up; it takes less than one.
_PATIENCE = 60.0

_OPEN_WRITE = 0x1
_OPEN_CREATE = 0x40


@click.command()
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True, help="How many rounds the guest's programs work.")
@click.option("--vcpus", type=click.IntRange(1, 8), default=2, show_default=True, help="How many vCPUs the guest has.")
@click.option("--calls", type=click.IntRange(1000), default=100_000, show_default=True, help="How many calls the speed is measured over.")
@json_option
def demo(rounds: int, vcpus: int, calls: int, as_json: bool) -> int:
    """Boot a small guest, tap it, and let it say whether it noticed.

    Five functions of its kernel get hidden breakpoints, and each hit is shown. Then the guest gives its verdict on its own code. Then the
    same once more with breakpoints that are not hidden. The exit code is 0 if the guest missed the first and saw the second, else 1.
    """
    out = Output(as_json=as_json)
    begin = perf_counter()
    hidden = _tapped_run(out, rounds, vcpus)
    control = _control_run(out, rounds, vcpus)
    fast = _speed(calls, None)
    handled = _speed(calls, _look)
    _show_speed(out, fast, handled)
    ok = hidden.is_unseen and hidden.is_complete and control.truth.tampering_seen and control.is_complete
    ok = ok and fast.hits == handled.hits == calls
    elapsed = perf_counter() - begin
    out.object(
        {
            "ok": ok,
            "elapsed": elapsed,
            "guest": hidden.guest,
            "hidden": {**hidden.to_json(), "hits": list(hidden.hits)},
            "not_hidden": control.to_json(),
            "speed": {"without_handler": fast.to_json(), "with_handler": handled.to_json()},
        }
    )
    if ok:
        out.line(("\nThe guest did not notice. ", "bold green"), (f"All of this took {elapsed:.1f} s. Next: vmitap trace open_file", ""))
    else:
        out.line(("\nSomething is wrong: ", "bold red"), ("see above; please report it with the output of vmitap doctor.", ""))
    return exits.OK if ok else exits.NO


@dataclass(frozen=True)
class _Run:
    """What a run of the guest was, seen from outside (`counted`, `hits`) and from inside (`truth`, `verdict`)."""

    guest: dict[str, Json]
    counted: Counter[str]
    hits: tuple[Json, ...]
    truth: Truth
    verdict: str

    @property
    def is_complete(self) -> bool:
        """Whether the guest came to its end and every call it counted was a hit."""
        return self.truth.finished and all(self.counted[name] == self.truth.calls[name] for name in TAPPED)

    @property
    def is_unseen(self) -> bool:
        """Whether the guest looked, on every vCPU, and found its code as it was built."""
        return min(self.truth.vcpu_checks) > 0 and not self.truth.tampering_seen and not any(self.truth.mismatches.values())

    def to_json(self) -> dict[str, Json]:
        """The run without its hits."""
        return {
            "verdict": self.verdict,
            "tampering_seen": self.truth.tampering_seen,
            "checks": self.truth.checks,
            "mismatches": dict(self.truth.mismatches),
            "functions": {name: {"calls": self.truth.calls[name], "hits": self.counted[name]} for name in TAPPED},
        }


def _tapped_run(out: Output, rounds: int, vcpus: int) -> _Run:
    """The guest with hidden breakpoints; prints each hit."""
    counted: Counter[str] = Counter()
    hits: list[Json] = []

    def show(hit: Hit) -> None:
        name = str(hit.symbol)
        values, shown = _DECODE[name](hit)
        counted[name] += 1
        hits.append({"timestamp": hit.timestamp, "vcpu": hit.vcpu, "symbol": name, **values})
        out.line(
            (f"{hit.timestamp * 1000:8.1f} ms  vCPU {hit.vcpu}  ", "dim"), (f"{name:<14}", "bold cyan"), (shown, _EMPHASIS.get(name, ""))
        )

    with vmitap.attach("demo", vcpus=vcpus, cmdline=f"rounds={rounds}") as vm:
        info = vm.info
        out.line(
            ("The demo guest: ", "bold"),
            (f"{vcpus} vCPU, {info.memory_size >> 20} MiB, {len(vm.symbols)} symbols, on {info.version}. Breakpoints, hidden, in:", ""),
        )
        for name in TAPPED:
            out.line((f"  {vm.symbol(name):#x}  ", "dim"), (name, "cyan"))
        out.text()
        vm.insert_many(TAPPED, show)
        vm.run(timeout=_PATIENCE)
        guest: dict[str, Json] = {"memory_size": info.memory_size, "vcpus": vcpus, "version": info.version}
        run = _Run(guest, counted, tuple(hits), Truth.read(vm), _verdict(vm))
    out.text()
    out.table(
        ["function", "calls the guest counted", "hits", ""],
        [[name, str(run.truth.calls[name]), str(counted[name]), _mark(run.truth.calls[name] == counted[name])] for name in TAPPED],
    )
    out.line(("The guest says: ", "bold"), (run.verdict, "bold green" if run.is_unseen else "bold red"))
    out.line((f"It read its code in {len(READ_KINDS)} ways: {', '.join(READ_KINDS)}.", "dim"))
    return run


def _control_run(out: Output, rounds: int, vcpus: int) -> _Run:
    """The guest with breakpoints that are not hidden: the same copies of pages, but the guest may read them.

    Nothing but that differs: hits are counted here too, and the instruction below each is executed in the clean view.
    """
    counted: Counter[str] = Counter()
    with vmitap.attach("demo", vcpus=vcpus, cmdline=f"rounds={rounds}") as vm:
        names = {vm.symbol(name): name for name in TAPPED}
        _plant_in_plain_sight(vm, names)
        go_on = vmitap.VmiEventResponse.fast_single_step(vm.views.default)
        give_up = perf_counter() + _PATIENCE
        while (event := vm.wait_event(timeout=max(0.0, give_up - perf_counter()))) is not None:
            if event.reason != "breakpoint":
                vm.respond(event, vmitap.VmiEventResponse.continue_())
            elif (name := names.get(event.registers.rip)) is not None:
                counted[name] += 1
                vm.respond(event, go_on)
            else:
                # The guest has an INT3 of its own, to look for debuggers.
                vm.respond(event, vmitap.VmiEventResponse.reinject())
        run = _Run({}, counted, (), Truth.read(vm), _verdict(vm))
    out.text()
    out.line(
        ("The same with breakpoints that are not hidden", "bold"),
        (f" ({sum(counted.values())} hits): the guest says: ", ""),
        (run.verdict, "bold yellow" if run.truth.tampering_seen else "bold red"),
    )
    return run


def _plant_in_plain_sight(vm: Vm, addresses: dict[int, str]) -> None:
    """Shows the guest copies of its pages with an INT3 at each address, readable like any other page."""
    core = vmitap.VmiCore(vm)
    view = vm.views.create(vmitap.Access.RWX)
    places = [vm.translate(address) for address in addresses]
    for gfn in sorted({pa >> 12 for pa in places}):
        page = bytearray(core.read(gfn << 12, 4096))
        for pa in places:
            if pa >> 12 == gfn:
                page[pa & 0xFFF] = 0xCC
        frame = core.allocate_frame()
        core.write(frame << 12, page)
        core.remap(view, gfn, frame)
    vm.views.switch_to(view)


@dataclass(frozen=True)
class _Speed:
    hits: int
    elapsed: float

    @property
    def rate(self) -> float:
        return self.hits / self.elapsed

    def to_json(self) -> dict[str, Json]:
        return {"hits": self.hits, "elapsed": self.elapsed, "hits_per_second": self.rate}


def _speed(calls: int, handler: Callable[[Hit], None] | None) -> _Speed:
    """How fast hits are while the guest does nothing but call one tapped function."""
    with vmitap.attach("demo", cmdline=f"mode=calls calls={calls} check=0") as vm:
        vm.breakpoint("open_file", handler)
        result = vm.run(timeout=_PATIENCE)
    return _Speed(result.hits, result.elapsed)


def _look(hit: Hit) -> None:
    """The handler whose cost is measured: it looks at one argument."""
    _ = hit.args[1]


def _show_speed(out: Output, fast: _Speed, handled: _Speed) -> None:
    out.line(
        ("\nSpeed: ", "bold"),
        (per_second(fast.rate).replace("/s", " hits/s"), "bold"),
        (" counted in Rust, ", ""),
        (per_second(handled.rate).replace("/s", " hits/s"), "bold"),
        (" with a Python handler; each hit executed its instruction in the clean view.", ""),
    )


def _verdict(vm: Vm) -> str:
    """The line the guest printed about itself."""
    for line in reversed(vm.console.splitlines()):
        if line.startswith("integrity: "):
            return line
    return "the guest did not come to its end"


def _mark(good: bool) -> str:
    return "all" if good else "NOT ALL"


def _open_file(hit: Hit) -> tuple[dict[str, Json], str]:
    path, flags = hit.vm.read_cstr(hit.args[0], 256), hit.args[1]
    mode = "write" if flags & _OPEN_WRITE else "read"
    if flags & _OPEN_CREATE:
        mode += ", create"
    return {"path": path, "flags": flags}, f"{_quoted(path)}  {mode}"


def _read_file(hit: Hit) -> tuple[dict[str, Json], str]:
    fd, size = hit.args[0] & 0xFFFF_FFFF, hit.args[2]
    return {"fd": fd, "size": size}, f"fd {fd}, up to {size} bytes"


def _check_licence(hit: Hit) -> tuple[dict[str, Json], str]:
    key = hit.vm.read_cstr(hit.args[0], 256)
    return {"key": key}, _quoted(key)


def _spawn_task(hit: Hit) -> tuple[dict[str, Json], str]:
    path = hit.vm.read_cstr(hit.args[0], 256)
    return {"path": path}, _quoted(path)


def _send_packet(hit: Hit) -> tuple[dict[str, Json], str]:
    number, size = hit.args[0] & 0xFFFF_FFFF, hit.args[2]
    address = ".".join(str(byte) for byte in number.to_bytes(4, "big"))
    begin = hit.vm.read(hit.args[1], min(size, 32)).decode("ascii", "replace")
    return {"address": address, "size": size, "begin": begin}, f"{address}  {size} bytes  {_quoted(begin)}"


def _quoted(text: str) -> str:
    """Guest text for a terminal: nothing in it can be a control sequence."""
    return repr(text)


_DECODE = {
    "open_file": _open_file,
    "read_file": _read_file,
    "check_licence": _check_licence,
    "spawn_task": _spawn_task,
    "send_packet": _send_packet,
}

_EMPHASIS = {"read_file": "dim", "spawn_task": "bold magenta", "send_packet": "yellow"}
