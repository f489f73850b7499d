"""dom0's Python: the release's own interpreter and standard library, with pytest, as byte code."""

from __future__ import annotations

import hashlib
import io
import shutil
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from .step import run

if TYPE_CHECKING:
    from .root import Root

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
# Parts of the standard library that no test needs; the archive has to fit into a small dom0.
UNUSED = "test idlelib lib2to3 distutils ensurepip tkinter turtledemo pydoc_data xmlrpc wsgiref venv dist-packages __pycache__"


def python(root: Root, cache: Path) -> Path:
    """A folder with `library` (the standard library) and `packages`. Made again only when what goes in has changed."""
    inputs = hashlib.sha256(b"".join(path.read_bytes() for path in (REQUIREMENTS, Path(__file__), root.stamp)))
    done = cache / f"python-{root.release.python}-{inputs.hexdigest()[:16]}"
    if done.exists():
        return done
    new = done.with_name(f"{done.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    library, packages = new / "library", new / "packages"
    skip = shutil.ignore_patterns(*UNUSED.split(), "config-*", "sitecustomize.py")
    shutil.copytree(root.path / f"usr/lib/python{root.release.python}", library, ignore=skip)
    for wheel in _wheels(cache / "wheels"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
    # Made by the interpreter that will run it, and the sources go: fewer files to look up when importing.
    compileall = ["-I", "-m", "compileall", "-q", "-b", "-j", "1", "--invalidation-mode", "unchecked-hash", "-s", str(new)]
    run([*root.command(root.interpreter), *compileall, str(library), str(packages)], env={"PYTHONHOME": str(root.path / "usr")})
    for source in [*library.rglob("*.py"), *packages.rglob("*.py")]:
        source.unlink()
    new.rename(done)
    return done


def byte_code(root: Root, python: Path, job: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """Of the modules in a job and in its wheel: files to be added to the job. Compiling takes dom0 thirty times as long."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, contents in job.items():
        if name.endswith(".py"):
            (folder / name).write_bytes(contents)
        elif name.endswith(".whl"):
            zipfile.ZipFile(io.BytesIO(contents)).extractall(folder / "site")
    env = {"PYTHONHOME": str(root.path / "usr"), "PYTHONPATH": str(python / "packages")}
    run([*root.command(root.interpreter), Path(__file__).with_name("compile_job.py"), folder], env=env)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.pyc")}


def _wheels(folder: Path) -> list[Path]:
    download: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        folder,
        "-r",
        REQUIREMENTS,
    ]
    run(download)
    pins = [line.split("==") for line in REQUIREMENTS.read_text().splitlines() if "==" in line]
    return [next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")) for name, version in pins]
