"""How much memory this process has in use."""

from __future__ import annotations

import ctypes


class _Heap(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33 or newer."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def heap() -> int:
    """Bytes that this process has from malloc: what the compiled module keeps. Guest memory and shadow pages are mapped, not in it."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _Heap
    state = ask()
    return int(state.uordblks + state.hblkhd)
