"""Guests under xl: started, looked at through what Xen itself says, and destroyed."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import vmitap

JOB = Path("/job")
VCPUS = int((JOB / "vcpus").read_text())


def xl(*words: str, check: bool = True) -> str:
    done = subprocess.run(["xl", *words], capture_output=True, text=True, timeout=120, check=False)
    if check and done.returncode:
        raise AssertionError(f"xl {' '.join(words)}: {done.stderr}{done.stdout}{xl('list', check=False)}")
    return done.stdout


def release() -> tuple[int, int]:
    """Of Xen, as (4, 17)."""
    major, minor = (re.search(rf"^{name} *: (\d+)", xl("info"), re.MULTILINE) for name in ("xen_major", "xen_minor"))
    assert major is not None
    assert minor is not None
    return int(major[1]), int(minor[1])


def attach(target: str, *, on_write: vmitap.OnWrite | None = None) -> vmitap.Vm:
    """Without a watchdog, which is another Python that takes longer to start than most tests. test_repair.py has it."""
    return vmitap.attach(target, on_write=on_write, watchdog=False)


def wait_for(what: str, condition: Callable[[], bool], limit: float = 20) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {limit} s"
        time.sleep(0.02)


class Domain:
    """A running guest; its debug console (port 0xe9) goes into Xen's own log."""

    def __init__(
        self,
        name: str,
        kernel: str,
        cmdline: str,
        *,
        memory: int = 64,
        vcpus: int = VCPUS,
        more: str = "",
        paused: bool = False,
        managed: bool = False,
    ) -> None:
        """`managed`: `xl` stays and starts it again when it wants to be rebooted."""
        self.name = name
        self.vcpus = vcpus
        config = JOB / f"{name}.cfg"
        lines = {"name": name, "type": "pvh", "kernel": kernel, "cmdline": cmdline, "altp2m": "external"}
        # A guest that has come to its end is still there to be looked at.
        lines |= {"on_poweroff": "preserve", "on_crash": "preserve"}
        text = "".join(f'{key}="{value}"\n' for key, value in lines.items())
        config.write_text(f"{text}memory={memory}\nmaxmem={memory}\nvcpus={vcpus}\n{more}\n")
        xl("create", "-q", *([] if managed else ["-e"]), *(["-p"] if paused else []), str(config))
        self.domid = int(xl("domid", name))

    def unpause(self) -> None:
        xl("unpause", self.name)

    @property
    def alive(self) -> bool:
        return subprocess.run(["xl", "domid", self.name], capture_output=True, check=False).returncode == 0

    @property
    def console(self) -> str:
        """What it wrote to its debug console, as far as Xen's log still has it."""
        return "\n".join(re.findall(rf"^\(d{self.domid}\) ?(.*)$", xl("dmesg"), re.MULTILINE))

    @property
    def state(self) -> str:
        """Where its vCPUs are, for the report of a failed test."""
        parts = [xl("list", check=False), xl("vcpu-list", self.name, check=False)]
        for vcpu in range(self.vcpus):
            context = subprocess.run(["xenctx", "-a", str(self.domid), str(vcpu)], capture_output=True, text=True, check=False)
            parts.append(context.stdout + context.stderr)
        # What the processor has of them, in Xen's own log.
        xl("debug-keys", "v", check=False)
        time.sleep(0.5)
        return "\n".join([*parts, self.console, xl("dmesg")[-10_000:]])

    def destroy(self) -> None:
        # By its number: it may have another name by now.
        xl("destroy", str(self.domid), check=False)


Start = Callable[..., Domain]
"""The fixture that starts guests: takes what `Domain` takes."""
