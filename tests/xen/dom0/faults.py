"""Calls of Xen's libraries that fail, or at which the process or the domain ends: the driving side of tests/xen/faults/faults.c."""

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
NOTHING, FAIL, KILL_BEFORE, KILL_AFTER, END_DOMAIN = range(5)
# What becomes of a domain that ends: these, or the reason of a shutdown (Xen's public/sched.h).
DESTROYED, RENAMED = -1, -2
SHUTDOWNS = {"reboot": 1, "suspend": 2, "crash": 3}


class State(ctypes.Structure):
    """Shared with every process that is forked after the library was loaded."""

    _fields_ = (
        ("calls", ctypes.c_long),
        ("at", ctypes.c_long),
        ("what", ctypes.c_long),
        ("error", ctypes.c_long),
        ("done", ctypes.c_long),
        ("domain", ctypes.c_long),
        ("way", ctypes.c_long),
        ("last", ctypes.c_char * 64),
        ("failed", ctypes.c_char * 64),
    )


@cache
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(LIBRARY)
    found.faults_state.restype = ctypes.POINTER(State)
    found.faults_end.argtypes = [ctypes.c_int, ctypes.c_long]
    return found


@cache
def state() -> State:
    found: State = library().faults_state().contents
    return found


def end_domain(domid: int, way: int) -> None:
    """At once, and without the toolstack."""
    library().faults_end(domid, way)


def resume_domain(domid: int) -> None:
    """Has a domain that has shut down, in whichever way, go on where it was."""
    assert library().faults_resume(domid) == 0


def arm(what: int, at: int, error: int = 0) -> None:
    """Has something happen at a call, counted from now on; the first is 1."""
    found = state()
    found.calls, found.at, found.what, found.error, found.done = 0, at, what, error, 0
    found.last = found.failed = b""


def arm_end(domid: int, way: int, at: int) -> None:
    """Has a domain end at a call, before it."""
    found = state()
    found.domain, found.way = domid, way
    arm(END_DOMAIN, at)


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
