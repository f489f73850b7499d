"""The lab's own parts that need no Xen: what it calls a failure, and what it packs and unpacks (docs/xen-lab.md)."""

import io
import marshal
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lab import compile_job, job
from lab import verdict as verdicts
from lab.cpio import Archive
from lab.host import check_host
from lab.step import LabError

ROOT = Path(__file__).parents[2]
TESTS = """\
import pytest

@pytest.mark.seconds(21)
def test_slow():
    pass

@pytest.mark.parametrize("n", ["a", "b.c/d", "[e]"])
def test_quick(n):
    pass

@pytest.mark.parametrize("n", range(4))
def test_short(n):
    pass

def test_left_out():
    assert False
"""
NAMES = {
    "test_x.py::test_slow",
    *(f"test_x.py::test_quick[{n}]" for n in ("a", "b.c/d", "[e]")),
    *(f"test_x.py::test_short[{n}]" for n in range(4)),
}


Machines = Callable[..., dict[Path, int]]


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], tuple[Path, list[int]]]:
    """Runs pytest for each of the machines; only the first time that the same is asked for."""

    @cache
    def run(parts: int, only: str) -> tuple[Path, list[int]]:
        folder = tmp_path_factory.mktemp("machines")
        (folder / "test_x.py").write_text(TESTS)
        env = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "xen" / "dom0")}
        statuses = []
        for n in range(1, parts + 1):
            (folder / str(n)).mkdir()
            own = ["--part", f"{n}/{parts}", f"--collected={n}/collected.txt", f"--junitxml={n}/junit.xml"]
            command = [sys.executable, "-m", "pytest", "-p", "parts", "-p", "no:cacheprovider", "--strict-markers", "-k", only, *own]
            statuses.append(subprocess.run(command, cwd=folder, env=env, capture_output=True, check=False).returncode)
        return folder, statuses

    return run


@pytest.fixture
def machines(tmp_path: Path, once: Callable[[int, str], tuple[Path, list[int]]]) -> Machines:
    """What pytest leaves in each machine: its status by the folder of its results."""

    def run(parts: int, only: str = "not left_out") -> dict[Path, int]:
        folder, statuses = once(parts, only)
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        return {tmp_path / str(n): status for n, status in enumerate(statuses, 1)}

    return run


def ran(junit: Path) -> list[str]:
    return [f"{case.get('classname')}.py::{case.get('name')}" for case in ElementTree.parse(junit).iter("testcase")]


def edit(path: Path, pattern: str, new: str) -> None:
    text, count = re.subn(pattern, new, path.read_text())
    assert count == 1
    path.write_text(text)


def verdict(folder: Path, parts: dict[Path, int]) -> int:
    return verdicts.verdict("4.17", parts, folder / "results" / "junit.xml")


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_machines_that_share_the_tests_run_each_of_them_once(tmp_path: Path, machines: Machines, parts: int) -> None:
    found = machines(parts)
    of_each = [ran(folder / "junit.xml") for folder in found]
    assert sorted(name for names in of_each for name in names) == sorted(NAMES)
    assert verdict(tmp_path, found) == 0
    if parts > 1:
        # The slow one takes as long as all the others.
        assert ["test_x.py::test_slow"] in of_each
        assert sorted(ran(tmp_path / "results" / "junit.xml")) == sorted(NAMES)


def test_a_filter_that_leaves_a_machine_without_tests_is_no_failure(tmp_path: Path, machines: Machines) -> None:
    found = machines(3, "slow")
    assert sorted(found.values()) == [0, 5, 5]
    assert verdict(tmp_path, found) == 0


@pytest.mark.parametrize("parts", [1, 2])
def test_a_run_without_tests_is_a_failure(tmp_path: Path, machines: Machines, parts: int) -> None:
    assert verdict(tmp_path, machines(parts, "nothing")) != 0


@pytest.mark.parametrize("parts", [1, 2])
def test_a_failure_in_any_machine_is_pytests_own_status(tmp_path: Path, machines: Machines, parts: int) -> None:
    found = machines(parts, "slow or left_out")
    assert sorted(found.values()) == [0, 1][-parts:]
    assert verdict(tmp_path, found) == 1


@pytest.mark.parametrize("parts", [1, 2])
def test_a_failure_that_no_status_tells_of_is_one(tmp_path: Path, machines: Machines, parts: int) -> None:
    found = machines(parts, "slow or left_out")
    assert verdict(tmp_path, dict.fromkeys(found, 0)) == 1


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["junit.xml", "collected.txt"])
@pytest.mark.parametrize("status", [0, 70])
def test_a_machine_without_results_is_a_failure(tmp_path: Path, machines: Machines, parts: int, name: str, status: int) -> None:
    found = machines(parts)
    last = tmp_path / str(parts)
    (last / name).unlink()
    assert verdict(tmp_path, found | {last: status}) == (status or 1)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_test_that_was_skipped_is_a_failure(tmp_path: Path, machines: Machines, parts: int) -> None:
    found = machines(parts)
    edit(tmp_path / "1" / "junit.xml", r'skipped="0"', 'skipped="1"')
    assert verdict(tmp_path, found) == 1


@pytest.mark.parametrize("parts", [1, 2])
def test_a_test_that_no_machine_ran_is_a_failure(
    tmp_path: Path, machines: Machines, capsys: pytest.CaptureFixture[str], parts: int
) -> None:
    found = machines(parts)
    edit(tmp_path / "1" / "junit.xml", r'<testcase [^>]*name="test_slow"[^>]*/>', "")
    assert verdict(tmp_path, found) == 1
    assert "no machine ran test_x.py::test_slow" in capsys.readouterr().out


def test_a_test_that_two_machines_ran_is_a_failure(tmp_path: Path, machines: Machines, capsys: pytest.CaptureFixture[str]) -> None:
    found = machines(2)
    case = re.findall(r"<testcase [^>]*/>", (tmp_path / "1" / "junit.xml").read_text())[0]
    edit(tmp_path / "2" / "junit.xml", "</testsuite>", f"{case}</testsuite>")
    assert verdict(tmp_path, found) == 1
    assert "2 machines ran test_x.py::test_slow" in capsys.readouterr().out


@pytest.mark.parametrize("part", [1, 2])
def test_a_test_that_only_some_machines_collected_is_a_failure(
    tmp_path: Path, machines: Machines, capsys: pytest.CaptureFixture[str], part: int
) -> None:
    found = machines(2)
    edit(tmp_path / str(part) / "collected.txt", r"test_x.py::test_slow\n", "")
    assert verdict(tmp_path, found) == 1
    assert "not every machine collected test_x.py::test_slow" in capsys.readouterr().out


def test_a_test_that_was_not_collected_is_a_failure(tmp_path: Path, machines: Machines, capsys: pytest.CaptureFixture[str]) -> None:
    found = machines(1)
    edit(tmp_path / "1" / "collected.txt", r"test_x.py::test_slow\n", "")
    assert verdict(tmp_path, found) == 1
    assert "nobody collected test_x.py::test_slow" in capsys.readouterr().out


def test_pytest_takes_the_byte_code_that_comes_with_a_job_and_still_shows_values(tmp_path: Path) -> None:
    source, helper = tmp_path / "test_x.py", tmp_path / "helper.py"
    helper.write_text("VALUE = 3\n")
    source.write_text("from helper import VALUE\ndef test_x():\n    assert VALUE == 4\n")
    compile_job.main(tmp_path)
    helper.write_text("VALUE = 4\n")  # only in its byte code is it 3
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--debug={tmp_path}/said", str(source)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True, check=False
    )
    assert "assert 3 == 4" in done.stdout
    assert "found cached rewritten pyc for" in (tmp_path / "said").read_text()
    # Where the tests are in dom0.
    files = {marshal.loads(pyc.read_bytes()[16:]).co_filename for pyc in tmp_path.glob("__pycache__/test_x.*")}
    assert files == {"/job/test_x.py"}


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
    tables = (ROOT / "crates" / "xen-sys" / "src" / "load.rs").read_text().split("table! {")[1:]
    functions = [name for table in tables for name in re.findall(r"^        (x\w+): unsafe", table.split("} optional {")[0], re.MULTILINE)]
    passed_on = (ROOT / "tests" / "xen" / "faults" / "faults.c").read_text()
    assert len(functions) > 50
    assert [name for name in functions if not re.search(rf"\b{name}\b", passed_on)] == []
