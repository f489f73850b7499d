"""`vmitap list`: the domains of a Xen machine."""

from __future__ import annotations

import click

import vmitap
from vmitap.cli.options import json_option
from vmitap.cli.output import Output


@click.command("list")
@json_option
def list_domains(as_json: bool) -> None:
    """List the domains of this Xen machine, and what is in the way of tapping them."""
    out = Output(as_json=as_json)
    host = vmitap.xen_host()
    out.object(
        {
            "version": host.version,
            "obstacle": host.obstacle,
            "hint": host.hint,
            "domains": [
                {
                    "id": domain.id,
                    "name": domain.name,
                    "kind": domain.kind,
                    "vcpus": domain.vcpus,
                    "memory_size": domain.memory_size,
                    "target": domain.target,
                    "obstacle": domain.obstacle,
                    "hint": domain.hint,
                }
                for domain in host.domains
            ],
        }
    )
    out.table(
        ["domain", "name", "kind", "vCPUs", "MiB", "can be tapped"],
        [
            [str(domain.id), domain.name, domain.kind, str(domain.vcpus), str(domain.memory_size >> 20), domain.obstacle or "yes"]
            for domain in host.domains
        ],
    )
    hints = [host.hint, *(domain.hint for domain in host.domains if domain.id != 0)]
    for hint in dict.fromkeys(hint for hint in hints if hint):
        out.text(f"hint: {hint}")
