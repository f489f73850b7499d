"""The lab's Linux kernel, from Debian's source package: dom0's kernel, and the Linux guest of the tests."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from .step import LabError

if TYPE_CHECKING:
    from .apt import Suite

SOURCE = "linux-source-6.1"
TOOLS = ["bc", "bison", "flex", "libelf-dev", "libelf1", "libfl2", "libreadline8", "libsigsegv2", "m4", "zlib1g-dev"]
CONFIG = Path(__file__).parents[1] / "kernel.config"


def kernel(suite: Suite, cache: Path) -> Path:
    """The folder with `vmlinux` and `System.map`: built when the configuration or Debian's source changed, else from the cache."""
    version = suite.version(SOURCE)
    inputs = hashlib.sha256(CONFIG.read_bytes() + version.encode()).hexdigest()[:16]
    done = cache / f"kernel-{inputs}"
    if done.exists():
        return done
    tools = suite.unpack([*TOOLS, SOURCE], cache / "kernel-tools")
    work = cache / "kernel-build"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    _run(["tar", "xf", str(tools / f"usr/src/{SOURCE}.tar.xz"), "--strip-components=1"], work, {})
    libraries = f"{tools}/usr/lib/x86_64-linux-gnu"
    env = {
        "PATH": f"{tools}/usr/bin:{os.environ['PATH']}",
        "M4": f"{tools}/usr/bin/m4",
        "BISON_PKGDATADIR": f"{tools}/usr/share/bison",
        "C_INCLUDE_PATH": f"{tools}/usr/include",
        "LIBRARY_PATH": libraries,
        "LD_LIBRARY_PATH": f"{libraries}:{tools}/lib/x86_64-linux-gnu",
    }
    _run(["make", "tinyconfig"], work, env)
    _run(["scripts/kconfig/merge_config.sh", "-m", ".config", str(CONFIG)], work, env)
    _run(["make", "olddefconfig"], work, env)
    _run(["nice", "make", f"-j{os.environ.get('VMITAP_LAB_JOBS') or os.cpu_count()}", "vmlinux"], work, env)
    made = cache / f"kernel-{inputs}.new"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    _run(["strip", "-s", "-o", str(made / "vmlinux"), "vmlinux"], work, env)
    shutil.copy(work / "System.map", made)
    made.rename(done)
    shutil.rmtree(work)
    return done


def _run(command: list[str], work: Path, env: dict[str, str]) -> None:
    """As step.run, for programs that write much: it goes into a log next to `work`."""
    log = work.with_suffix(".log")
    with log.open("ab") as out:
        out.write(f"$ {' '.join(command)}\n".encode())
        out.flush()
        code = subprocess.call(command, cwd=work, env=os.environ | env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise LabError(f"`{' '.join(command)}` failed with status {code}; the end of {log}:\n{tail}")
