"""Debian packages, downloaded with the machine's own apt and unpacked with dpkg -x: nothing is installed, root is not needed.

The mirror is the one in the machine's apt configuration, or VMITAP_LAB_MIRROR (the address of a Debian archive, up to ".../debian").
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from .step import LabError, run

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def _apt(*command: str, config: Path | None = None, cwd: Path | None = None) -> str:
    return run(command, env={"LC_ALL": "C"} | ({"APT_CONFIG": str(config)} if config else {}), cwd=cwd)


def _mirrors() -> tuple[str, str]:
    """The archive and its security updates."""
    given = os.environ.get("VMITAP_LAB_MIRROR", "").rstrip("/")
    if given:
        return given, f"{given}-security"
    known = [line.rstrip("/") for line in _apt("apt-get", "indextargets", "--format", "$(REPO_URI)").splitlines()]
    main = next((uri for uri in known if uri.endswith("/debian")), None)
    if main is None:
        raise LabError(
            "this machine's apt knows no Debian archive (is it Ubuntu?). Name one:\n"
            "    make xen-lab VMITAP_LAB_MIRROR=http://<a Debian mirror>/debian"
        )
    return main, next((uri for uri in known if uri.endswith("/debian-security")), f"{main}-security")


@dataclass(frozen=True)
class Suite:
    """One Debian release, with package lists of its own in the cache."""

    name: str
    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "apt.conf"

    def update(self) -> None:
        """Fetches the package lists, once."""
        if (self.folder / "updated").exists():
            return
        if not KEYRING.exists():
            raise LabError(f"{KEYRING} is needed to check Debian's signatures:\n    sudo apt-get install debian-archive-keyring")
        for part in ("lists/partial", "cache/archives/partial"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        main, security = _mirrors()
        sources = [f"deb [signed-by={KEYRING}] {main} {self.name} main", f"deb [signed-by={KEYRING}] {security} {self.name}-security main"]
        (self.folder / "sources.list").write_text("\n".join(sources) + "\n")
        settings = {
            "Dir::State": self.folder,
            "Dir::State::Lists": self.folder / "lists",
            "Dir::State::status": self.folder / "status",
            "Dir::Cache": self.folder / "cache",
            "Dir::Etc::sourcelist": self.folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        self.config.write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()))
        _apt("apt-get", "-qq", "update", config=self.config)
        (self.folder / "updated").touch()

    def version(self, package: str) -> str:
        self.update()
        shown = _apt("apt-cache", "show", "--no-all-versions", package, config=self.config)
        return next(line.split(": ", 1)[1] for line in shown.splitlines() if line.startswith("Version: "))

    def unpack(self, packages: list[str], root: Path) -> Path:
        """Makes `root` hold what `packages` hold, and nothing else. Done again only when the list changes."""
        wanted = hashlib.sha256(json.dumps([self.name, sorted(packages)]).encode()).hexdigest()
        stamp = root.with_name(f"{root.name}.unpacked")
        if stamp.exists() and stamp.read_text() == wanted:
            return root
        self.update()
        debs = root.with_name(f"{root.name}.debs")
        for folder in (root, debs):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        _apt("apt-get", "-qq", "download", *packages, config=self.config, cwd=debs)
        for deb in sorted(debs.iterdir()):
            _apt("dpkg", "-x", str(deb), str(root))
        shutil.rmtree(debs)
        stamp.write_text(wanted)
        return root
