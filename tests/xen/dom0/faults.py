"""Calls of Xen's libraries that fail, or at which a process dies: the driving side of tests/xen/faults/faults.c."""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LIBRARY = "/job/libfaults.so"
VARIABLE = "VMITAP_LIBXENCTRL"
NOTHING, FAIL, KILL_BEFORE, KILL_AFTER = range(4)


class State(ctypes.Structure):
    """Shared with every process that is forked after the library was loaded."""

    _fields_ = (
        ("calls", ctypes.c_long),
        ("at", ctypes.c_long),
        ("what", ctypes.c_long),
        ("error", ctypes.c_long),
        ("done", ctypes.c_long),
        ("last", ctypes.c_char * 64),
        ("failed", ctypes.c_char * 64),
    )


@cache
def state() -> State:
    library = ctypes.CDLL(LIBRARY)
    library.faults_state.restype = ctypes.POINTER(State)
    found: State = library.faults_state().contents
    return found


def arm(what: int, at: int, error: int = 0) -> None:
    """Has something happen at a call, counted from now on; the first is 1."""
    found = state()
    found.calls, found.at, found.what, found.error, found.done = 0, at, what, error, 0
    found.last = found.failed = b""


@contextmanager
def between() -> Iterator[None]:
    """Sessions that are made meanwhile have the library between them and Xen's."""
    state()
    os.environ[VARIABLE] = LIBRARY
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        arm(NOTHING, 0)
