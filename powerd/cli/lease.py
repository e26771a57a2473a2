"""Writing verbs on leases: set, and lease list|acquire|renew|release|show.

House rules: whatever is set is a lease with a reason and an end; ``set`` refuses to be open-ended; the exit code tells whether
the driver did it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from powerd.cli.context import (
    DryRun,
    GpuOption,
    Job,
    JsonFlag,
    MaxSmClock,
    MemClock,
    MinSmClock,
    PowerLimit,
    Reason,
    SmClock,
    Wants,
    connect,
    exit_code_of,
    note,
    simulated,
    split_gpus,
    tell_outcomes,
)
from powerd.cli.output import console, emit_json, plan, table, want
from powerd.errors import RequestError

if TYPE_CHECKING:
    from powerd.api import LeaseView
    from powerd.client import Client

lease_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Leases: list, acquire, renew, release, show.")
TOKEN_ENV = "POWERD_LEASE_TOKEN"  # noqa: S105 (a variable's name, not a secret)
LeaseId = Annotated[str, typer.Argument(help="The lease's id, as `powerctl lease list` shows it.")]
Token = Annotated[str | None, typer.Option("--token", envvar=TOKEN_ENV, help="The lease's token, if you are not its owner.")]


def set_(
    ctx: typer.Context,
    gpus: Annotated[list[str], typer.Argument(metavar="GPU...", help="Index, UUID, unique UUID prefix, or 'all'.")],
    duration: Annotated[str, typer.Option("--for", metavar="TIME", help="How long, e.g. 10m; then it is undone by itself.")],
    sm_clock: SmClock = None,
    min_sm_clock: MinSmClock = None,
    max_sm_clock: MaxSmClock = None,
    power_limit: PowerLimit = None,
    memory_clock: MemClock = None,
    reason: Reason = "powerctl set",
    job: Job = None,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Set clocks or a power limit for a while (a detached lease that ends by itself)."""
    wants = Wants.read(sm_clock, power_limit, memory_clock, min_sm_clock, max_sm_clock)
    client = connect(ctx)
    _finish(client, _detached(client, gpus, wants, duration, reason, job, dry_run), as_json)


def _detached(
    client: Client, gpus: str | list[str], wants: Wants, duration: str, reason: str, job: str | None, dry_run: bool
) -> LeaseView:
    from powerd.units import duration_s

    if wants.empty:
        raise RequestError("nothing to set", hint="give --sm-clock 1200MHz, --power-limit 300W or --memory-clock")
    ttl_s = duration_s(duration)
    lease = client.lease(gpus, **wants.keywords(), reason=reason, ttl_s=ttl_s, job=job, detached=True, dry_run=dry_run)
    return lease.view


def _finish(client: Client, view: LeaseView, as_json: bool) -> None:
    node = client.node()
    tell_outcomes(node, view)
    if as_json:
        emit_json(view)
    else:
        indices = {c.gpu.uuid: str(c.gpu.index) for c in node.gpus}
        where = ", ".join(indices.get(uuid, uuid) for uuid in view.gpus)
        what = "; ".join(map(want, view.wants))
        label = f" ({simulated(node)})" if node.simulated else ""
        if view.dry_run:
            print(f"would set GPU {where}: {what} for {view.ttl_s:g} s{label}; nothing was changed")
        else:
            print(
                f"lease {view.id}: GPU {where}: {what} for {view.ttl_s:g} s{label}; undo with `powerctl lease release {view.id}`"
            )
    raise typer.Exit(exit_code_of(view))


@lease_app.command("acquire")
def acquire(
    ctx: typer.Context,
    gpus: GpuOption = None,
    duration: Annotated[str, typer.Option("--ttl", metavar="TIME", help="It ends after this unless renewed.")] = "60s",
    sm_clock: SmClock = None,
    min_sm_clock: MinSmClock = None,
    max_sm_clock: MaxSmClock = None,
    power_limit: PowerLimit = None,
    memory_clock: MemClock = None,
    reason: Reason = "powerctl lease acquire",
    job: Job = None,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Acquire a detached lease for a script that renews and releases it; prints its id."""
    wants = Wants.read(sm_clock, power_limit, memory_clock, min_sm_clock, max_sm_clock)
    client = connect(ctx)
    view = _detached(client, split_gpus(gpus), wants, duration, reason, job, dry_run)
    if not as_json and not dry_run:
        note(f"keep the token: export {TOKEN_ENV}={view.token}")
    _finish(client, view, as_json)


@lease_app.command("list")
def list_(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """List the leases that you may see."""
    client = connect(ctx)
    views = client.leases()
    if as_json:
        emit_json(views)
        return
    node = client.node()
    indices = {c.gpu.uuid: str(c.gpu.index) for c in node.gpus}
    rows = table("lease", "state", "GPU", "user", ">pid", "wants", "plans", "reason", ">expires in",
                 title=f"leases{f' ({simulated(node)})' if node.simulated else ''}")  # fmt: skip
    for view in views:
        where = ",".join(indices.get(uuid, uuid) for uuid in view.gpus)
        what = "; ".join(map(want, view.wants))
        pid = "-" if view.pid is None else str(view.pid)
        plans = "; ".join(map(plan, view.plans)) or "-"
        rows.add_row(view.id, str(view.state), where, view.user, pid, what, plans, view.reason, f"{view.expires_in_s:.0f} s")
    console().print(rows)


@lease_app.command("show")
def show(ctx: typer.Context, lease_id: LeaseId, as_json: JsonFlag = False) -> None:
    """Show one lease and what became of its wants."""
    client = connect(ctx)
    view = client.lease_view(lease_id)
    if as_json:
        emit_json(view)
        return
    node = client.node()
    indices = {c.gpu.uuid: str(c.gpu.index) for c in node.gpus}
    print(f"lease {view.id}: {view.state}{f' ({view.end})' if view.end else ''}{', simulated' if node.simulated else ''}")
    print(
        f"  holder  {view.user} (uid {view.uid}{f', pid {view.pid}' if view.pid else ''}){', detached' if view.detached else ''}"
    )
    print(f"  reason  {view.reason}{f' (job {view.job})' if view.job else ''}")
    print(f"  GPUs    {', '.join(indices.get(u, u) for u in view.gpus)}")
    print(f"  wants   {'; '.join(map(want, view.wants))}")
    print(f"  ends    in {view.expires_in_s:.0f} s of {view.ttl_s:g} s unless renewed")
    for outcome in view.outcomes:
        print(f"  GPU {indices.get(outcome.uuid, outcome.uuid)} {outcome.control}: {outcome.verdict} {outcome.detail}".rstrip())
    for armed in view.plans:
        print(f"  GPU {indices.get(armed.uuid, armed.uuid)} clock plan {plan(armed)}; {armed.switches} clocks set")
    for refusal in view.refused:
        print(f"  GPU {indices.get(refusal.uuid, refusal.uuid)} {refusal.control}: not served: {refusal.why}")


@lease_app.command("renew")
def renew(ctx: typer.Context, lease_id: LeaseId, token: Token = None, dry_run: DryRun = False, as_json: JsonFlag = False) -> None:
    """Renew a lease's TTL."""
    client = connect(ctx)
    view = client.lease_view(lease_id) if dry_run else client.lease_renew(lease_id, token)
    if as_json:
        emit_json(view)
    else:
        print(f"lease {view.id}: {'would be renewed' if dry_run else 'renewed'} for {view.ttl_s:g} s")


@lease_app.command("release")
def release(
    ctx: typer.Context, lease_id: LeaseId, token: Token = None, dry_run: DryRun = False, as_json: JsonFlag = False
) -> None:
    """Release a lease; returns when its settings are undone."""
    client = connect(ctx)
    view = client.lease_view(lease_id) if dry_run else client.lease_release(lease_id, token)
    if as_json:
        emit_json(view)
    else:
        print(f"lease {view.id}: {'would be released' if dry_run else 'released'}")
