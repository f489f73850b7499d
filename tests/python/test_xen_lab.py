"""The lab's own parts that need no Xen: what it calls a failure, and what it packs and unpacks (docs/xen-lab.md)."""

import io
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from lab import job, machine
from lab.cpio import Archive
from lab.host import check_host
from lab.release import RELEASES
from lab.step import LabError

XEN = RELEASES["4.17"]


def junit(folder: Path, **counts: int) -> Path:
    attributes = " ".join(f'{name}="{count}"' for name, count in counts.items())
    path = folder / "junit.xml"
    path.write_text(f"<testsuites><testsuite {attributes}/></testsuites>")
    return path


def test_tests_that_all_ran_and_passed_are_a_success(tmp_path: Path) -> None:
    assert machine.verdict(XEN, 0, junit(tmp_path, tests=3, failures=0, errors=0, skipped=0)) == 0


def test_a_failure_is_pytests_own_status(tmp_path: Path) -> None:
    assert machine.verdict(XEN, 1, junit(tmp_path, tests=3, failures=1, errors=0, skipped=0)) == 1


@pytest.mark.parametrize(("tests", "skipped"), [(3, 1), (0, 0)])
def test_a_run_that_skipped_a_test_or_had_none_is_a_failure(tmp_path: Path, tests: int, skipped: int) -> None:
    assert machine.verdict(XEN, 0, junit(tmp_path, tests=tests, failures=0, errors=0, skipped=skipped)) == 1


@pytest.mark.parametrize("status", [0, 70])
def test_a_run_without_results_is_a_failure(tmp_path: Path, status: int) -> None:
    assert machine.verdict(XEN, status, tmp_path / "junit.xml") != 0


def test_a_job_goes_in_and_results_come_out(tmp_path: Path) -> None:
    disk, out = tmp_path / "job.img", tmp_path / "results"
    job.write(disk, {"test_x.py": b"x = 1\n", "demo.elf": bytes(range(256))})
    raw = bytearray(disk.read_bytes())
    assert len(raw) == job.SIZE
    kind, size = raw[:512].split()[:2]
    assert kind == b"JOB"
    with zipfile.ZipFile(io.BytesIO(raw[job.JOB_AT : job.JOB_AT + int(size)])) as archive:
        assert archive.read("demo.elf") == bytes(range(256))
    assert job.results(disk, out) is None

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("junit.xml", "<testsuites/>")
    data = packed.getvalue()
    raw[:512] = f"RESULT {len(data)} 5\n".encode().ljust(512, b"\0")
    raw[job.RESULT_AT : job.RESULT_AT + len(data)] = data
    disk.write_bytes(raw)
    assert job.results(disk, out) == 5
    assert (out / "junit.xml").read_text() == "<testsuites/>"


def test_a_job_too_large_for_its_disk_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="room"):
        job.write(tmp_path / "job.img", {"large": bytes(job.RESULT_AT)})


def test_an_initramfs_holds_what_was_put_in_with_the_folders_on_the_way() -> None:
    archive = Archive()
    archive.file("usr/bin/tool", b"#!/bin/sh\n", mode=0o755)
    archive.link("bin", "usr/bin")
    packed = archive.pack()
    entries, at = {}, 0
    while True:
        assert packed[at : at + 6] == b"070701"
        _, mode, *_ = fields = [int(packed[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, name_size = fields[6], fields[11]
        name = packed[at + 110 : at + 110 + name_size - 1].decode()
        start = (at + 110 + name_size + 3) & ~3
        at = (start + size + 3) & ~3
        if name == "TRAILER!!!":
            break
        entries[name] = (mode, packed[start : start + size])
    assert at == len(packed)
    assert entries == {
        "bin": (0o120777, b"usr/bin"),
        "usr": (0o040755, b""),
        "usr/bin": (0o040755, b""),
        "usr/bin/tool": (0o100755, b"#!/bin/sh\n"),
    }


def test_a_program_that_is_missing_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name in ("make", "objcopy") else which(name) or "/bin/true")
    with pytest.raises(LabError, match="objcopy, make") as error:
        check_host()
    assert "sudo apt-get install binutils make" in str(error.value)


def test_the_library_that_fails_has_every_function_that_vmitap_needs() -> None:
    root = Path(__file__).parents[2]
    tables = (root / "crates" / "xen-sys" / "src" / "load.rs").read_text().split("table! {")[1:]
    functions = [name for table in tables for name in re.findall(r"^        (x\w+): unsafe", table.split("} optional {")[0], re.MULTILINE)]
    passed_on = (root / "tests" / "xen" / "faults" / "faults.c").read_text()
    assert len(functions) > 50
    assert [name for name in functions if not re.search(rf"\b{name}\b", passed_on)] == []
