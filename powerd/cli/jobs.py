"""Training jobs: what each took in time and energy, and what its plan saves.

House rules: one row a job; what was not measured is ``-``, never an estimate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from powerd.cli.context import JsonFlag, connect, simulated
from powerd.cli.output import console, emit_json, table
from powerd.cli.status import stamp
from powerd.units import joules

if TYPE_CHECKING:
    from powerd.api import JobView, NodeView

JobName = Annotated[str | None, typer.Argument(metavar="[JOB]", help="One job; default all that you may see.")]


def jobs(ctx: typer.Context, job: JobName = None, as_json: JsonFlag = False) -> None:
    """Show training jobs: steps, time and energy per step, goodput, and the saving that was measured."""
    client = connect(ctx)
    views = client.jobs() if job is None else (client.job(job),)
    if as_json:
        emit_json(views if job is None else views[0])
        return
    node = client.node()
    if job is None:
        _table(node, views)
    else:
        _page(node, views[0])


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _table(node: NodeView, views: tuple[JobView, ...]) -> None:
    rows = table("job", "state", "GPUs", ">steps", ">lost", ">step time", ">energy", ">per kept step", "plan", ">saves",
                 title=f"jobs{f' ({simulated(node)})' if node.simulated else ''}")  # fmt: skip
    indices = {c.gpu.uuid: str(c.gpu.index) for c in node.gpus}
    for view in views:
        where = ",".join(indices.get(uuid, uuid) for uuid in view.gpus) or "-"
        rows.add_row(
            view.job, view.state, where, str(view.steps), str(view.lost_steps), _seconds(view.time_s), joules(view.energy_j),
            joules(view.energy_per_retained_step_j), view.plan or "-", _share(view.saving_fraction),
        )  # fmt: skip
    console().print(rows)


def _page(node: NodeView, view: JobView) -> None:
    indices = {c.gpu.uuid: str(c.gpu.index) for c in node.gpus}
    ended = f" to {stamp(view.end_wall_ns)}" if view.end_wall_ns is not None else ""
    print(f"job {view.job}: {view.state}, {stamp(view.begin_wall_ns)}{ended}{', simulated' if node.simulated else ''}")
    print(f"  GPUs         {', '.join(indices.get(u, u) for u in view.gpus) or '-'}")
    print(f"  steps        {view.steps} kept, {view.lost_steps} lost to restores, {_seconds(view.time_s)} each (median)")
    unknown = f"; {view.unmeasured_steps} steps were not measured" if view.unmeasured_steps else ""
    print(f"  energy       {joules(view.energy_j)}{unknown}")
    print(f"  per step     {joules(view.energy_per_retained_step_j)} for every step that was kept")
    if view.checkpoints:
        print(f"  checkpoints  {view.checkpoints}, {_seconds(view.checkpoint_time_s)}, {joules(view.checkpoint_energy_j)}")
    saves = f", saves {_share(view.saving_fraction)}" if view.saving_fraction is not None else ", saving not measured"
    print(f"  plan         {view.plan or '-'}{saves if view.plan else ''}")
    if view.exceptions or view.last_detail:
        print(f"  last word    {view.last_detail or '-'} ({view.exceptions} exception(s))")
