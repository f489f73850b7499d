"""The package as it is installed: quick to import, small, and with nothing in it that is not ours."""

import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from statistics import median
from time import perf_counter

import pytest

import vmitap
from vmitap import _native

ALLOWED_LIBRARIES = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2"}
WHEEL = os.environ.get("VMITAP_WHEEL")


# docs/xen.md names it: the wheel is to run in dom0 of the distributions that have it.
GLIBC = (2, 34)


class Dynamic:
    """The dynamic section of a 64-bit little-endian ELF library."""

    def __init__(self, image: bytes) -> None:
        assert image[:6] == b"\x7fELF\x02\x01"
        self.image = image
        offset, size, count = *struct.unpack_from("<Q", image, 32), *struct.unpack_from("<HH", image, 54)
        self.headers = [struct.unpack_from("<IIQQQQ", image, offset + n * size) for n in range(count)]
        [(begin, length)] = [(header[2], header[5]) for header in self.headers if header[0] == 2]
        self.entries = [struct.unpack_from("<QQ", image, begin + at) for at in range(0, length, 16)]
        self.strings = self.offset(self.value(5))

    def value(self, tag: int) -> int:
        [found] = [value for each, value in self.entries if each == tag]
        return int(found)

    def offset(self, address: int) -> int:
        """In the file."""
        [found] = [h[2] + address - h[3] for h in self.headers if h[0] == 1 and h[3] <= address < h[3] + h[5]]
        return int(found)

    def string(self, at: int) -> str:
        begin = self.strings + at
        return self.image[begin : self.image.index(0, begin)].decode()


def needed(image: bytes) -> list[str]:
    """Its NEEDED entries."""
    dynamic = Dynamic(image)
    return [dynamic.string(value) for tag, value in dynamic.entries if tag == 1]


def versions_needed(image: bytes) -> set[str]:
    """Versions of libraries without which it is not loaded, as "GLIBC_2.34" (Linux Standard Base, "Symbol Versioning")."""
    dynamic, found = Dynamic(image), set()
    library = dynamic.offset(dynamic.value(0x6FFFFFFE))
    for _ in range(dynamic.value(0x6FFFFFFF)):
        _, count, _, first, following = struct.unpack_from("<HHIII", image, library)
        version = library + first
        for _ in range(count):
            _, flags, _, name, next_version = struct.unpack_from("<IHHII", image, version)
            if not flags & 2:  # weak
                found.add(dynamic.string(name))
            version += next_version
        library += following
    return found


def glibc_needed(image: bytes) -> tuple[int, ...]:
    return max(tuple(map(int, name.removeprefix("GLIBC_").split("."))) for name in versions_needed(image) if name.startswith("GLIBC_"))


def python(code: str) -> subprocess.CompletedProcess[str]:
    # A folder without the sources, and no variables that change what is imported.
    return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd="/")


def seconds(code: str) -> float:
    begin = perf_counter()
    python(code)
    return perf_counter() - begin


def test_the_import_takes_less_than_50_ms() -> None:
    seconds("import vmitap")
    # In pairs, so that a busy machine slows both down; the quietest pair counts.
    assert min(seconds("import vmitap") - seconds("pass") for _ in range(10)) < 0.050


def test_the_import_takes_the_time_that_the_test_of_it_measures() -> None:
    # So that the test above can fail.
    assert median(seconds("import time; time.sleep(0.06)") - seconds("pass") for _ in range(3)) > 0.050


def test_the_import_loads_neither_the_emulator_nor_the_command_line() -> None:
    loaded = python("import sys, vmitap; print(*sys.modules)").stdout.split()
    assert "vmitap._native" in loaded
    assert {"unicorn", "click", "rich", "ctypes", "json"} & set(loaded) == set()


def test_attaching_loads_the_emulators_library_and_not_its_package() -> None:
    code = "import sys, vmitap; vm = vmitap.attach('demo')"
    code += "; print('unicorn' in sys.modules, 'libunicorn' in open('/proc/self/maps').read())"
    assert python(code).stdout.split() == ["False", "True"]


def test_without_the_emulators_library_the_error_says_what_to_install() -> None:
    with pytest.raises(vmitap.AttachError) as caught:
        vmitap.attach("demo", libunicorn="/no/such/libunicorn.so.2")
    assert "/no/such/libunicorn.so.2" in str(caught.value)
    assert "unicorn" in caught.value.hint


def test_the_compiled_module_needs_only_what_every_linux_has() -> None:
    assert set(needed(Path(str(_native.__file__)).read_bytes())) <= ALLOWED_LIBRARIES


def test_the_compiled_module_runs_with_the_c_library_that_the_docs_name() -> None:
    image = Path(str(_native.__file__)).read_bytes()
    assert (2, 2) < glibc_needed(image) <= GLIBC
    docs = (Path(__file__).parents[2] / "docs/xen.md").read_text()
    assert f"glibc {'.'.join(map(str, GLIBC))}" in docs


def test_the_compiled_module_is_for_every_python_from_the_oldest_on() -> None:
    assert Path(str(_native.__file__)).name == "_native.abi3.so"


def test_every_public_name_is_there_and_documented() -> None:
    for name in vmitap.__all__:
        value = getattr(vmitap, name)
        assert name == "__version__" or value.__doc__, name


@pytest.mark.skipif(WHEEL is None, reason="make wheel names the wheel in VMITAP_WHEEL")
def test_the_wheel_is_small_typed_and_holds_nothing_of_others() -> None:
    wheel = Path(str(WHEEL))
    assert wheel.stat().st_size < 5_000_000
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        [library] = [name for name in names if name.endswith(".so")]
        image = content.read(library)
        assert set(needed(image)) <= ALLOWED_LIBRARIES
        assert glibc_needed(image) <= GLIBC
        metadata = content.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "vmitap/py.typed" in names
    assert "vmitap/_native.pyi" in names
    assert not [name for name in names if "unicorn" in name]
    assert "License-Expression: MIT OR Apache-2.0" in metadata
    assert f"Version: {vmitap.__version__}" in metadata
