"""The Xen releases that the lab runs, each with the Debian release that ships it."""

from __future__ import annotations

from dataclasses import dataclass

LIBRARIES = [
    *("libxencall1", "libxendevicemodel1", "libxenevtchn1", "libxenforeignmemory1", "libxengnttab1", "libxenhypfs1"),
    *("libxenstore4", "libxentoolcore1", "libxentoollog1", "libyajl2", "libuuid1", "libnl-3-200", "libnl-route-3-200"),
    *("libc6", "libgcc-s1", "zlib1g", "libzstd1", "liblzma5", "libbz2-1.0", "liblzo2-2", "libexpat1", "libffi8", "libcrypt1"),
]


@dataclass(frozen=True)
class Release:
    """One release of Xen, its Debian suite, and the suite's own Python and OpenSSL."""

    xen: str
    suite: str
    python: str
    openssl: str

    @property
    def packages(self) -> list[str]:
        own = [f"xen-hypervisor-{self.xen}-amd64", f"xen-utils-{self.xen}", f"libxenmisc{self.xen}", self.openssl, "busybox-static"]
        python = [f"python{self.python}-minimal", f"libpython{self.python}-minimal", f"libpython{self.python}-stdlib"]
        return [*own, *python, *LIBRARIES]


RELEASES = {each.xen: each for each in (Release("4.17", "bookworm", "3.11", "libssl3"), Release("4.20", "trixie", "3.13", "libssl3t64"))}
