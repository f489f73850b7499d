"""Runs in dom0: takes a job from the second disk, runs pytest on it, and writes the results back to the disk.

Sector 0 says what is there: "JOB <bytes>" (a zip archive from JOB_AT on), then "RESULT <bytes> <status>" (another, from RESULT_AT on).
"""

import faulthandler
import io
import os
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from pathlib import Path

DISK = "/dev/sdb"
JOB_AT = 4096
RESULT_AT = 32 << 20
JOB = Path("/job")
OUT = JOB / "out"


def fetch(disk: int) -> None:
    kind, size = os.pread(disk, 512, 0).split()[:2]
    assert kind == b"JOB", kind
    with zipfile.ZipFile(io.BytesIO(os.pread(disk, int(size), JOB_AT))) as archive:
        archive.extractall(JOB)
    for wheel in JOB.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(JOB / "site")
    for module in JOB.glob("*.py"):
        os.utime(module, (0, 0))  # which its byte code names (lab/compile_job.py)
    OUT.mkdir()


def run(arguments: list[str], limit: float) -> int:
    """pytest's exit status, from a process of its own: if it dies or hangs, its results so far come back all the same."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            sys.path[:0] = [str(JOB), str(JOB / "site")]
            os.environ["PYTHONPATH"] = str(JOB / "site")
            os.environ["LLVM_PROFILE_FILE"] = str(OUT / "coverage-%p.profraw")
            os.chdir(JOB)
            import pytest

            status = int(pytest.main([*arguments, f"--collected={OUT}/collected.txt", f"--junitxml={OUT}/junit.xml"]))
        except BaseException:
            traceback.print_exc()
        sys.exit(status)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            if code < 0:
                print(f"=== the tests were ended by {signal.Signals(-code).name}", flush=True)
            return code if code >= 0 else 128 - code
        time.sleep(0.05)
    print(f"=== the tests took more than {limit:.0f} s of the machine's time", flush=True)
    os.kill(child, signal.SIGABRT)  # pytest's faulthandler shows where they were
    os.waitpid(child, 0)
    return 124


def store(disk: int, status: int) -> None:
    (OUT / "xl-dmesg.txt").write_bytes(subprocess.run(["xl", "dmesg"], capture_output=True, check=False).stdout)
    for log in Path("/var/log/xen").rglob("*.log*"):
        (OUT / log.name).write_bytes(log.read_bytes())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in OUT.rglob("*"):
            archive.write(path, path.relative_to(OUT))
    data = packed.getvalue()
    os.pwrite(disk, data, RESULT_AT)
    os.pwrite(disk, (b"RESULT %d %d\n" % (len(data), status)).ljust(512), 0)
    os.fsync(disk)


def main() -> None:
    faulthandler.enable()
    disk = os.open(DISK, os.O_RDWR)
    fetch(disk)
    print("=== the tests begin", flush=True)
    arguments = (JOB / "arguments").read_text().split("\0")
    status = run(arguments[1:], float(arguments[0]))
    store(disk, status)
    print(f"=== the tests ended with status {status}", flush=True)


main()
