"""`vmitap trace` with filters and files, and the page that `vmitap report` makes of them."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet
import pytest

import vmitap

VMITAP = (sys.executable, "-W", "error", "-m", "vmitap")
CAPTURE = ("--capture", "path=Cstr(Arg(0), max=64)", "--capture", "callers=Backtrace(4)", "--on-return", "fd=Reg.rax.i32")


def run(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*VMITAP, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done
    return done


def test_where_lets_only_the_hits_pass_that_it_names() -> None:
    done = run("trace", "open_file", "--where", "'alice' in Cstr(Arg(0)) and not Filter.ring(3)", "--count", "2", "--json")
    *hits, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert [hit["strings"][0] for hit in hits] == ["/home/alice/notes.txt"] * 2
    summary = last["summary"]
    assert (summary["hits"], summary["py_calls"], summary["filtered"] > 5) == (2, 2, True)
    assert 0 < summary["hold_p50"] <= summary["hold_p99"] <= summary["hold_max"]


@pytest.mark.parametrize("name", ["hits.parquet", "hits.jsonl"])
def test_rows_go_to_a_file_and_python_is_not_entered(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    done = run("trace", "open_file", "demo", "--cmdline", "rounds=3", "-o", str(path), *CAPTURE, "--json")
    file, last = (json.loads(line) for line in done.stdout.splitlines())
    assert (file["file"], file["rows"], file["lost"]) == (str(path), last["summary"]["hits"], 0)
    assert last["summary"]["py_calls"] == 0
    if name == "hits.parquet":
        rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == file["rows"] > 5
    assert {row["symbol"] for row in rows} == {"open_file"}
    assert "/etc/motd" in {row["path"] for row in rows}
    assert all(row["callers"] and isinstance(row["fd"], int) and row["duration_ns"] > 0 for row in rows)


def test_rows_to_standard_output_are_json_lines_and_nothing_else() -> None:
    done = run("trace", "open_file", "-o", "-", "--capture", "Arg(1)", "--count", "4")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["Arg(1)"] for row in rows] == [0, 0, 0, 0]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--where", "Arg(0"), 2, "is no expression"),
        (("--where", "__import__('os')"), 2, "where"),
        (("--where", "Arg(0)"), 2, "no condition"),
        (("--where", "Arg(1) == 1 and path == 5"), 2, "'path' at column 17: there is no 'path': a filter looks at"),
        (("--where", "Reg.rpc == 5"), 2, "'Reg.rpc' at column 1: there is no such register"),
        (("--capture", "path=Cstr(Arg(0))"), 2, "--output"),
        (("-o", "x.jsonl", "--capture", "a=print(5)"), 2, "capture"),
        (("-o", "x.jsonl", "--capture", "a=Filter.ring(3)"), 2, "cannot be captured"),
        (("-o", "x.jsonl", "--capture", "a=Cstr(Arg(0), max=1000000000)"), 2, "no length of 1 to 65536 bytes"),
        (("-o", "x.jsonl", "--capture", "time_ns=Arg(0)"), 2, "every row has a column"),
        (("-o", "x.jsonl", "--capture", "a=Struct(Arg(0), {'b': 5})"), 2, "'5' at column 22: a field is Mem"),
        (("-o", "x.jsonl", "--capture", "a=Struct(Arg(0), {b: Mem(0)})"), 2, "'b' at column 17: the name of a field"),
        (("-o", "x.jsonl", "--capture", "a=Struct(Arg(0), {**Arg(1)})"), 2, "the name of a field is needed"),
        (("-o", "x.jsonl", "--capture", "a={'b': Mem(0)}"), 2, "cannot be captured"),
        (("-o", "x.txt"), 2, "neither"),
        (("-o", "/nowhere/x.parquet"), 10, "could not be written"),
        (("-o", "/proc/self/x.jsonl"), 10, "could not be written"),
        (("--journal", "/nowhere/x.events"), 10, "not usable"),
        (("-o", "-", "--json"), 2, "leave --json out"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_an_exit_code(tmp_path: Path, words: tuple[str, ...], code: int, message: str) -> None:
    done = subprocess.run([*VMITAP, "trace", "open_file", *words], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == code, done
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_kind_of_column_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    expressions = [
        "head=Struct(Arg(0), {'first': Mem(0, 1), 'rest': Cstr(1, max=64)})",
        "flags=Arg(1).u32",
        "raw=Bytes(Arg(0), 2)",
        "wide=Utf16(Reg.rsp, max=8)",
        "stack=Stack(8)",
        "callers=Backtrace(2)",
        "Mem(Reg.rsp)",
    ]
    run("trace", "open_file", "demo", "--count", "2", "-o", str(path), *(word for each in expressions for word in ("--capture", each)))
    row = json.loads(path.read_text().splitlines()[0])
    assert list(row)[7:] == ["head.first", "head.rest", "flags", "raw", "wide", "stack", "callers", "Mem(Reg.rsp)"]
    assert (chr(row["head.first"]), row["head.rest"], row["raw"]) == ("/", "opt/app/app.conf", b"/o".hex())
    assert row["callers"][0] == row["Mem(Reg.rsp)"] == int.from_bytes(bytes.fromhex(row["stack"]), "little")


def test_a_reader_of_rows_that_goes_away_ends_the_command() -> None:
    command = [*VMITAP, "trace", "open_file", "demo", "--cmdline", "mode=calls calls=1000000000000 check=0", "-o", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert json.loads(child.stdout.readline())["symbol"] == "open_file"
        child.stdout.close()
        assert child.wait(timeout=60) == 141
        assert child.stderr.read() == ""


@pytest.mark.parametrize(("name", "blocks"), [("x.parquet", 2_000), ("x.jsonl", 30_000)])
def test_a_full_disk_ends_the_command_with_its_code_and_a_file_that_can_be_read(tmp_path: Path, name: str, blocks: int) -> None:
    # A limit on the size of files stands in for the end of a disk.
    words = [*VMITAP, "trace", "open_file", "demo", "--cmdline", "mode=calls calls=400000 check=0", "-o", name]
    command = ["sh", "-c", f'ulimit -f {blocks}; exec "$@"', "sh", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 10, done
    rows = int(re.search(r"File too large.*; (\d+) rows are in it", done.stderr)[1])  # type: ignore[index]
    assert "Traceback" not in done.stderr
    if name.endswith(".parquet"):
        assert pyarrow.parquet.read_table(tmp_path / name).num_rows == rows > 0
    else:
        lines = (tmp_path / name).read_text().splitlines()
        assert all(json.loads(line)["symbol"] == "open_file" for line in lines[:rows])
        assert len(lines) >= rows > 0


def test_on_a_terminal_there_is_a_live_table_of_rates(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = ("trace", "open_file", "demo", "--cmdline", "mode=calls calls=1000000000000 check=0", "--timeout", "2", "-o", "x.parquet")
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen([*VMITAP, *words], stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment) as child:
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                part = os.read(ours, 65536)
            except OSError:
                break
            if not part:
                break
            shown += part
        assert child.wait(timeout=60) == 0
    os.close(ours)
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode()
    assert re.search(r"open_file +│ +[\d,]+ +│ +[\d.]+ [Mk]/s", text), text[-2000:]
    assert re.search(r"\d+ rows in x.parquet", text)


# --- report ---


class _Page(HTMLParser):
    """What is in a page: tags that load something, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in {"src", "href", "onload", "onclick"}]
        if tag not in {"meta", "br"}:
            self.open.append(tag)
        if tag in {"script", "iframe", "link", "img"}:
            self.loads.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "hits.parquet"
    run("trace", "open_file", "read_file", "demo", "--cmdline", "rounds=10", "-o", str(path), *CAPTURE)
    return path


def test_a_report_is_one_page_that_loads_nothing_and_has_the_figures(recorded: Path) -> None:
    [line] = run("report", str(recorded), "--json").stdout.splitlines()
    result = json.loads(line)
    table = pyarrow.parquet.read_table(recorded)
    assert result["rows"] == table.num_rows
    text = Path(result["page"]).read_text()
    page = _Page(text)
    assert page.loads == []
    assert page.open == []
    words = " ".join(page.words)
    for expected in (f"{table.num_rows:,}", "open_file", "read_file", "/etc/motd", "Timeline", "Most frequent callers", "99 of 100"):
        assert expected in words, expected
    counts = [int(count.replace(",", "")) for count in re.findall(r"<title>(?:open_file|read_file): ([\d,]+) at", text)]
    assert sum(counts) == table.num_rows
    # A caller that has a name is shown by it, as the guest's own table has it.
    callers = {callers[0] for callers in table["callers"].to_pylist() if callers}
    with vmitap.attach("demo") as vm:
        names = {vm.symbolize(caller) for caller in callers}
    assert None not in names
    assert names <= set(page.words)
    assert not any(hex(caller) in words for caller in callers)


def test_callers_of_json_lines_are_named_by_a_target(tmp_path: Path) -> None:
    path = tmp_path / "hits.jsonl"
    run("trace", "open_file", "demo", "--count", "5", "-o", str(path), "--capture", "callers=Backtrace(2)")
    caller = json.loads(path.read_text().splitlines()[0])["callers"][0]
    with vmitap.attach("demo") as vm:
        name = vm.symbolize(caller)
    for words, shown, hidden in [((), hex(caller), name), (("--symbols", "demo"), name, hex(caller))]:
        run("report", str(path), *words)
        page = (tmp_path / "hits.jsonl.html").read_text()
        assert f">{shown}<" in page
        assert f">{hidden}<" not in page
    assert "cannot attach" in run("report", str(path), "--symbols", "emu:/nowhere", code=3).stderr


def test_names_in_a_file_are_text_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "hits.parquet"
    rows: dict[str, list[object]] = {"time_ns": [5], "hold_ns": [7], "vcpu": [0], "symbol": ["a"], "callers": [[16]]}
    name = "<img src=x onerror=alert(1)>/../../etc/passwd"
    for places, shown in [({"0x10": name}, name), ({"0x11": name}, "0x10"), ({"0x10": 5}, "5"), ({}, "0x10")]:
        table = pyarrow.table(rows).replace_schema_metadata({"vmitap.places": json.dumps(places)})
        pyarrow.parquet.write_table(table, path)
        run("report", str(path), "-o", str(tmp_path / "page.html"))
        page = _Page((tmp_path / "page.html").read_text())
        assert page.loads == []
        assert shown in page.words
        assert sorted(each.name for each in tmp_path.iterdir()) == ["hits.parquet", "page.html"]
    for places in ("no json", "[1]", '{"x": "y"}', "[" * 100_000):
        pyarrow.parquet.write_table(pyarrow.table(rows).replace_schema_metadata({"vmitap.places": places}), path)
        assert "makes no sense" in run("report", str(path), code=2).stderr


@pytest.mark.parametrize("version", ["2", "10", "", "1 ", "\u2460"])
def test_columns_of_another_version_are_refused_with_both_versions(recorded: Path, tmp_path: Path, version: str) -> None:
    table = pyarrow.parquet.read_table(recorded)
    metadata = dict(table.schema.metadata)
    assert metadata[b"vmitap.schema"] == b"1"
    path = tmp_path / "hits.parquet"
    pyarrow.parquet.write_table(table.replace_schema_metadata({**metadata, b"vmitap.schema": version.encode()}), path)
    done = run("report", str(path), code=2)
    assert f"{path} has columns of version {version!r}; vmitap {vmitap.__version__} reads version '1'" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["hits.parquet"]


def test_a_damaged_file_is_one_line(recorded: Path, tmp_path: Path) -> None:
    data = bytearray(recorded.read_bytes())
    data[100:2000] = bytes(1900)
    (tmp_path / "hits.parquet").write_bytes(data)
    assert "is damaged" in run("report", str(tmp_path / "hits.parquet"), code=2).stderr


def test_text_from_a_guest_cannot_become_markup(tmp_path: Path) -> None:
    row = {"time_ns": 5, "hold_ns": 7, "vcpu": 0, "symbol": "<script>alert(1)</script>", "path": "<img src=x onerror=alert(1)>&amp;"}
    path = tmp_path / "<b>.jsonl"
    path.write_text(json.dumps(row) + "\n")
    run("report", str(path), "-o", str(tmp_path / "page.html"))
    page = _Page((tmp_path / "page.html").read_text())
    assert page.loads == []
    assert "<script>alert(1)</script>" in " ".join(page.words)
    assert "<img src=x onerror=alert(1)>&amp;" in " ".join(page.words)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"time_ns": 1}\n', "no column 'hold_ns'"),
        ("a.jsonl", "no json\n", "line 1 is no JSON"),
        ("a.jsonl", "5\n", "no column 'time_ns'"),
        ("a.parquet", "no parquet", "is no Parquet file"),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    done = run("report", str(tmp_path / name), code=2)
    assert message in done.stderr
    assert not (tmp_path / f"{name}.html").exists()


def test_an_empty_recording_is_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    run("report", str(tmp_path / "a.jsonl"))
    assert "There are no rows." in (tmp_path / "a.jsonl.html").read_text()
