"""The frontier of a pipeline's iteration time and energy, beside what power limits, EnvPipe and stragglers make of it.

House rules: the numbers come from powerd_policies; a saving is against every GPU at its highest clock; tables, JSON and picture
show the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerd.cli.context import note
from powerd.cli.output import console, table
from powerd.errors import RequestError
from powerd_policies.perseus import baselines, straggler
from powerd_policies.perseus.document import JobFile
from powerd_policies.perseus.problem import Plan, Problem

if TYPE_CHECKING:
    from rich.table import Table

    from powerd_policies.perseus.frontier import Frontier

SLOWDOWNS = (0.0, 0.05, 0.10)


@dataclass(frozen=True, slots=True)
class Point:
    """One plan of the frontier; joules of all GPUs of the job's pipeline until its deadline."""

    deadline_s: float
    slowdown: float  # of the deadline, against the highest clocks
    iteration_time_s: float
    energy_j: float
    lower_bound_j: float
    saving: float
    bound_saving: float  # nobody saves more
    waiting_saving: float  # against the highest clocks that wait until the deadline, too: beside a straggler of that time

    def to_json(self) -> dict[str, float]:
        """As a row of OUT.json's ``frontier``."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Beside:
    """One way to choose clocks within one slowdown."""

    name: str
    allowed: float
    slowdown: float
    energy_j: float
    saving: float


@dataclass(frozen=True, slots=True)
class Straggling:
    """A job of which one pipeline is slower by a factor: what the job saves, by way to choose the clocks of the others."""

    factor: float
    deadline_s: float  # T_opt = min(T*, T')
    savings: dict[str, float]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that ``powerctl perseus report`` shows."""

    points: tuple[Point, ...]
    beside: tuple[Beside, ...]
    straggling: tuple[Straggling, ...]
    pipelines: int
    baseline_s: float
    baseline_j: float

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def compute(problem: Problem, points: int, cache: Path | None = None) -> Frontier:
    """The frontier, with a progress bar; taken from ``cache`` when it holds that of the same problem, else written there."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from powerd_policies.perseus import frontier

    if cache is not None and cache.exists():
        try:
            found = frontier.load(cache, problem)
        except RequestError as error:
            note(f"{cache} is of no use ({error.message}): planned anew")
        else:
            note(f"took the frontier from {cache}")
            return found
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("frontier", total=points)
        made = frontier.frontier(problem, points, lambda share: bar.update(task, completed=round(share * points)))
    if cache is not None:
        try:
            made.save(cache)
        except OSError as error:
            raise RequestError(f"cannot write {cache}: {error.strerror}", hint="choose another --cache") from error
        note(f"wrote {cache}")
    return made


def points(front: Frontier, baseline: Plan, job: JobFile) -> tuple[Point, ...]:
    """The frontier's plans, fastest first."""
    return tuple(point(plan, baseline, job) for plan in front.plans)


def point(plan: Plan, baseline: Plan, job: JobFile) -> Point:
    """A plan as a row."""
    gpus, base_j = job.gpus_per_stage, baseline.energy_j
    return Point(
        plan.deadline_s, plan.deadline_s / baseline.iteration_time_s - 1, plan.iteration_time_s, plan.energy_j * gpus,
        plan.lower_bound_j * gpus, 1 - plan.energy_j / base_j, 1 - plan.lower_bound_j / base_j,
        1 - plan.energy_j / baselines.until(baseline, max(plan.deadline_s, baseline.iteration_time_s)).energy_j,
    )  # fmt: skip


def report(problem: Problem, front: Frontier, baseline: Plan, job: JobFile, factors: Sequence[float], pipelines: int) -> Report:
    """The frontier, the baselines within the same slowdowns, and a job with one straggler."""
    from powerd_policies.perseus.planner import Planner
    from powerd_policies.perseus.rounding import QUICK

    usual_s, gpus = baseline.iteration_time_s, job.gpus_per_stage
    planner = Planner(problem)
    beside = []
    fixed: dict[str, Plan] = {}
    for allowed in SLOWDOWNS:
        deadline_s = usual_s * (1 + allowed)
        plans = {name: make(problem, allowed) for name, make in baselines.BASELINES.items() if allowed or name != "max clock"}
        if allowed:
            plans.pop("max clock")
        plans = {**plans, "Perseus": planner.plan(deadline_s, QUICK)}
        for name, plan in plans.items():
            # Energy until the same moment for all, so that who is faster than allowed pays for its waiting.
            energy_j = baselines.until(plan, max(deadline_s, plan.iteration_time_s)).energy_j
            beside.append(
                Beside(name, allowed, plan.iteration_time_s / usual_s - 1, energy_j * gpus, 1 - energy_j / baseline.energy_j)
            )
        if not allowed:
            fixed = plans
    late = {factor: planner.plan(max(usual_s * factor, planner.shortest_s), QUICK) for factor in factors}
    straggling = tuple(_straggling(plan, baseline, fixed, factor, pipelines) for factor, plan in late.items())
    return Report(points(front, baseline, job), tuple(beside), straggling, pipelines, usual_s, baseline.energy_j * gpus)


def _straggling(best: Plan, baseline: Plan, fixed: dict[str, Plan], factor: float, pipelines: int) -> Straggling:
    late_s = baseline.iteration_time_s * factor
    # The straggler itself goes on with the fastest plan that is no slower than the highest clocks.
    own = fixed["Perseus"]

    def job_j(mine: Plan, others: Plan) -> float:
        return straggler.job_energy(
            baselines.until(mine, mine.iteration_time_s).energy_j * factor, others.energy_j, others.deadline_s, late_s,
            pipelines=pipelines, ranks=baseline.problem.dag.ranks, blocking_power_w=baseline.problem.blocking_power_w,
        )  # fmt: skip

    base_j = job_j(baseline, baseline)
    savings = {name: 1 - job_j(plan, plan) / base_j for name, plan in fixed.items() if name != "Perseus"}
    return Straggling(factor, best.iteration_time_s, {**savings, "Perseus": 1 - job_j(own, best) / base_j})


def frontier_table(rows: Sequence[Point]) -> Table:
    """The frontier, a row per plan."""
    made = table(
        ">deadline", ">slowdown", ">iteration time", ">energy", ">saving", ">at most", ">beside a straggler", title="frontier"
    )
    for row in rows:
        made.add_row(f"{row.deadline_s:.6g} s", f"{row.slowdown:+.2%}", f"{row.iteration_time_s:.6g} s", f"{row.energy_j:.6g} J",
                     f"{row.saving:.2%}", f"{row.bound_saving:.2%}", f"{row.waiting_saving:.2%}")  # fmt: skip
    return made


def side_by_side(made: Report) -> Table:
    """Savings within the same slowdowns, a row per way to choose clocks."""
    names = list(dict.fromkeys(row.name for row in made.beside))
    allowed = sorted({row.allowed for row in made.beside})
    shown = table("clocks", *(f">within {a:.0%}" for a in allowed), title="saving (slowdown) of one pipeline")
    cells = {(row.name, row.allowed): f"{row.saving:.2%} ({row.slowdown:+.2%})" for row in made.beside}
    for name in names:
        shown.add_row(name, *(cells.get((name, a), "-") for a in allowed))
    return shown


def straggler_table(made: Report) -> Table:
    """Savings of the whole job beside one straggler."""
    names = list(dict.fromkeys(name for row in made.straggling for name in row.savings))
    shown = table(">straggler", ">planned for", *(f">{name}" for name in names),
                  title=f"saving of a job of {made.pipelines} pipelines, one of which straggles")  # fmt: skip
    for row in made.straggling:
        shown.add_row(f"{row.factor:g}x", f"{row.deadline_s:.6g} s", *(f"{row.savings[name]:.2%}" for name in names))
    return shown


def draw(path: Path, made: Report, title: str) -> None:
    """The frontier as a picture, with its lower bound and the baselines."""
    from powerd import plot

    figure = plot.new_figure(7.5, 4.8)
    axes = figure.add_subplot()
    times = [row.deadline_s for row in made.points]
    axes.plot(times, [row.lower_bound_j for row in made.points], "--", color="0.6", linewidth=1, label="lower bound")
    axes.plot(times, [row.energy_j for row in made.points], "o-", markersize=3, color="tab:blue", label="Perseus")
    axes.plot(made.baseline_s, made.baseline_j, "s", color="black", label="highest clocks")
    marks = {"global power limit": "^", "per-stage power limit": "v", "EnvPipe": "D"}
    for name, mark in marks.items():
        rows = [row for row in made.beside if row.name == name]
        axes.plot([made.baseline_s * (1 + row.allowed) for row in rows], [row.energy_j for row in rows], mark, label=name)
    axes.set_xlabel("iteration time (s)")
    axes.set_ylabel("energy of one pipeline, until then (J)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    plot.save_figure(figure, path)
