"""Verbs on the whole node: panic, quiesce, resume.

House rules: each says what it is about to do to whom under ``--dry-run``; panic asks nothing back; none hides that the node is
simulated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from powerd.cli.context import DryRun, JsonFlag, connect, simulated
from powerd.cli.output import emit_json

if TYPE_CHECKING:
    from powerd.api import Ack
    from powerd.client import Client


def panic(ctx: typer.Context, dry_run: DryRun = False, as_json: JsonFlag = False) -> None:
    """Put every GPU back to baseline now and refuse all wants until `powerctl resume`."""
    client = connect(ctx)
    if dry_run:
        _would(client, "put {gpus} GPU(s) back to baseline, end {leases} lease(s) and refuse wants until resume")
        return
    _done(client, client.panic(), as_json)


def quiesce(
    ctx: typer.Context,
    duration: Annotated[str, typer.Option("--for", metavar="TIME", help="It ends by itself after this.")] = "15m",
    reason: Annotated[str, typer.Option("--reason", help="Why; shown in status and events.")] = "",
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Baseline everywhere and close every NVML handle, for a driver upgrade, GPU reset or MIG change."""
    from powerd.units import duration_s

    max_s = duration_s(duration)
    client = connect(ctx)
    if dry_run:
        _would(client, f"put {{gpus}} GPU(s) back to baseline and close every NVML handle for at most {max_s:g} s")
        return
    _done(client, client.quiesce(max_s=max_s, reason=reason), as_json)


def resume(ctx: typer.Context, dry_run: DryRun = False, as_json: JsonFlag = False) -> None:
    """End panic and quiesce."""
    client = connect(ctx)
    if dry_run:
        node = client.node()
        state = " and ".join(word for word, on in (("panic", node.panic), ("quiesce", node.quiesced)) if on) or "nothing"
        print(f"would end {state}{f' ({simulated(node)})' if node.simulated else ''}; nothing was changed")
        return
    _done(client, client.resume(), as_json)


def _would(client: Client, text: str) -> None:
    node = client.node()
    leases = sum(lease.state != "ended" for lease in client.leases())
    label = f" ({simulated(node)})" if node.simulated else ""
    print(f"would {text.format(gpus=len(node.gpus), leases=leases)}{label}; nothing was changed")


def _done(client: Client, ack: Ack, as_json: bool) -> None:
    if as_json:
        emit_json(ack)
        return
    node = client.node()
    print(f"{ack.detail or 'done'}{f' ({simulated(node)})' if node.simulated else ''}")
