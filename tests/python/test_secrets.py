"""What guests hold is told to whoever asked for it, and to nobody else."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import vmitap
from vmitap import Access, Arg, Budget, Cstr, Reg

if TYPE_CHECKING:
    from pathlib import Path

    from vmitap.filters import Number, Text

# What the demo guest's programs pass and read.
SECRETS = ("/etc/motd", "/etc/shadow", "/home/alice", "BEGIN", "alice", "Welcome")


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_umask() -> object:
    before = os.umask(0)
    yield
    os.umask(before)


def test_nothing_that_a_guest_holds_is_logged(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    with vmitap.attach("demo", cmdline="rounds=6", vcpus=2) as vm:
        seen: list[str] = []
        path: dict[str, Number | Text] = {"path": Cstr(Arg(0)), "flags": Arg(1)}

        @vm.breakpoint("open_file", capture=path, on_return={"fd": Reg.rax}, budget=Budget(per_second=20))
        def opened(hit: vmitap.Hit) -> None:
            seen.append(hit.vm.read_cstr(hit.args[0]))
            if len(seen) == 5:
                raise RuntimeError("on purpose")

        vm.breakpoint("read_file", where=Cstr(Arg(1)).contains("alice"))
        vm.watch("boot_copy", 64, Access.R | Access.W, budget=Budget(per_second=10))
        vm.breakpoint(0x7000_0000_0000)
        with vm.record_to(tmp_path / "rows.parquet"):
            with pytest.raises(vmitap.HandlerError, match=r"^the handler at open_file raised RuntimeError: on purpose$"):
                vm.run(timeout=60)
            assert vm.run(timeout=60).reason == "idle"
        with pytest.raises(vmitap.TranslationError):
            vm.read(0x7000_0000_0000, 8)
    assert any("events in a second" in record.getMessage() for record in caplog.records)
    assert "/etc/motd" in seen
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert [secret for secret in SECRETS if secret in told] == []


@pytest.mark.usefixtures("open_umask")
def test_what_is_recorded_is_for_its_owner_alone(tmp_path: Path) -> None:
    with vmitap.attach("demo", cmdline="rounds=2") as vm:
        vm.breakpoint("open_file", capture={"path": Cstr(Arg(0))})
        with vm.record_to(tmp_path / "streamed.parquet"):
            vm.run(timeout=60)
        with vm.record_to(tmp_path / "streamed.jsonl"):
            pass
    with vmitap.attach("demo", cmdline="rounds=2") as vm:
        vm.breakpoint("open_file", capture={"path": Cstr(Arg(0))})
        vm.run(timeout=60)
        vm.recording.write_parquet(tmp_path / "written.parquet")
        vm.recording.write_jsonl(tmp_path / "written.jsonl")
    command = [sys.executable, "-m", "vmitap", "report", str(tmp_path / "written.parquet"), "-o", str(tmp_path / "report.html")]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    found = {path.name: permissions(path) for path in tmp_path.iterdir()}
    assert found == dict.fromkeys(["streamed.parquet", "streamed.jsonl", "written.parquet", "written.jsonl", "report.html"], 0o600)
    # One that is there already keeps what its owner gave it.
    (tmp_path / "mine.jsonl").touch(mode=0o640)
    with vmitap.attach("demo", cmdline="rounds=1") as vm:
        vm.breakpoint("open_file", capture={"path": Cstr(Arg(0))})
        vm.run(timeout=60)
        vm.recording.write_jsonl(tmp_path / "mine.jsonl")
    assert permissions(tmp_path / "mine.jsonl") == 0o640
