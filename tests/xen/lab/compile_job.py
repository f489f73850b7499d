"""Run by dom0's interpreter, on the machine that the lab runs on: byte code of a job, where Python and pytest look for it.

python compile_job.py FOLDER    (the folder is /job in dom0)
"""

from __future__ import annotations

import compileall
import os
import sys
from pathlib import Path
from py_compile import PycInvalidationMode
from types import CodeType, SimpleNamespace
from typing import Any

from _pytest.assertion import rewrite

# What pytest has no public names for. Its version is pinned (tests/xen/requirements.txt).
pytests: Any = rewrite
JOB = "/job"


def named(code: CodeType, name: str) -> CodeType:
    """The same code, from a file of that name."""
    inner = tuple(named(each, name) if isinstance(each, CodeType) else each for each in code.co_consts)
    return code.replace(co_filename=name, co_consts=inner)


def main(folder: Path) -> None:
    compileall.compile_dir(folder, quiet=1, stripdir=folder, prependdir=JOB, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH)
    for source in folder.glob("*.py"):
        os.utime(source, (0, 0))  # as in dom0 (dom0/agent.py)
        stamp, code = pytests._rewrite_test(source, None)
        target = pytests.get_cache_dir(source) / f"{source.stem}{pytests.PYC_TAIL}"
        assert pytests._write_pyc(SimpleNamespace(trace=print), named(code, f"{JOB}/{source.name}"), stamp, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
