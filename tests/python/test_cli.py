"""The command line, as a program: what it prints, and how it ends. docs/cli.md is the contract."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import vmitap
from vmitap.cli import cli, exits
from vmitap.cli.output import Output, harmless

DOCS = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
VMITAP = (sys.executable, "-W", "error", "-m", "vmitap")


def vmitap_command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*VMITAP, *words], capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def objects(*words: str, code: int = 0) -> list[dict[str, Any]]:
    """What a command prints with --json; nothing else may be there."""
    done = vmitap_command(*words, "--json")
    assert (done.returncode, done.stderr) == (code, ""), done
    return [json.loads(line) for line in done.stdout.splitlines()]


def failure(*words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and error object of a command that fails."""
    done = vmitap_command(*words, "--json")
    assert done.stdout == ""
    error = json.loads(done.stderr.splitlines()[0])["error"]
    assert error["exit_code"] == done.returncode
    return done.returncode, error


# demo


def test_the_demo_shows_a_guest_that_notices_nothing_and_a_control_that_notices() -> None:
    begin = time.perf_counter()
    [demo] = objects("demo", "--calls", "20000")
    assert time.perf_counter() - begin < 10
    assert demo["ok"] is True
    hidden, control = demo["hidden"], demo["not_hidden"]
    assert hidden["tampering_seen"] is False
    assert set(hidden["mismatches"].values()) == {0}
    assert re.fullmatch(r"integrity: \d+ checks, 0 mismatches", hidden["verdict"])
    assert control["tampering_seen"] is True
    assert "TAMPERING SEEN" in control["verdict"]
    for run in (hidden, control):
        assert run["functions"].keys() == {"open_file", "read_file", "check_licence", "spawn_task", "send_packet"}
        assert all(each["hits"] == each["calls"] > 0 for each in run["functions"].values())
    assert hidden["functions"] == control["functions"]
    assert len(hidden["hits"]) == sum(each["hits"] for each in hidden["functions"].values())
    assert demo["speed"]["without_handler"]["hits"] == demo["speed"]["with_handler"]["hits"] == 20_000


def test_bench_says_what_a_hit_costs_by_what_is_done_with_it() -> None:
    [bench] = objects("bench", "--calls", "2000", "--turns", "1")
    assert (bench["ok"], bench["calls"], bench["turns"]) == (True, 2000, 1)
    costs = {each["way"]: each for each in bench["ways"]}
    assert len(costs) == len(bench["ways"]) == 7
    for each in bench["ways"]:
        assert each["call_ns"] - each["beyond_ns"] == pytest.approx(bench["untapped_ns"])
    assert costs["one that reads a string"]["call_ns"] > bench["untapped_ns"] > 0
    plain = vmitap_command("bench", "--calls", "2000", "--turns", "1").stdout.splitlines()
    assert plain[0].startswith("A call that is not tapped takes ")
    assert plain[1].split("\t")[0] == "what is done with a hit"
    assert len(plain) == 9


def test_the_demo_decodes_arguments() -> None:
    [demo] = objects("demo", "--calls", "1000", "--rounds", "4")
    hits = demo["hidden"]["hits"]
    assert {"/etc/motd", "/etc/shadow", "/tmp/.X11-cache"} <= {hit.get("path") for hit in hits}
    assert {hit["address"] for hit in hits if hit["symbol"] == "send_packet"} == {"198.51.100.7", "203.0.113.66"}
    assert {hit["key"] for hit in hits if hit["symbol"] == "check_licence"} == {"AAAA-BBBB-CCCC-DDDD"}
    assert [hit["path"] for hit in hits if hit["symbol"] == "spawn_task"][-1] == "/tmp/.X11-cache"
    assert 0x41 in {hit["flags"] for hit in hits if hit["symbol"] == "open_file"}


def test_the_demo_in_a_pipe_is_plain_lines() -> None:
    done = vmitap_command("demo", "--calls", "1000", "--rounds", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert re.search(r"vCPU \d  open_file +'/etc/motd'  read$", done.stdout, re.MULTILINE)
    assert re.search(r"^open_file\t(\d+)\t\1\tall$", done.stdout, re.MULTILINE)
    assert "The guest says: integrity: " in done.stdout
    assert "TAMPERING SEEN" in done.stdout
    assert "hits/s" in done.stdout


# trace


def test_trace_prints_an_object_for_each_hit_and_a_summary() -> None:
    *hits, last = objects("trace", "open_file", "check_licence", "--count", "5")
    assert len(hits) == last["summary"]["hits"] == last["summary"]["py_calls"] == 5
    assert last["summary"]["reason"] == "max_hits"
    assert {hit["symbol"] for hit in hits} <= {"open_file", "check_licence"}
    assert "/etc/motd" in {hit["strings"][0] for hit in hits}
    assert all(len(hit["args"]) == len(hit["strings"]) == 3 for hit in hits)


def test_trace_ends_when_the_guest_has_halted() -> None:
    done = vmitap_command("trace", "check_licence", "demo", "--cmdline", "rounds=3", "--args", "1")
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.endswith("ring 0  check_licence('AAAA-BBBB-CCCC-DDDD')") for line in lines)
    assert last.startswith("3 hits in ")
    assert "ended by idle" in last


def test_trace_takes_addresses_and_offsets() -> None:
    [hit, _] = objects("trace", "open_file+0x0", "demo", "--count", "1")
    assert objects("trace", hex(hit["address"]), "--count", "1")[0]["symbol"] == "open_file"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, exits.INTERRUPTED), (signal.SIGTERM, exits.TERMINATED)])
def test_a_signal_ends_a_trace_in_order(number: signal.Signals, code: int) -> None:
    words = ("trace", "call_loop", "demo", "--cmdline", "mode=calls calls=1000000000000")
    with subprocess.Popen([*VMITAP, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as trace:
        assert trace.stdout is not None
        assert "call_loop" in trace.stdout.readline()
        begin = time.perf_counter()
        trace.send_signal(number)
        _, complaints = trace.communicate(timeout=10)
        assert time.perf_counter() - begin < 2
    assert trace.returncode == code
    assert complaints.strip() == ("vmitap: interrupted; the guest has been restored" if number == signal.SIGINT else "")


def test_a_reader_that_goes_away_ends_a_trace_quietly() -> None:
    words = ("trace", "open_file", "demo", "--cmdline", "mode=calls calls=1000000000000")
    with subprocess.Popen([*VMITAP, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as trace:
        assert trace.stdout is not None
        assert trace.stderr is not None
        trace.stdout.readline()
        trace.stdout.close()
        assert trace.wait(timeout=10) == exits.PIPE
        assert trace.stderr.read() == ""


# info, read, translate, doctor


def test_info_says_what_the_guest_is() -> None:
    [info] = objects("info", "demo", "--vcpus", "2", "--memory", "32")
    assert (info["driver"], info["name"], info["memory_size"]) == ("emu", "demo", 32 << 20)
    assert info["capabilities"]["views"] is True
    [start] = objects("translate", "_start")
    assert [vcpu["rip"] for vcpu in info["vcpus"]] == [start["va"], start["va"]]
    assert all(vcpu["symbol"] for vcpu in info["vcpus"])
    text = vmitap_command("info").stdout
    assert re.search(r"^memory\t\d+ MiB$", text, re.MULTILINE)


def test_read_and_translate_agree() -> None:
    [read] = objects("read", "open_file", "16")
    [translated] = objects("translate", "open_file")
    assert translated["va"] == read["address"]
    assert translated["pa"] >> 12 == translated["gfn"]
    [physical] = objects("read", hex(translated["pa"]), "16", "--physical")
    assert physical["hex"] == read["hex"]
    assert len(read["hex"]) == 32
    [again] = objects("translate", hex(read["address"]), "--root", hex(translated["root"]))
    assert again["pa"] == translated["pa"]


def test_read_dumps_lines_of_sixteen_bytes_or_the_bytes_themselves() -> None:
    [read] = objects("read", "open_file", "20")
    data = bytes.fromhex(read["hex"])
    lines = vmitap_command("read", "open_file", "20").stdout.splitlines()
    assert [line[:16] for line in lines] == [f"{read['address']:016x}", f"{read['address'] + 16:016x}"]
    assert bytes.fromhex(lines[0][18:65]) == data[:16]
    raw = subprocess.run([*VMITAP, "read", "open_file", "20", "--raw"], capture_output=True, timeout=60, check=True)
    assert raw.stdout == data


def test_read_can_let_the_guest_run_first() -> None:
    [before] = objects("read", "truth", "8")
    [after] = objects("read", "truth", "8", "--run", "5", "--cmdline", "rounds=1")
    assert before["hex"] == "00" * 8
    assert bytes.fromhex(after["hex"]) == b"vmttruth"


def test_doctor_says_of_each_driver_whether_it_can_be_used() -> None:
    [doctor] = objects("doctor")
    assert doctor["version"] == vmitap.__version__
    usable = {each["driver"]: each["usable"] for each in doctor["drivers"]}
    assert usable == {"emu": True, "xen": False, "dump": True}
    assert all(each["missing"] for each in doctor["drivers"] if not each["usable"])
    assert "emu: can be used" in vmitap_command("doctor").stdout


def test_doctor_without_the_library_says_no_and_what_to_do() -> None:
    done = vmitap_command("doctor", VMITAP_LIBUNICORN="/no/such/library")
    assert (done.returncode, done.stderr) == (exits.NO, "")
    assert "emu: cannot be used" in done.stdout
    assert "/no/such/library" in done.stdout
    assert "hint: " in done.stdout


# run

SCRIPT = """
paths = []

@vm.breakpoint("open_file")
def opened(hit):
    if not paths:
        print(hit.vm.read_cstr(hit.args[0]))
    paths.append(hit.address)
"""


def test_run_gives_a_script_a_session_and_runs_the_guest(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = vmitap_command("run", str(script), "demo", "--cmdline", "rounds=2")
    assert done.returncode == 0
    assert done.stdout.startswith("/")
    assert re.fullmatch(r"\d+ hits in [\d.]+ s \(.*\), ended by idle\n", done.stderr)


def test_run_leaves_a_script_that_runs_the_guest_itself_alone(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "print(vm.run(timeout=60, max_hits=1).reason)\n")
    done = vmitap_command("run", str(script))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "max_hits"


@pytest.mark.parametrize("where", ["script", "handler"])
def test_run_shows_the_traceback_of_a_script_that_fails(tmp_path: Path, where: str) -> None:
    script = tmp_path / "script.py"
    script.write_text("1 / 0" if where == "script" else "@vm.breakpoint('open_file')\ndef opened(hit):\n    1 / 0\n")
    done = vmitap_command("run", str(script))
    assert done.returncode == exits.HANDLER
    assert "ZeroDivisionError" in done.stderr
    assert str(script) in done.stderr


# Errors


def test_an_unknown_symbol_is_named_with_the_nearest() -> None:
    code, error = failure("trace", "opne_file")
    assert (code, error["kind"]) == (exits.NOT_FOUND, "SymbolNotFoundError")
    assert "open_file" in error["message"]
    done = vmitap_command("trace", "opne_file")
    assert done.stderr.startswith("vmitap: symbol 'opne_file' is not known; the nearest are open_file")
    assert "Traceback" not in done.stderr


def test_errors_have_the_exit_codes_of_the_documentation(tmp_path: Path) -> None:
    broken = tmp_path / "broken.elf"
    broken.write_bytes(b"\x7fELF")
    assert failure("info", "emu:/no/such/file")[0] == exits.ATTACH
    assert failure("info", "nonsense")[0] == exits.ATTACH
    assert failure("info", f"emu:{broken}")[0] == exits.ATTACH
    assert failure("read", "no_such_symbol", "8")[0] == exits.NOT_FOUND
    assert failure("read", "0x700000000000", "8")[0] == exits.MEMORY
    assert failure("read", "0x800000000000", "8")[0] == exits.MEMORY
    assert failure("read", hex(1 << 40), "8", "--physical")[0] == exits.MEMORY
    assert failure("translate", "0x700000000000")[0] == exits.MEMORY


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-command"],
        ["trace"],
        ["trace", "demo"],
        ["read", "open_file"],
        ["read", "open_file", "0"],
        ["read", "open_file", "8", "--physical"],
        ["read", hex(1 << 64), "8"],
        ["info", "--vcpus", "9"],
        ["run", "/no/such/script.py"],
    ],
    ids=" ".join,
)
def test_a_command_line_that_makes_no_sense_ends_with_2_and_its_usage(words: list[str]) -> None:
    done = vmitap_command(*words)
    assert (done.returncode, done.stdout) == (exits.USAGE, "")
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr


# Texts


def test_every_command_has_help_and_is_documented() -> None:
    for name, command in cli.commands.items():
        assert command.help, name
        assert f"### `vmitap {name}" in DOCS, name
        done = vmitap_command(name, "--help")
        assert (done.returncode, done.stderr) == (0, "")


def test_every_exit_code_is_documented() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", DOCS, re.MULTILINE)}
    assert documented == {value for name, value in vars(exits).items() if name.isupper() and isinstance(value, int)}


def test_every_error_has_an_exit_code_that_is_documented() -> None:
    def subclasses(kind: type[vmitap.VmitapError]) -> list[type[vmitap.VmitapError]]:
        return [kind, *(each for child in kind.__subclasses__() for each in subclasses(child))]

    for kind in subclasses(vmitap.VmitapError):
        error = kind.__new__(kind)
        assert exits.code_of(error) in range(2, exits.RECORDING + 1), kind


def test_the_version_is_the_packages() -> None:
    assert vmitap_command("--version").stdout.split()[-1] == vmitap.__version__


def test_text_of_a_guest_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(as_json=False)
    out.text("a\x1b[31mb\rc\x9bd")
    out.table(["\x1b[2J"], [["x\x07"]])
    out.line(("\x1b]0;title\x07", "bold"))
    assert capsys.readouterr().out == "a\\x1b[31mb\\x0dc\\x9bd\n\\x1b[2J\nx\\x07\n\\x1b]0;title\\x07\n"
    assert harmless("plain, tab\tand line\n") == "plain, tab\tand line\n"


def test_on_a_terminal_there_is_colour_unless_no_color_is_set() -> None:
    def on_terminal(**environment: str) -> str:
        master, slave = os.openpty()
        try:
            with subprocess.Popen([*VMITAP, "info"], stdout=slave, env={**os.environ, "TERM": "xterm", **environment}) as info:
                os.close(slave)
                shown = b""
                while True:
                    try:
                        part = os.read(master, 65536)
                    except OSError:
                        break
                    if not part:
                        break
                    shown += part
            assert info.returncode == 0
        finally:
            os.close(master)
        return shown.decode()

    without = {name: "" for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM") if name in os.environ}
    coloured = on_terminal(**without)
    assert "\x1b[" in coloured
    plain = on_terminal(**{**without, "NO_COLOR": "1"})
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", plain)
    assert "memory" in plain
