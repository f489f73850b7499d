"""Captures and recordings on the demo guest: what the rows hold, how they leave, and what happens when they cannot."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import polars
import pyarrow
import pyarrow.parquet
import pytest

import vmitap
from vmitap import Access, Arg, Backtrace, Bytes, Cstr, Filter, InvalidArgumentError, Mem, Reg, Stack, Struct, Utf16

if TYPE_CHECKING:
    from vmitap import Hit, Vm
    from vmitap.capture import Capturable

PATHS = ["/opt/app/app.conf", "/opt/app/data.db", "/etc/update.conf", "/etc/motd", "/home/alice/notes.txt", "/var/log/app.log"]
CALLS = "mode=calls calls={} check=0"


def columns(vm: Vm, *names: str) -> list[tuple[object, ...]]:
    table = vm.recording.to_arrow()
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def test_a_row_has_what_a_handler_would_have_seen(vm: Vm) -> None:
    seen: list[tuple[object, ...]] = []

    def look(hit: Hit) -> None:
        path = hit.vm.read_cstr(hit.args[0])
        raw = hit.vm.read(hit.regs.rsp, 24)
        seen.append((hit.vcpu, hit.address, hit.root, path, hit.args[1], hit.args[3] & 0xFF, raw, raw[:4], path.encode()[1:3]))

    head = Struct(Arg(0), {"slash": Mem(0, 1), "next": Bytes(1, 2)})
    capture: dict[str, Capturable] = {
        "path": Cstr(Arg(0), max=64),
        "flags": Arg(1),
        "length": Arg(3).u8,
        "stack": Stack(24),
        "low": Bytes(Reg.rsp, 4),
        "head": head,
        "callers": Backtrace(3),
        "nothing": Mem(0x10),
    }
    vm.breakpoint("open_file", look, capture=capture)
    result = vm.run(timeout=20, max_hits=6)
    names = ("vcpu", "address", "root", "path", "flags", "length", "stack", "low", "head.next")
    assert columns(vm, *names) == seen
    assert [path for (path,) in columns(vm, "path")] == PATHS
    assert columns(vm, "head.slash", "nothing", "symbol") == [(ord("/"), None, "open_file")] * 6
    assert (result.hits, result.py_calls, vm.stats.rows) == (6, 6, 6)
    for callers, stack in columns(vm, "callers", "stack"):
        assert isinstance(callers, list)
        assert isinstance(stack, bytes)
        assert callers[0] == int.from_bytes(stack[:8], "little")
        assert (vm.symbolize(callers[0]) or "").startswith("syscall_")


def test_captures_do_not_enter_python_and_types_are_those_of_the_expressions(vm: Vm) -> None:
    numbers: dict[str, Capturable] = {"a": Arg(1).u32, "b": Arg(1).i8, "c": Mem(Arg(0), 2), "d": Mem(Arg(0), 4).i32, "e": Arg(0) + 1}
    capture = {**numbers, "f": Stack(8)}
    vm.breakpoint("open_file", capture=capture)
    assert vm.run(timeout=20, max_hits=3).py_calls == 0
    schema = vm.recording.to_arrow().schema
    assert [str(schema.field(name).type) for name in capture] == ["uint32", "int8", "uint16", "int32", "uint64", "binary"]
    assert schema.metadata[b"vmitap.schema"] == b"1"
    assert int(schema.metadata[b"vmitap.began_unix_ns"]) > 1_700_000_000_000_000_000


VERSION_1 = [
    ("time_ns", "uint64 not null"),
    ("hold_ns", "uint64 not null"),
    ("vcpu", "uint16 not null"),
    ("breakpoint", "uint32 not null"),
    ("symbol", "dictionary<values=string, indices=int32, ordered=0> not null"),
    ("address", "uint64 not null"),
    ("root", "uint64 not null"),
    *((f"{kind}{bits}", f"{'uint' if kind == 'u' else 'int'}{bits}") for bits in (8, 16, 32, 64) for kind in "ui"),
    ("bytes", "binary"),
    ("cstr", "string"),
    ("utf16", "string"),
    ("stack", "binary"),
    ("callers", "list<item: uint64 not null>"),
    ("head.byte", "uint8"),
    ("head.text", "string"),
    ("result", "int32"),
    ("duration_ns", "uint64"),
]
"""Version 1 of the schema. Files of it are out there: whoever changes a line here makes a version 2."""


def test_the_schema_is_that_of_version_1_whichever_way_it_leaves(vm: Vm, tmp_path: Path) -> None:
    numbers: dict[str, Capturable] = {name: Reg.rax if name == "u64" else getattr(Reg.rax, name) for name, _ in VERSION_1[7:15]}
    texts: dict[str, Capturable] = {"bytes": Bytes(Arg(0), 4), "cstr": Cstr(Arg(0)), "utf16": Utf16(Arg(0))}
    others: dict[str, Capturable] = {
        "stack": Stack(8),
        "callers": Backtrace(2),
        "head": Struct(Arg(0), {"byte": Mem(0, 1), "text": Cstr(0)}),
    }
    vm.breakpoint("open_file", capture={**numbers, **texts, **others}, on_return={"result": Reg.rax.i32})
    vm.run(timeout=20, max_hits=3)
    vm.recording.write_parquet(tmp_path / "whole.parquet")
    with vm.record_to(tmp_path / "along.parquet"):
        vm.run(timeout=20, max_hits=3)
    schemas = [pyarrow.RecordBatchReader.from_stream(vm.recording).schema, vm.recording.to_arrow().schema]
    schemas += [pyarrow.parquet.read_schema(tmp_path / f"{name}.parquet") for name in ("whole", "along")]
    for schema in schemas:
        assert [(field.name, f"{field.type}{'' if field.nullable else ' not null'}") for field in schema] == VERSION_1
        assert schema.metadata[b"vmitap.schema"] == b"1"


def test_return_values_complete_the_rows_of_their_calls() -> None:
    with vmitap.attach("demo", cmdline="rounds=3") as vm:
        vm.breakpoint("open_file", capture={"path": Cstr(Arg(0))}, on_return={"fd": Reg.rax.i32})
        vm.breakpoint("read_file", capture={"size": Arg(2)}, on_return={"got": Reg.rax.i64})
        result = vm.run(timeout=60)
        assert result.reason == "idle"
        table = vm.recording.to_polars()
        assert table.height == result.hits
        opened = table.filter(polars.col("symbol") == "open_file")
        read = table.filter(polars.col("symbol") == "read_file")
        assert opened["fd"].min() is not None
        assert opened["fd"].null_count() == 0
        assert opened["size"].null_count() == opened.height
        assert (read["got"] <= read["size"].cast(polars.Int64)).all()
        assert read["duration_ns"].min() is not None
        assert vm.stats.returns_lost == 0


def test_a_verdict_that_leaves_the_function_is_a_return_too(vm: Vm) -> None:
    vm.breakpoint("check_licence", lambda hit: vmitap.Verdict.return_from_function(1), on_return={"said": Reg.rax})
    vm.run(timeout=20, max_hits=2)
    assert columns(vm, "said")[0] == (1,)


def test_the_same_name_is_the_same_column_and_another_type_is_refused(vm: Vm) -> None:
    vm.breakpoint("open_file", capture={"first": Arg(0)})
    vm.breakpoint("read_file", capture={"first": Arg(0), "size": Arg(2)})
    for wrong in ({"first": Cstr(Arg(0))}, {"time_ns": Arg(0)}, {"": Arg(0)}, {"fresh": Arg(1), "first": Arg(0).u8}):
        with pytest.raises(InvalidArgumentError, match="capture"):
            vm.breakpoint("write_file", capture=wrong)
    assert len(vm.breakpoints) == 2
    assert vm.recording.columns[7:] == ["first", "size"]
    vm.run(timeout=20, max_hits=10)
    assert {(symbol, size is None) for symbol, size in columns(vm, "symbol", "size")} == {("open_file", True), ("read_file", False)}


@pytest.mark.parametrize(
    "capture",
    [5, {"a": 5}, {"a": Filter.ring(3)}, {5: Arg(0)}, {"a": "Arg(0)"}, [("a", Arg(0))], {"a": lambda hit: 1}],
)
def test_what_cannot_be_captured_is_a_type_error(vm: Vm, capture: object) -> None:
    with pytest.raises(TypeError):
        vm.breakpoint("open_file", capture=capture)  # type: ignore[arg-type]
    assert len(vm.breakpoints) == 0


def test_structs_are_refused_when_they_are_built() -> None:
    with pytest.raises(TypeError, match="is no field"):
        Struct(Arg(0), {"a": 5})  # type: ignore[dict-item]
    for fields in ({}, {"a": Mem(Arg(1), 4)}, {"a": Arg(0)}):
        with pytest.raises(InvalidArgumentError, match=r"Struct\(Arg\(0\)"):
            Struct(Arg(0), fields)
    assert repr(Struct(Arg(0) + 8, {"pid": Mem(16, 4).i32})) == "Struct(Arg(0) + 8, {'pid': Mem(16, 4).i32})"


def test_watches_capture_too(vm: Vm) -> None:
    vm.watch("files", 4096, Access.RW, capture={"by": Reg.rip})
    vm.run(timeout=20, max_hits=4)
    rows = columns(vm, "by", "address")
    assert len(rows) == 4
    assert all(vm.symbol("files") <= int(str(address)) < vm.symbol("files") + 4096 for _, address in rows)


# --- the ways out ---


def test_every_way_out_has_the_same_rows(vm: Vm, tmp_path: Path) -> None:
    vm.breakpoint("open_file", capture={"path": Cstr(Arg(0)), "raw": Bytes(Arg(0), 2), "callers": Backtrace(2)})
    vm.run(timeout=20, max_hits=5)
    table = vm.recording.to_arrow()
    assert table.num_rows == len(vm.recording) == 5
    assert vm.recording.to_polars()["path"].to_list() == PATHS[:5]
    assert list(vm.recording.to_pandas()["path"]) == PATHS[:5]
    assert pyarrow.RecordBatchReader.from_stream(vm.recording).read_all() == table
    assert polars.DataFrame(vm.recording).height == 5
    vm.recording.write_parquet(tmp_path / "a.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist() == table.to_pylist()
    assert polars.read_parquet(tmp_path / "a.parquet")["path"].to_list() == PATHS[:5]
    vm.recording.write_jsonl(tmp_path / "a.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [{**line, "raw": bytes.fromhex(line["raw"])} for line in lines] == table.to_pylist()
    vm.recording.clear()
    assert (len(vm.recording), vm.recording.rows) == (0, 5)
    # What was taken out stays as it was.
    assert table.num_rows == 5


def test_rows_outlive_their_session() -> None:
    with vmitap.attach("demo") as vm:
        vm.breakpoint("open_file", capture={"path": Cstr(Arg(0))})
        vm.run(timeout=20, max_hits=2)
        recording = vm.recording
    assert recording.to_arrow()["path"].to_pylist() == PATHS[:2]
    table = recording.to_arrow()
    del vm, recording
    assert table["path"].to_pylist() == PATHS[:2]


def addresses(table: pyarrow.Table) -> list[list[int]]:
    """Where the values of each chunk of each column lie; its validity, offsets and names too."""
    chunks = [chunk for column in table.columns for chunk in column.chunks]
    whole = [(*chunk.buffers(), *(chunk.dictionary.buffers() if isinstance(chunk, pyarrow.DictionaryArray) else ())) for chunk in chunks]
    return [[buffer.address for buffer in buffers if buffer is not None] for buffers in whole]


def test_what_is_taken_out_twice_is_in_memory_once() -> None:
    with vmitap.attach("demo", cmdline=CALLS.format(3000)) as vm:
        capture: dict[str, Capturable] = {"n": Arg(1).u32, "path": Cstr(Arg(0)), "raw": Bytes(Arg(0), 8), "callers": Backtrace(2)}
        vm.breakpoint("open_file", capture=capture)
        vm.run(timeout=60, max_hits=1000)
        first, second = vm.recording.to_arrow(), vm.recording.to_arrow()
        assert addresses(first) == addresses(second)
        assert len({at for chunk in addresses(first) for at in chunk}) > 15 > len(addresses(first)) > 10
        vm.run(timeout=60, max_hits=2000)
        more = vm.recording.to_arrow()
        assert (first.num_rows, more.num_rows) == (1000, 3000)
        assert [addresses(more.select([name]))[0] for name in first.column_names] == addresses(first)
        # The check can fail.
        copy = pickle.loads(pickle.dumps(first))
        assert copy == first
        assert addresses(copy) != addresses(first)


def resident() -> int:
    """Bytes of memory that this process has and needs."""
    # What was freed may still be kept for what comes.
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_streams_that_nobody_takes_leave_nothing_behind(vm: Vm) -> None:
    vm.breakpoint("open_file", capture={str(number): Mem(Arg(0), 8) for number in range(20)})
    # Taking the rows out ends a batch: a stream has as many of them.
    for batches in range(1, 21):
        vm.run(timeout=20, max_hits=1)
        assert vm.recording.to_arrow()["vcpu"].num_chunks == batches

    def drop(streams: int) -> None:
        for _ in range(streams):
            vm.recording.__arrow_c_stream__()
            vm.recording.__arrow_c_schema__()

    drop(500)
    before = resident()
    drop(10_000)
    # A stream is some kilobytes, even if the values are shared: all of them together would be more than a hundred megabytes.
    assert resident() - before < 8 << 20


def test_values_go_when_the_last_who_has_them_goes() -> None:
    with vmitap.attach("demo", cmdline=CALLS.format(8000)) as vm:
        vm.breakpoint("open_file", capture={"stack": Stack(4096)})
        vm.run(timeout=60)
        size = 4096 * 8000
        for _ in range(100):
            vm.recording.__arrow_c_stream__()
        stream, table = vm.recording.__arrow_c_stream__(), vm.recording.to_arrow()
        full = resident()
        vm.recording.clear()
        assert len(vm.recording) == 0
        del table
        assert full - resident() < size // 4
        # Nobody has taken this one either.
        del stream
        gc.collect()
        assert full - resident() > size * 3 // 4


def test_a_missing_package_says_what_to_install(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, method in [("pyarrow", vm.recording.to_arrow), ("polars", vm.recording.to_polars), ("pandas", vm.recording.to_pandas)]:
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=f"pip install {package}"):
                method()


def test_a_full_memory_loses_rows_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with vmitap.attach("demo", cmdline=CALLS.format(5000)) as vm:
        vm.recording.limit = 50_000
        vm.breakpoint("open_file", capture={"flags": Arg(1)})
        vm.run(timeout=60)
        assert vm.recording.rows == len(vm.recording) + vm.recording.lost == 5000
        assert vm.stats.rows_lost == vm.recording.lost > 3000
    assert caplog.text.count("limit of 50000 bytes: rows are lost") == 1


# --- files that are written along ---


def test_a_file_is_written_while_the_guest_runs(tmp_path: Path) -> None:
    path = tmp_path / "hits.parquet"
    with vmitap.attach("demo", cmdline=CALLS.format(50_000)) as vm:
        vm.breakpoint("open_file", capture={"n": Arg(1) >> 32})
        with vm.record_to(path, batch=4096) as file:
            vm.run(timeout=60, max_hits=20_000)
            assert len(vm.recording) < 4096
            with pytest.raises(InvalidArgumentError, match="one file at a time"):
                vm.record_to(tmp_path / "other.parquet")
            with pytest.raises(InvalidArgumentError, match="comes too late"):
                vm.breakpoint("read_file", capture={"other": Arg(0)})
            vm.run(timeout=60)
        assert file.rows == 50_000
        assert vm.recording.lost == 0
    table = pyarrow.parquet.read_table(path)
    assert table["n"].to_pylist() == list(range(5000)) * 10
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 13


def test_leaving_the_session_ends_its_file(tmp_path: Path) -> None:
    path = tmp_path / "hits.jsonl"
    with vmitap.attach("demo") as vm:
        vm.breakpoint("open_file", capture={"path": Cstr(Arg(0))})
        vm.record_to(path)
        vm.run(timeout=20, max_hits=3)
    assert [json.loads(line)["path"] for line in path.read_text().splitlines()] == PATHS[:3]


def test_json_lines_can_be_read_along(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    got: list[str] = []

    def read() -> None:
        with fifo.open() as lines:
            got.append(lines.readline())
            stop.set()
            got.extend(lines)

    stop = threading.Event()
    reader = threading.Thread(target=read)
    reader.start()
    with vmitap.attach("demo") as vm:
        vm.breakpoint("open_file", capture={"path": Cstr(Arg(0))})
        with vm.record_to(fifo, format="jsonl"):
            while not stop.is_set():
                vm.run(timeout=0.05)
    reader.join(timeout=20)
    assert json.loads(got[0])["path"] == PATHS[0]


@pytest.mark.parametrize(
    ("path", "options", "error"),
    [
        ("/nowhere/hits.parquet", {}, vmitap.RecordingError),
        ("/proc/version.jsonl", {}, vmitap.RecordingError),
        ("hits.txt", {}, InvalidArgumentError),
        ("hits.parquet", {"format": "csv"}, InvalidArgumentError),
        ("hits.parquet", {"batch": 0}, InvalidArgumentError),
        ("hits.parquet", {"batch": 1 << 40}, InvalidArgumentError),
    ],
)
def test_a_file_that_cannot_be_is_refused(vm: Vm, tmp_path: Path, path: str, options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        vm.record_to(tmp_path / path, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import logging, sys, vmitap
from vmitap import Arg, Cstr
logging.disable()
path, calls, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
{before}
with vmitap.attach("demo", cmdline=f"mode=calls calls={{calls}} check=0") as vm:
    bp = vm.breakpoint("open_file", capture={{"n": Arg(1) >> 32, "path": Cstr(Arg(0), max=32), "a": Arg(0), "b": Arg(3)}})
    file = vm.record_to(path, format={format!r}, batch=batch)
    try:
        vm.run(timeout=100)
        file.close()
    except vmitap.RecordingError as error:
        print(error.errno, error.rows, file=sys.stderr)
        assert vm.run(timeout=5, max_hits=1).reason in ("max_hits", "idle")
        bp.remove()
        assert vm.stats.shadow_frames == 0
    print("rows", vm.recording.rows, "lost", vm.recording.lost, "memory", len(vm.recording), file=sys.stderr)
    {after}
"""


def script(before: str = "", after: str = "", form: str = "parquet") -> str:
    return textwrap.dedent(SCRIPT).format(before=before, after=after, format=form)


def check_accounts(stderr: str, in_file: int) -> None:
    """Every row is in the file, in memory, or counted as lost."""
    rows, lost, memory = map(int, stderr.split("rows ", 1)[1].split()[0:5:2])
    assert rows == in_file + lost + memory


def test_after_a_full_disk_the_file_can_be_read_up_to_the_last_whole_batch(tmp_path: Path) -> None:
    # A limit on the size of files stands in for the end of a disk: writes beyond it fail just so (EFBIG instead of ENOSPC).
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))"
    for form, batch in (("parquet", 1000), ("jsonl", 100)):
        path = tmp_path / f"hits.{form}"
        command = [sys.executable, "-c", script(before=limit, form=form), str(path), "100000", str(batch)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        errno, rows = map(int, done.stderr.split()[:2])
        assert errno == 27
        check_accounts(done.stderr, rows)
        assert 0 < rows < 100_000
        if form == "parquet":
            table = pyarrow.parquet.read_table(path)
            assert (table.num_rows, rows % batch) == (rows, 0)
            assert table["n"].to_pylist()[:5] == [0, 1, 2, 3, 4]
            # What ends the file is written anew, and says of it what a whole file says.
            assert table.schema.metadata[b"vmitap.schema"] == b"1"
            assert str(table.schema.field("symbol").type).startswith("dictionary")
        else:
            lines = path.read_text().splitlines()
            assert len(lines) >= rows
            assert all(json.loads(line) for line in lines[:rows])


def test_a_disk_that_is_really_full_is_a_typed_error_too(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk of that size can be made here: {mounted.stderr.strip()}")
    try:
        path = disk / "hits.parquet"
        command = [sys.executable, "-c", script(), str(path), "100000", "1000"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        errno, rows = map(int, done.stderr.split()[:2])
        assert errno == 28
        check_accounts(done.stderr, rows)
        # A copy: who has the file itself open would keep the disk busy.
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(path.read_bytes()))
        assert (table.num_rows, rows % 1000) == (rows, 0)
        assert rows > 0
    finally:
        # Lazily: somebody who looks at all files may have this one open too.
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("name", ["folder.parquet", "folder.jsonl"])
def test_a_folder_is_no_file(vm: Vm, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    bp = vm.breakpoint("open_file", capture={"path": Cstr(Arg(0))})
    with pytest.raises(vmitap.RecordingError) as raised:
        vm.record_to(tmp_path / name)
    assert (raised.value.errno, raised.value.rows) == (21, 0)
    vm.run(timeout=20, max_hits=2)
    with pytest.raises(vmitap.RecordingError):
        vm.recording.write_parquet(tmp_path / name)
    # What could not be written is still in memory, and the guest goes on.
    assert (len(vm.recording), bp.state) == (2, "active")


def test_a_consumer_of_events_that_stops_loses_them_counted_and_the_guest_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with vmitap.attach("demo", cmdline=CALLS.format(1000)) as vm:
        bp = vm.breakpoint("open_file")
        first, second = vm.events(bp, timeout=60, queue=10), vm.events(bp, timeout=60, queue=1000)
        seen = list(second)
        assert len(seen) == bp.stats.hits == 1000
        assert (first.lost, second.lost, vm.stats.lost) == (990, 0, 990)
        assert [hit.address for hit in first] == [bp.address] * 10
    assert caplog.text.count("10 hits wait in a queue") == 1


def test_a_string_that_is_longer_than_its_limit_is_cut_off_there(vm: Vm) -> None:
    vm.breakpoint("open_file", capture={"text": Cstr(Arg(0), max=4), "rest": Cstr(Arg(0), max=64)})
    vm.run(timeout=20, max_hits=2)
    assert columns(vm, "text", "rest") == [(path[:4], path) for path in PATHS[:2]]


def test_a_closed_pipe_is_a_typed_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", script(form="jsonl"), "-", "100000000", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert json.loads(child.stdout.readline())["n"] == 0
        child.stdout.close()
        errno, in_file = child.stderr.readline().split()
        assert errno == "32"
        check_accounts(child.stderr.read(), int(in_file))
        assert child.wait(timeout=60) == 0
        child.stderr.close()


def test_a_reader_that_stops_costs_rows_that_are_counted_and_the_end_does_not_hang(tmp_path: Path) -> None:
    command = [sys.executable, "-c", script(form="jsonl"), "-", "200000", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        first, second = child.stderr.readline().split(), child.stderr.readline().split()
        assert first[0] == "None"
        assert second[:2] == ["rows", "200001"] or int(second[1]) >= 200_000
        assert int(second[3]) > 100_000
        check_accounts(" ".join(second), int(first[1]))
        assert child.wait(timeout=60) == 0
        assert child.stdout is not None
        child.stdout.close()
        child.stderr.close()


def test_ten_million_rows_to_parquet_take_less_than_300_megabytes(tmp_path: Path) -> None:
    # Not `ru_maxrss`, which begins with the size of the process that started this one.
    peak = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')), file=sys.stderr)"
    calls = int(os.environ.get("VMITAP_ROWS", "1000000"))
    path = tmp_path / "hits.parquet"
    command = [sys.executable, "-c", script(after=peak), str(path), str(calls), "65536"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=True)
    rows, kilobytes = done.stderr.split("\n")[:2]
    assert rows == f"rows {calls} lost 0 memory 0"
    assert int(kilobytes.split()[1]) < 300 << 10
    assert pyarrow.parquet.ParquetFile(path).metadata.num_rows == calls


# --- how long vCPUs stand still ---


def test_holding_times_are_told_for_each_breakpoint_and_each_run(vm: Vm) -> None:
    slow = vm.breakpoint("open_file", lambda hit: time.sleep(0.003), where=Filter.every(3))
    fast = vm.breakpoint("open_file", capture={"a": Arg(0)}, key="fast")
    bare = vm.breakpoint("read_file")
    result = vm.run(timeout=20, max_hits=20)
    # Of hits that nobody handles some are timed, and stand for the others.
    assert bare.stats.hold_max < 0.003
    assert slow.stats.hold_p50 >= 0.003
    assert 0 < fast.stats.hold_p50 <= fast.stats.hold_p99 <= fast.stats.hold_max
    assert slow.stats.hold_p50 <= slow.stats.hold_p99 <= slow.stats.hold_max
    assert 0 < result.hold_p50 <= result.hold_p99 <= result.hold_max
    assert result.hold_max >= 0.003
    after = vm.run(timeout=20, max_hits=0)
    assert (after.hold_p50, after.hold_p99, after.hold_max) == (0, 0, 0)


def test_a_breakpoint_that_would_starve_the_guest_is_disabled_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with vmitap.attach("demo", cmdline=CALLS.format(100_000)) as vm:
        bp = vm.breakpoint("open_file", where=Arg(0) == 0, budget=vmitap.Budget(per_second=100))
        other = vm.breakpoint("open_file", key="other", budget=vmitap.Budget(per_second=10**9))
        result = vm.run(timeout=60)
        assert (bp.state, bp.stats.filtered, bp.stats.over_budget) == ("disabled", 101, True)
        assert (other.state, other.stats.hits, other.stats.over_budget) == ("active", 100_000, False)
        assert (result.disabled_by_budget, vm.run(timeout=0.1).disabled_by_budget) == (1, 0)
        assert "more than 100 events in a second" in caplog.text
        bp.enable()
        assert bp.state == "active"


def test_a_budget_that_makes_no_sense_is_refused(vm: Vm) -> None:
    for wrong in (0, -1, 1 << 70):
        with pytest.raises(InvalidArgumentError, match="per_second"):
            vmitap.Budget(wrong)
    with pytest.raises(TypeError):
        vmitap.Budget(1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Budget"):
        vm.breakpoint("open_file", budget=5)  # type: ignore[arg-type]
