"""Xen domains, on the stand-in for Xen's libraries (stand_in.py)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vmitap
from stand_in import PREPARE, UNTOUCHED, command, run


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
