"""Verbs about the past: history and events.

House rules: a column's unit is in its name; a gap is a gap; a picture shows what the table shows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from powerd.cli.context import GpuNames, JsonFlag, begin_of, connect, note, simulated
from powerd.cli.output import console, emit_json, progress, table
from powerd.cli.status import stamp
from powerd.errors import RequestError

if TYPE_CHECKING:
    from powerd.client import Client

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float | None], width: int = 40) -> str:
    """The course of a column in one line; a bucket without a value is a space."""
    if not values:
        return ""
    step = max(1, -(-len(values) // width))
    buckets = [[v for v in values[i : i + step] if v is not None] for i in range(0, len(values), step)]
    means = [sum(b) / len(b) if b else None for b in buckets]
    known = [m for m in means if m is not None]
    if not known:
        return " " * len(means)
    low, high = min(known), max(known)
    span = (high - low) or 1.0
    return "".join(" " if m is None else _BARS[min(7, int((m - low) / span * 8))] for m in means)


def history(
    ctx: typer.Context,
    gpus: GpuNames = None,
    since: Annotated[str, typer.Option("--since", metavar="TIME", help="Unix seconds, or an age such as 15m, 2h, 7d.")] = "1h",
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Likewise; default now.")] = None,
    points: Annotated[int, typer.Option("--points", min=1, max=100_000, help="At most this many buckets per GPU.")] = 120,
    columns: Annotated[str | None, typer.Option("--columns", metavar="LIST", help="Comma separated; default all.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw it into a .png, .svg or .pdf instead.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="FILE", help="Write every stored row into a .csv or .parquet instead.")
    ] = None,
    leases: Annotated[bool, typer.Option("--leases", help="The leases of this time instead, ended ones too.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show stored samples: a line per GPU and column with its course, or a picture; or export them; or past leases."""
    if sum((plot is not None, export is not None, leases)) > 1:
        raise RequestError("one of --plot, --export and --leases")
    if leases:
        _leases(ctx, since, until, as_json)
        return
    if plot is not None:
        from powerd.plot import check

        check(plot)
    client = connect(ctx)
    names = [part for part in (columns or "").split(",") if part] or None
    if export is not None:
        _export(client, export, gpus, since, until, names)
        return
    view = client.history(gpus or "all", since=since, until=until, points=points, columns=names)
    if as_json:
        emit_json(view)
        return
    node = client.node()
    labels = {c.gpu.uuid: f"GPU {c.gpu.index}" for c in node.gpus}
    if plot is not None:
        from powerd.plot import history as draw

        draw(plot, view, labels, simulated=node.simulated)
        note(f"wrote {plot}")
        return
    begin, end = (time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t)) for t in (view.since_s, view.until_s))
    label = f", {simulated(node)}" if node.simulated else ""
    rows = table(
        "GPU", "column", ">min", ">mean", ">max", ">last", "course", title=f"{begin} to {end} from table {view.table}{label}"
    )
    for series in view.series:
        for column, values in series.columns.items():
            known = [v for v in values if v is not None]
            numbers = (
                ["-"] * 4 if not known else [f"{v:.6g}" for v in (min(known), sum(known) / len(known), max(known), known[-1])]
            )
            rows.add_row(labels.get(series.uuid, series.uuid).removeprefix("GPU "), column, *numbers, sparkline(values))
    console().print(rows)
    if not any(series.time_s for series in view.series):
        note("no samples in this time; is [store] enabled, and since when?")


def _export(client: Client, path: Path, gpus: list[str] | None, since: str, until: str | None, columns: list[str] | None) -> None:
    from powerd.cli.export import check, write

    check(path)
    now_s = client.snapshot().wall_ns / 1e9
    until_s = now_s + 1 if until is None else begin_of(until, now_s + 1)
    chosen = client.resolve(gpus) if gpus else [c.gpu.uuid for c in client.node().gpus]
    with progress("exporting") as told:
        count = write(client, path, chosen, begin_of(since, until_s), until_s, columns, told)
    note(f"wrote {count} rows to {path}" + ("" if count else "; is [store] enabled, and since when?"))


def _leases(ctx: typer.Context, since: str, until: str | None, as_json: bool) -> None:
    client = connect(ctx)
    found = client.past_leases(since=since, until=until)
    if as_json:
        emit_json(found)
        return
    labels = {c.gpu.uuid: str(c.gpu.index) for c in client.node().gpus}
    rows = table("last change", "lease", "state", "ended by", ">uid", "job", "GPUs", "reason")
    for lease in found:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lease.wall_ns / 1e9))
        where = ",".join(labels.get(uuid, uuid) for uuid in lease.gpus)
        rows.add_row(when, lease.id, lease.state, lease.ending or "-", str(lease.uid), lease.job or "-", where, lease.reason)
    console().print(rows)


def events(
    ctx: typer.Context,
    since: Annotated[int | None, typer.Option("--since", help="Only events after this sequence number.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most this many, the newest.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new events until Ctrl-C.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List what happened: leases, restores, drift, lost GPUs."""
    client = connect(ctx)
    found = client.events(since=since, limit=limit)
    if as_json and not follow:
        emit_json(found)
        return
    node = client.node()
    if node.simulated:
        note(f"{simulated(node)} node")
    labels = {c.gpu.uuid: f"GPU {c.gpu.index}" for c in node.gpus}

    def show(event: object) -> None:
        from powerd.model import Event

        if not isinstance(event, Event):
            return
        if as_json:
            import msgspec

            print(msgspec.json.encode(event).decode(), flush=True)
            return
        where = "" if event.uuid is None else labels.get(event.uuid, event.uuid)
        line = f"{event.seq:>6}  {stamp(event.wall_ns)}  {event.kind:<16} {where:<7} {event.subject or '':<12} {event.detail}"
        print(line.rstrip(), flush=True)

    for event in found:
        show(event)
    if follow:
        seen = max((e.seq for e in found), default=0)
        for item in client.stream(events_only=True):
            if getattr(item, "kind", None) is not None and item.seq > seen:
                show(item)
