"""Xen domains, on the stand-in for Xen's libraries (crates/xen-sys/fake): one domain, and vCPUs of a handful of instructions.

Each test is a process of its own, because the library is named in its environment.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vmitap

SOURCE = Path(__file__).parents[2] / "crates" / "xen-sys" / "fake" / "fake.c"

# A guest that calls 0x8000 in a loop and reads the first byte there each time round; page tables that map every address to itself.
PREPARE = """
import ctypes, os, vmitap
fake = ctypes.CDLL(os.environ["VMITAP_LIBXENCTRL"])
fake.fake_memory.restype = ctypes.c_void_p
fake.fake_knob.restype = ctypes.POINTER(ctypes.c_long)
fake.fake_regs.restype = ctypes.POINTER(ctypes.c_uint64)
fake.fake_state.restype = fake.fake_calls.restype = ctypes.c_long
RAX, RBX, RSP, RIP = 0, 3, 4, 19
CODE = bytes.fromhex("555d8a03ebfa")
def write(address, data):
    ctypes.memmove(fake.fake_memory(address >> 12) + (address & 4095), data, len(data))
def state(what, index=0):
    return fake.fake_state(what.encode(), index)
for table, entry in ((0, 0x1000), (0x1000, 0x2000), (0x2000, 0x3000)):
    write(table, (entry | 7).to_bytes(8, "little"))
for page in range(64):
    write(0x3000 + page * 8, (page << 12 | 7).to_bytes(8, "little"))
write(0x8000, CODE)
fake.fake_knob(b"vcpus")[0] = 2
for vcpu in range(2):
    registers = fake.fake_regs(vcpu)
    registers[RIP], registers[RSP], registers[RBX] = 0x8000, 0x20000 + 0x1000 * vcpu, 0x8000
"""
UNTOUCHED = """
nothing = "maps listening monitors views altp2m pauses held single_step uds exposures".split()
for what, expected in {"populated": 64, **dict.fromkeys(nothing, 0)}.items():
    assert state(what) == expected, (what, state(what))
fake.fake_automatic(0)
assert fake.fake_run(0, 100) == 100
print("untouched")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("xen") / "libxenctrl.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-DVM_EVENT=7", "-DMINOR=17", str(SOURCE), "-o", str(path)], check=True)
    return path


def run(library: Path, code: str, *, check: bool = True, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VMITAP_LIBXENCTRL": str(library)}
    command = [sys.executable, "-W", "error", *options, "-c", PREPARE + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=check, env=environment)


def command(library: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VMITAP_LIBXENCTRL": str(library)}
    command = [sys.executable, "-W", "error", "-m", "vmitap", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_hits_are_handled_and_the_guest_reads_its_own_bytes(library: Path) -> None:
    done = run(
        library,
        """
with vmitap.attach("xen:guest") as vm:
    assert vm.info.driver == "xen" and vm.vcpus == 2, vm.info
    seen = []
    @vm.breakpoint(0x8000)
    def called(hit):
        seen.append((hit.vcpu, hit.regs.rip))
    fake.fake_automatic(50)
    result = vm.run(timeout=60, max_hits=50)
    assert result.reason == "max_hits" and len(seen) == 50, result
    assert {vcpu for vcpu, _ in seen} == {0, 1} and {rip for _, rip in seen} == {0x8000}
    assert vm.read_pa(0x8000, 6) == CODE
    for vcpu in range(2):
        assert fake.fake_regs(vcpu)[RAX] & 0xff == 0x55
"""
        + UNTOUCHED,
    )
    assert done.stdout == "untouched\n"


def test_a_handler_that_raises_leaves_nobody_standing(library: Path) -> None:
    done = run(
        library,
        """
try:
    with vmitap.attach("xen:7") as vm:
        @vm.breakpoint(0x8000)
        def called(hit):
            raise ValueError("no")
        fake.fake_automatic(50)
        vm.run(timeout=60)
except vmitap.HandlerError as error:
    print(type(error.error).__name__)
"""
        + UNTOUCHED,
    )
    assert done.stdout == "ValueError\nuntouched\n"


WAITS = ["vm.run(timeout=100)", "next(vm.events())", "vm.wait_event()", "await guest.run()", "await anext(guest.events())"]


@pytest.mark.parametrize("wait", WAITS)
def test_ctrl_c_ends_every_wait_and_restores_the_guest(library: Path, tmp_path: Path, wait: str) -> None:
    ready = tmp_path / "ready"
    code = f"""
import asyncio, vmitap.aio
def plain():
    with vmitap.attach("xen:guest") as vm:
        vm.breakpoint(0x8000)
        open({str(ready)!r}, "w").close()
        {wait if "await" not in wait else "pass"}
async def loop():
    # How long a callback took says nothing on a loaded machine.
    asyncio.get_running_loop().slow_callback_duration = 60
    async with vmitap.aio.attach("xen:guest") as guest:
        guest.breakpoint(0x8000)
        open({str(ready)!r}, "w").close()
        {wait if "await" in wait else "pass"}
try:
    {"asyncio.run(loop())" if "await" in wait else "plain()"}
except KeyboardInterrupt:
    print("interrupted")
"""
    environment = {**os.environ, "VMITAP_LIBXENCTRL": str(library)}
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", PREPARE + code + UNTOUCHED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    end = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.2)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (output, errors) == ("interrupted\nuntouched\n", "")
    assert time.monotonic() - begin < 5


def test_what_the_libraries_say_goes_to_logging_and_not_to_stderr(library: Path) -> None:
    done = run(
        library,
        """
import logging
lines = []
class Handler(logging.Handler):
    def emit(self, record):
        lines.append((record.levelname, record.getMessage()))
logging.getLogger("vmitap").addHandler(Handler())
fake.fake_knob(b"open_errno")[0] = 13
try:
    vmitap.attach("xen:guest")
except vmitap.AttachError as error:
    assert "root" in error.hint, error.hint
assert vmitap.attach("demo").info.driver == "emu"
print(lines)
""",
    )
    assert done.stderr == ""
    assert "xencall: cannot open privcmd" in done.stdout


def test_options_of_a_made_guest_are_refused_for_a_domain(library: Path) -> None:
    done = run(
        library,
        """
for option in ({"memory": 4096}, {"vcpus": 1}, {"cmdline": "x"}):
    try:
        vmitap.attach("xen:guest", **option)
    except vmitap.InvalidArgumentError as error:
        print(error.what)
"""
        + UNTOUCHED,
    )
    assert done.stdout == "memory\nvcpus\ncmdline\nuntouched\n"


def test_an_unknown_way_of_stepping_is_refused(library: Path) -> None:
    done = run(
        library,
        """
os.environ["VMITAP_XEN_STEPPING"] = "jump"
try:
    vmitap.attach("xen:guest")
except vmitap.InvalidArgumentError as error:
    print(error)
""",
    )
    assert "jump" in done.stdout


def test_list_shows_the_domains_and_what_is_in_the_way(library: Path) -> None:
    done = command(library, "list", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    [listed] = [json.loads(line) for line in done.stdout.splitlines()]
    assert listed["version"] == "xen 4.17.5 (vm_event 7)"
    control, guest = listed["domains"]
    assert (control["id"], control["name"]) == (0, "Domain-0")
    assert "control domain" in control["obstacle"]
    assert guest == {
        "id": 7,
        "name": "guest",
        "kind": "hvm",
        "vcpus": 1,
        "memory_size": 64 << 12,
        "target": "xen:guest",
        "obstacle": None,
        "hint": "",
    }
    lines = command(library, "list").stdout.splitlines()
    assert lines[2].split("\t") == ["7", "guest", "hvm", "1", "0", "yes"]


def test_doctor_says_that_xen_can_be_used_and_what_is_there(library: Path) -> None:
    [doctor] = [json.loads(line) for line in command(library, "doctor", "--json").stdout.splitlines()]
    [xen] = [driver for driver in doctor["drivers"] if driver["driver"] == "xen"]
    assert xen["usable"] is True
    assert xen["found"][1] == "xen:guest: can be tapped"
    assert str(library) in xen["found"][0]


@pytest.mark.skipif(Path("/proc/xen/privcmd").exists() or Path("/dev/xen/privcmd").exists(), reason="this is a Xen control domain")
def test_without_xen_everything_says_so_with_a_hint() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VMITAP_LIBXENCTRL"}
    run_command = [sys.executable, "-W", "error", "-m", "vmitap"]
    done = subprocess.run([*run_command, "list"], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 3
    assert "not a Xen control domain" in done.stderr
    assert "hint: run vmitap as root in the control domain" in done.stderr
    done = subprocess.run([*run_command, "doctor", "--json"], capture_output=True, text=True, timeout=60, env=environment)
    [xen] = [driver for driver in json.loads(done.stdout)["drivers"] if driver["driver"] == "xen"]
    assert xen["usable"] is False
    assert "control domain" in xen["hint"]


# journals, repair and the watchdog

TAPPED = """
vm = vmitap.attach("xen:guest", watchdog={watchdog})
vm.breakpoint(0x8000)
print("tapped", flush=True)
time.sleep(60)
"""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state"
    monkeypatch.setenv("VMITAP_STATE", str(folder))
    return folder


def kill_a_session(library: Path, *, watchdog: bool) -> None:
    environment = {**os.environ, "VMITAP_LIBXENCTRL": str(library)}
    code = PREPARE + "import time\n" + TAPPED.format(watchdog=watchdog)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as tool:
        assert tool.stdout is not None
        assert tool.stdout.readline() == "tapped\n"
        tool.kill()


def test_a_session_has_a_journal_that_only_its_owner_can_read_and_that_goes_with_it(library: Path, state: Path) -> None:
    done = run(
        library,
        f"""
import pathlib
state = pathlib.Path({str(state)!r})
with vmitap.attach("xen:guest") as vm:
    vm.breakpoint(0x8000)
    [journal] = state.iterdir()
    text = journal.read_text()
    assert oct(journal.stat().st_mode)[-3:] == "600" and oct(state.stat().st_mode)[-3:] == "700"
    assert "view 1\\n" in text and "frames 0x" in text and "monitor int3\\n" in text, text
    try:
        vmitap.attach("xen:7")
    except vmitap.AttachError as error:
        print(error.hint)
assert list(state.iterdir()) == []
""",
    )
    assert done.stdout == "end that session first: a guest has one at a time\n"


def test_what_a_killed_session_has_left_is_repaired_when_asked(library: Path, state: Path) -> None:
    kill_a_session(library, watchdog=False)
    [journal] = state.iterdir()
    refused = command(library, "info", "xen:guest")
    assert refused.returncode == 3
    assert "vmitap repair xen:guest" in refused.stderr
    assert journal.exists()
    done = command(library, "repair", "xen:guest", "--json")
    assert (done.returncode, json.loads(done.stdout)["repaired"]) == (0, True), done.stderr
    assert list(state.iterdir()) == []
    assert "nothing was left" in command(library, "repair", "xen:guest").stdout
    kill_a_session(library, watchdog=False)
    run(library, "vmitap.attach('xen:guest', repair=True).detach()\n" + UNTOUCHED)
    assert list(state.iterdir()) == []


def test_the_watchdog_repairs_at_once_when_the_tool_is_killed(library: Path, state: Path) -> None:
    kill_a_session(library, watchdog=True)
    end = time.monotonic() + 20
    while list(state.iterdir()):
        assert time.monotonic() < end, "the journal is still there"
        time.sleep(0.05)


DIES = """
import signal
dies = ctypes.CFUNCTYPE(None)(lambda: os.kill(os.getpid(), signal.SIGKILL))
fake.fake_die_at({call}, dies)
vmitap.attach("xen:guest")
"""


@pytest.mark.parametrize("call", range(12, 52, 8))
def test_the_watchdog_repairs_also_when_the_tool_is_killed_while_it_attaches(library: Path, state: Path, call: int) -> None:
    died = run(library, DIES.format(call=call), check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    end = time.monotonic() + 20
    while list(state.iterdir()):
        assert time.monotonic() < end, "the journal is still there"
        time.sleep(0.05)


def test_an_attach_that_fails_leaves_neither_journal_nor_watchdog(library: Path, state: Path) -> None:
    code = """
fake.fake_fail(b"xc_monitor_enable", 1, 12)
try:
    vmitap.attach("xen:guest")
except vmitap.VmitapError as error:
    print(type(error).__name__)
try:
    print(os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print("no child")
"""
    assert run(library, code).stdout.splitlines()[1:] == ["no child"]
    assert list(state.iterdir()) == []


def test_a_watchdog_has_no_privileges_beyond_its_users_files(library: Path, state: Path) -> None:
    environment = {**os.environ, "VMITAP_LIBXENCTRL": str(library)}
    command = [sys.executable, "-m", "vmitap.watchdog", "xen:guest"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as watchdog:
        end = time.monotonic() + 20
        wanted = {"NoNewPrivs": "1", "CapEff": "0" * 16, "CapPrm": "0" * 16, "CapInh": "0" * 16}
        while True:
            text = Path(f"/proc/{watchdog.pid}/status").read_text()
            status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
            if {name: status[name] for name in wanted} == wanted:
                break
            assert time.monotonic() < end, status
            time.sleep(0.05)
        assert watchdog.stdin is not None
        watchdog.stdin.close()
        assert watchdog.wait(timeout=20) == 0


def test_a_watchdog_has_nothing_open_but_what_it_waits_for(library: Path, state: Path) -> None:
    # Also what its tool would hand down to children: whoever waits for the other end of that pipe is not to wait for a watchdog.
    done = run(
        library,
        """
import pathlib, time
ours = os.pipe()
for end in ours:
    os.set_inheritable(end, True)
with vmitap.attach("xen:guest", watchdog=True) as vm:
    [watchdog] = pathlib.Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    folder, end = pathlib.Path(f"/proc/{watchdog}/fd"), time.monotonic() + 20
    def is_waiting():
        return pathlib.Path(f"/proc/{watchdog}/status").read_text().count("NoNewPrivs:\\t1")
    while not is_waiting() and time.monotonic() < end:
        time.sleep(0.05)
    for each in sorted(folder.iterdir()):
        print(each.name, os.readlink(each).split(":")[0])
""",
    )
    assert done.stdout.splitlines() == ["0 pipe", "1 /dev/null", "2 /dev/null"], (done.stdout, done.stderr)


def test_a_guest_that_ends_with_its_tool_needs_no_repair(library: Path, state: Path) -> None:
    refused = command(library, "repair", "demo")
    assert refused.returncode == 6
    assert "emu" in refused.stderr
    with vmitap.attach("demo", repair=True):
        assert not state.exists()


def test_an_asyncio_loop_waits_for_the_event_channel_and_needs_no_thread(library: Path) -> None:
    done = run(
        library,
        """
import asyncio, threading, vmitap.aio
from vmitap import SessionBusyError
async def main():
    asyncio.get_running_loop().slow_callback_duration = 60
    async with vmitap.aio.attach("xen:guest") as guest:
        vm = guest.vm
        assert vm.fileno() >= 0 and vm.fileno() == vm.fileno()
        threads = set()
        bp = guest.breakpoint(0x8000, lambda hit: threads.add(threading.current_thread().name))
        ticks = 0
        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)
        ticking = asyncio.create_task(tick())
        fake.fake_automatic(50)
        result = await guest.run(timeout=60, max_hits=50)
        assert (result.reason, result.hits, result.py_calls) == ("max_hits", 50, 50), result
        assert threads == {"MainThread"}, threads
        # Nothing to be done: it waits, others go on, and it ends in time.
        fake.fake_automatic(0)
        before = ticks
        result = await guest.run(timeout=0.3)
        assert result.reason == "timeout" and 0.25 < result.elapsed < 2, result
        assert ticks > before + 20, (before, ticks)
        # Hits one by one; the first iteration ends early.
        fake.fake_automatic(50)
        hits = []
        events = guest.events(bp, timeout=60)
        async for hit in events:
            hits.append((hit.vcpu, hit.regs.rip))
            if len(hits) == 20:
                break
        with_busy = asyncio.create_task(guest.run(timeout=60))
        try:
            await with_busy
        except SessionBusyError:
            print("busy")
        await events.aclose()
        assert {rip for _, rip in hits} == {0x8000}
        # Cancelled while it waits: no event is left unanswered.
        waiting = asyncio.create_task(guest.run())
        await asyncio.sleep(0.05)
        waiting.cancel()
        try:
            await waiting
        except asyncio.CancelledError:
            print("cancelled", state("held"))
        # stop() from anywhere wakes it, through the descriptor.
        fake.fake_automatic(0)
        looks, vmitap.aio._LOOK = vmitap.aio._LOOK, 60
        waiting = asyncio.create_task(guest.run())
        await asyncio.sleep(0.05)
        vm.stop()
        print((await asyncio.wait_for(waiting, 20)).reason)
        vmitap.aio._LOOK = looks
        # What a handler raises comes out, with the event answered.
        def fails(hit):
            raise ValueError("no")
        guest.breakpoint(0x8000, fails, key="fails")
        fake.fake_automatic(50)
        try:
            await guest.run(timeout=60)
        except vmitap.HandlerError as error:
            print(error.error, state("held"))
        ticking.cancel()
        assert threading.active_count() == 1, threading.enumerate()
asyncio.run(main())
"""
        + UNTOUCHED,
        options=("-X", "dev"),
    )
    assert done.stdout.splitlines() == ["busy", "cancelled 0", "stopped", "no 0", "untouched"], (done.stdout, done.stderr)
    assert done.stderr == ""


def test_leaving_a_loops_session_ends_what_still_runs_in_it(library: Path) -> None:
    done = run(
        library,
        """
import asyncio, vmitap.aio
async def main():
    asyncio.get_running_loop().slow_callback_duration = 60
    for use in (lambda guest: guest.run(), lambda guest: anext(guest.events())):
        async with vmitap.aio.attach("xen:guest") as guest:
            guest.breakpoint(0x8000)
            running = asyncio.ensure_future(use(guest))
            await asyncio.sleep(0.1)
        try:
            print((await asyncio.wait_for(running, 20)).reason)
        except StopAsyncIteration:
            print("no more")
asyncio.run(main())
"""
        + UNTOUCHED,
        options=("-X", "dev"),
    )
    assert done.stdout.splitlines() == ["stopped", "no more", "untouched"], (done.stdout, done.stderr)
    assert done.stderr == ""


@pytest.mark.parametrize("way", ["gone", "dying"])
@pytest.mark.parametrize("use", ["guest.run()", "anext(guest.events())"])
def test_a_domain_that_goes_away_is_noticed_by_a_loop_that_waits_for_it(library: Path, way: str, use: str) -> None:
    done = run(
        library,
        f"""
import asyncio, time, vmitap.aio
async def main():
    asyncio.get_running_loop().slow_callback_duration = 60
    async with vmitap.aio.attach("xen:guest") as guest:
        guest.breakpoint(0x8000)
        waiting = asyncio.ensure_future({use})
        await asyncio.sleep(0.2)
        assert not waiting.done()
        fake.fake_knob({way!r}.encode())[0] = 1
        before = time.monotonic()
        try:
            await asyncio.wait_for(waiting, 20)
        except vmitap.DomainGoneError:
            print("gone", time.monotonic() - before)
asyncio.run(main())
""",
        options=("-X", "dev"),
    )
    word, seconds = done.stdout.split()
    assert (word, float(seconds) < 1) == ("gone", True), (done.stdout, done.stderr)
    assert all(line.startswith("the guest is gone: ") for line in done.stderr.splitlines()), done.stderr


def test_what_an_asyncio_loop_has_no_room_for_is_counted_everywhere_and_said_once(library: Path) -> None:
    done = run(
        library,
        """
import asyncio, logging, vmitap.aio
logging.basicConfig(format="%(message)s")
async def main():
    async with vmitap.aio.attach("xen:guest") as guest:
        bp = guest.breakpoint(0x8000)
        fake.fake_automatic(50)
        events = guest.events(bp, timeout=2, queue=10)
        first = await anext(events)
        while events.result is None:
            await asyncio.sleep(0.01)
        rest = [hit async for hit in events]
        assert len(rest) == 10, len(rest)
        assert 11 + events.lost == bp.stats.hits > 20, (events.lost, bp.stats.hits)
        print(events.result.lost == events.lost == guest.vm.stats.lost)
asyncio.run(main())
"""
        + UNTOUCHED,
    )
    assert done.stdout.splitlines() == ["True", "untouched"], (done.stdout, done.stderr)
    assert done.stderr.count("10 hits wait in a queue") == 1, done.stderr


def test_a_coroutine_as_a_handler_of_a_domain_has_a_thread(library: Path) -> None:
    done = run(
        library,
        """
import asyncio, vmitap.aio
async def main():
    async with vmitap.aio.attach("xen:guest") as guest, vmitap.aio.attach("demo") as demo:
        seen = []
        async def look(hit):
            await asyncio.sleep(0)
            seen.append(hit.vm.read_u8(hit.address))
        guest.breakpoint(0x8000, look)
        demo.breakpoint("open_file")
        fake.fake_automatic(50)
        results = await asyncio.gather(guest.run(timeout=60, max_hits=10), demo.run(timeout=60, max_hits=10))
        print([result.hits for result in results], set(seen))
asyncio.run(main())
"""
        + UNTOUCHED,
    )
    assert done.stdout.splitlines() == ["[10, 10] {85}", "untouched"], (done.stdout, done.stderr)
