"""Reading verbs: status, top, explain.

House rules: one call of the API per fact; what the caller may not see is said, not hidden; a page fits a terminal.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from powerd import units
from powerd.cli.context import GpuNames, JsonFlag, connect, note, simulated, verdict_text
from powerd.cli.output import console, emit_json, interval, plan, status_table, table, want
from powerd.errors import PowerdError, UnavailableError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from powerd.api import ControlExplain, Explain, NodeView
    from powerd.client import Client
    from powerd.records import HostLoad


def status(ctx: typer.Context, gpus: GpuNames = None, as_json: JsonFlag = False) -> None:
    """Show every GPU: power, limit, clocks, temperature, and who holds it."""
    client = connect(ctx)
    node, snapshot = client.node(), client.snapshot()
    leases = tuple(lease for lease in client.leases() if lease.state != "ended")
    if gpus:
        chosen = client.resolve(gpus)
        import dataclasses

        node = dataclasses.replace(node, gpus=tuple(c for c in node.gpus if c.gpu.uuid in chosen))
        snapshot = dataclasses.replace(snapshot, readings=tuple(r for r in snapshot.readings if r.uuid in chosen))
    if as_json:
        emit_json({"node": node, "snapshot": snapshot, "leases": leases, "load": _load(client)})
    else:
        console().print(status_table(node, snapshot, leases))
        if not node.config_reload_ok:
            note(f"the configuration file was refused, the last good one stays in force: {node.config_error}")


def _load(client: Client) -> HostLoad | None:
    """The host around the GPUs; None where a daemon does not tell."""
    try:
        return client.node_load()
    except PowerdError:
        return None


def top(
    ctx: typer.Context,
    interval_s: Annotated[float, typer.Option("--interval", "-d", min=0.1, help="Seconds between two pictures.")] = 1.0,
    count: Annotated[int | None, typer.Option("--count", "-n", min=1, help="Pictures to show; default: until Ctrl-C.")] = None,
) -> None:
    """Watch the GPUs live; Ctrl-C ends it."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    client = connect(ctx)

    def picture() -> RenderableType:
        node, snapshot, leases = client.node(), client.snapshot(), client.leases()
        live = tuple(lease for lease in leases if lease.state != "ended")
        total = sum(r.power_mw for r in snapshot.readings if r.power_mw is not None)
        foot = Text(
            f"{units.watts(total)} in all, {len(live)} lease(s), reading {snapshot.age_s:.1f} s old, Ctrl-C ends", style="dim"
        )
        return Group(status_table(node, snapshot, live), foot)

    first = picture()
    try:
        with Live(first, console=console(), auto_refresh=False, screen=False) as live:
            shown = 1
            while count is None or shown < count:
                time.sleep(interval_s)
                try:
                    live.update(picture(), refresh=True)
                except UnavailableError as error:
                    live.update(Text(f"{error}; waiting for it to come back", style="red"), refresh=True)
                shown += 1
    except KeyboardInterrupt:
        return


def explain(
    ctx: typer.Context, gpu: Annotated[str, typer.Argument(help="Index, UUID or unique UUID prefix.")], as_json: JsonFlag = False
) -> None:
    """Say why a GPU is set as it is: requested, accepted, enforced, observed, winner, losers, limits, clock events."""
    client = connect(ctx)
    page = client.explain(gpu)
    if as_json:
        emit_json(page)
        return
    node: NodeView | None = None
    try:
        node = client.node()
    except PowerdError:
        node = None
    _print(page, node)


def _print(page: Explain, node: NodeView | None) -> None:
    out = console()
    label = f" ({simulated(node)})" if node is not None and node.simulated else ""
    out.print(f"GPU {page.index}: {page.name}, {page.uuid}, {page.health}{label}", markup=False, style="bold")
    r = page.reading
    if r is not None:
        out.print(
            f"  now: {units.watts(r.power_mw)}"
            f", SM {units.megahertz(r.sm_clock_mhz)}, memory {units.megahertz(r.memory_clock_mhz)}"
            f", limit requested {units.watts(r.power_limit_requested_mw)}, enforced {units.watts(r.power_limit_enforced_mw)}"
        )
    out.print(f"  clock event reasons: {', '.join(page.clock_event_reasons) or 'none'}")
    for control in page.controls:
        out.print()
        _control(out, control)
    if page.leases:
        out.print()
        rows = table("lease", "user", "state", "wants", "reason", ">expires in")
        for lease in page.leases:
            wants = "; ".join(map(want, lease.wants))
            rows.add_row(lease.id, lease.user, str(lease.state), wants, lease.reason, f"{lease.expires_in_s:.0f} s")
        out.print(rows)
    if page.plans:
        out.print("\nclock plans")
        for view in page.plans:
            out.print(f"  {plan(view)}; {view.switches} clocks set", markup=False)
    if page.recent_events:
        out.print("\nrecent events")
        for event in page.recent_events:
            out.print(f"  {stamp(event.wall_ns)}  {event.kind}  {event.subject or ''}  {event.detail}".rstrip(), markup=False)


def _control(out: Console, c: ControlExplain) -> None:
    unit = c.control.unit
    out.print(f"{c.control}", style="bold")
    if not c.available:
        out.print(f"  cannot be controlled: {c.unavailable_reason}", markup=False)
        return
    sp, oc = c.setpoint, c.outcome
    requested = oc.requested if oc is not None else sp.value if sp is not None else None
    lines = [("requested", "baseline" if requested is None else interval(requested, unit))]
    if oc is not None:
        lines += [
            ("accepted", interval(oc.accepted, unit)),
            ("enforced", units.watts(oc.enforced) if unit == "mW" else units.megahertz(oc.enforced)),
            ("observed", units.watts(oc.observed) if unit == "mW" else units.megahertz(oc.observed)),
            ("verdict", verdict_text(oc)),
        ]
    if sp is not None:
        lines += [("winner", f"{sp.winner}: {sp.reason}" if sp.winner else "nobody: baseline")]
        lines += [("loser", f"{r.want.source} wanted {interval(r.want.interval, unit)}: {r.why}") for r in sp.refused]
        if sp.deferred_until_ns is not None:
            lines += [("deferred", "a step down waits for the minimum dwell")]
    lines += [
        ("limits", f"device {interval(c.device, unit)}, site {interval(c.site, unit)}"),
        ("baseline", "unlocked" if c.baseline is None else interval(c.baseline, unit)),
    ]
    if c.last_change_by:
        lines += [("last change", c.last_change_by)]
    for name, text in lines:
        out.print(f"  {name:<12}{text}", markup=False)


def stamp(wall_ns: int) -> str:
    """Local time of day for people."""
    return time.strftime("%H:%M:%S", time.localtime(wall_ns / 1e9))
