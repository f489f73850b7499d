"""The demo guest's truth page, looked at by dom0 itself: nobody is attached meanwhile, and it costs no attaching."""

from __future__ import annotations

import ctypes
import mmap
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from demo_guest import GO, KERNEL_WINDOW, symbols
from vmitap.cli.truth import Truth

if TYPE_CHECKING:
    import vmitap
    from domain import Domain


class Outside:
    """One page of a domain, mapped for the moment that each look takes: a mapping that stays keeps a domain from going away."""

    def __init__(self, guest: Domain) -> None:
        self._domid = guest.domid
        self._gfn = (symbols()["truth"] - KERNEL_WINDOW) >> 12
        # Xen's own: what stands between vmitap and its libraries (tests/xen/faults) does not see this.
        library = ctypes.CDLL("libxenforeignmemory.so.1", use_errno=True)
        self._open, self._map, self._unmap = (getattr(library, f"xenforeignmemory_{name}") for name in ("open", "map", "unmap"))
        self._open.restype = self._map.restype = ctypes.c_void_p
        self._map.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
        self._unmap.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self._handle = self._open(None, 0)
        assert self._handle

    def _with_page(self, offset: int, length: int, new: bytes | None = None) -> bytes:
        gfns, errors = (ctypes.c_uint64 * 1)(self._gfn), (ctypes.c_int * 1)()
        page = self._map(self._handle, self._domid, mmap.PROT_READ | mmap.PROT_WRITE, 1, gfns, errors)
        assert page, f"the truth page of domain {self._domid}: error {ctypes.get_errno()}"
        try:
            if new is not None:
                ctypes.memmove(page + offset, new, len(new))
            return ctypes.string_at(page + offset, length)
        finally:
            self._unmap(self._handle, page, 1)

    def truth(self) -> Truth:
        return Truth.read(cast("vmitap.Vm", SimpleNamespace(read=lambda _, length: self._with_page(0, length))))

    def begin(self, turn: int = 1) -> None:
        """Lets the guest do as many turns."""
        self._with_page(GO, 0, turn.to_bytes(2, "little"))
