"""Inference replicas: what each does, at which clock it is held and why.

House rules: one row a replica; a latency is the upper edge of its bucket; what is not known is ``-``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from powerd.cli.context import JsonFlag, connect, simulated
from powerd.cli.output import console, emit_json, table
from powerd.units import joules

if TYPE_CHECKING:
    from powerd.api import NodeView
    from powerd.replicatypes import ReplicaView, SloSpec

_SLO = {True: "kept", False: "missed", None: "-"}


def replicas(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Show inference replicas: load, latencies against the SLO, the clock they are held at and why."""
    client = connect(ctx)
    views = client.replicas()
    if as_json:
        emit_json(views)
    else:
        _table(client.node(), views)


def _seconds(value: float | None, *promised_s: float | None) -> str:
    promised = " to ".join(f"{each_s:g}" for each_s in promised_s if each_s is not None)
    return f"{'-' if value is None else f'{value:g}'}{f' of {promised}' if promised else ''} s"


def _ttfts(slo: SloSpec) -> list[float]:
    """From the strictest to that of the longest prompts, once where they are one."""
    return sorted({s for s in (slo.strictest_ttft_s, slo.ttft_s) if s is not None})


def _number(value: float | None, form: str = "g", unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _table(node: NodeView, views: tuple[ReplicaView, ...]) -> None:
    rows = table("replica", "pool", ">TP", "GPUs", "state", ">clock", ">running", ">waiting", ">TTFT p99", ">TBT p99", "SLO",
                 ">power", ">energy", "why", title=f"replicas{f' ({simulated(node)})' if node.simulated else ''}")  # fmt: skip
    indices = {c.gpu.uuid: str(c.gpu.index) for c in node.gpus}
    for view in sorted(views, key=lambda v: (v.pool, v.name)):
        clock = "full" if view.clock_mhz is None else f"{view.clock_mhz} MHz"
        rows.add_row(
            view.name, view.pool, str(view.tp), ",".join(indices.get(uuid, uuid) for uuid in view.gpus), view.state, clock,
            _number(view.running), _number(view.waiting), _seconds(view.ttft_p99_s, *_ttfts(view.slo)),
            _seconds(view.tbt_p99_s, view.slo.tbt_s), _SLO[view.within_slo], _number(view.power_w, ".0f", " W"),
            joules(view.energy_j), view.reason + (f" ({view.note})" if view.note and view.note not in view.reason else ""),
        )  # fmt: skip
    console().print(rows)
