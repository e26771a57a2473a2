"""The verbs of perseus: plan a pipeline's clocks, show a plan, report the frontier. None of them needs a daemon.

House rules: planning is powerd_policies', words and pictures are ours; a plan is on disk before anything is said about it; every
number that is printed is in the file, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from powerd.cli.context import JsonFlag, note, write_text
from powerd.cli.output import console, table
from powerd.errors import RequestError

if TYPE_CHECKING:
    from powerd_policies.perseus.document import JobFile
    from powerd_policies.perseus.problem import Problem
    from powerd_policies.perseus.profile import Row
    from powerd_policies.perseus.solve import Solved

perseus_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Plan the clocks of pipeline-parallel training.")

JobPath = Annotated[Path, typer.Argument(metavar="JOB.json", help="The pipeline, its profile and blocking power.")]


def solver_or_hint() -> None:
    """RequestError unless the libraries of powerd[plan] are installed."""
    try:
        import numpy  # noqa: F401
        import scipy  # noqa: F401
    except ImportError:
        raise RequestError("planning needs numpy and scipy", hint="pip install 'powerd[plan]'", code="bad_value") from None


def open_job(path: Path) -> tuple[JobFile, tuple[Row, ...], Problem]:
    """JOB.json with its profile and what is to be planned; RequestError naming file and row."""
    from powerd_policies.perseus import document

    job, rows = document.load(path)
    return job, rows, job.problem(rows)


@perseus_app.command("plan", no_args_is_help=True)
def plan(
    job_path: JobPath,
    deadline: Annotated[
        str,
        typer.Option("--deadline", metavar="TIME", help="1.05x (of every GPU at its highest clock), seconds, or fastest."),
    ] = "1.0x",
    frontier: Annotated[
        int, typer.Option("--frontier", metavar="N", min=0, help="Also plan for N deadlines, fastest to least energy.")
    ] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="OUT.json", help="Where the plan goes.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say which rows of the profile were filtered.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Choose the clock of every computation so that an iteration takes least energy within a deadline."""
    solver_or_hint()
    from powerd.cli import frontiers
    from powerd_policies.perseus import profile, solve
    from powerd_policies.perseus.quiet import stdout_to_stderr

    job, rows, problem = open_job(job_path)
    said = profile.notes(rows, job.blocking_power_w)
    kept = sum(len(options) for options in problem.tables)
    with stdout_to_stderr():
        solved = solve.solve_problem(job, problem, deadline)
    made = solved.to_json()
    if frontier:
        with stdout_to_stderr():
            points = frontiers.points(frontiers.compute(problem, frontier), solved.baseline, job)
        made["frontier"] = [point.to_json() for point in points]
    if output is not None:
        write_text(output, json.dumps(made, indent=1) + "\n")
    if as_json:
        print(json.dumps(made, indent=2))
    else:
        console().print(_summary(solved, made))
        if frontier:
            console().print(frontiers.frontier_table(points))
    if verbose:
        for line in said:
            note(line)
    elif kept < len(rows):
        note(f"{kept} of {len(rows)} profile rows are of use, others are worse in time and energy (--verbose names them)")
    if output is not None:
        note(f"wrote {output}")


def _summary(solved: Solved, made: dict[str, Any]) -> Any:
    base, gpus, ranks = made["baseline"], solved.job.gpus_per_stage, solved.plan.problem.dag.ranks
    title = f"{len(made['clocks'])} computations on {ranks} pipeline ranks" + (f" x {gpus} GPUs" if gpus > 1 else "")
    shown = table("", ">iteration time", ">energy", ">saving", title=title)
    shown.add_row("highest clocks", f"{base['iteration_time_s']:.6g} s", f"{base['energy_j']:.6g} J", "")
    shown.add_row("plan", f"{made['iteration_time_s']:.6g} s ({made['iteration_time_s'] / base['iteration_time_s'] - 1:+.2%})",
                  f"{made['energy_j']:.6g} J", f"{1 - made['energy_j'] / base['energy_j']:.2%}")  # fmt: skip
    if held := made.get("switching"):
        shown.add_row("with clock changes", f"{held['iteration_time_s']:.6g} s "
                      f"({held['iteration_time_s'] / base['iteration_time_s'] - 1:+.2%})", f"{held['energy_j']:.6g} J",
                      f"{1 - held['energy_j'] / base['energy_j']:.2%}")  # fmt: skip
    shown.add_row("lower bound", f"{made['deadline_s']:.6g} s", f"{made['lower_bound_j']:.6g} J",
                  f"{1 - made['lower_bound_j'] / base['energy_j']:.2%}")  # fmt: skip
    return shown


@perseus_app.command("show", no_args_is_help=True)
def show(
    out_path: Annotated[Path, typer.Argument(metavar="OUT.json", help="A plan that `plan` wrote.")],
    picture: Annotated[
        list[Path] | None, typer.Option("--output", "-o", metavar="FILE", help="A picture (.svg, .png); repeatable.")
    ] = None,
    width: Annotated[int | None, typer.Option("--width", min=40, help="Columns of the timeline in the terminal.")] = None,
) -> None:
    """Draw a plan as a timeline coloured by clock, before and after."""
    solver_or_hint()
    from powerd import plot
    from powerd.cli import timeline
    from powerd_policies.perseus import document

    for path in picture or []:
        plot.check(path)
    halves = timeline.of_plan(document.read_json(out_path), str(out_path))
    if picture:
        for path in picture:
            timeline.draw(path, halves, out_path.name)
        note(f"wrote {', '.join(map(str, picture))}")
        return
    screen = console()
    for line in timeline.text(halves, width or min(screen.width, 160)):
        screen.print(line, soft_wrap=True)
    print("F forward, B backward, I backward of inputs, W backward of weights, R recompute, · waiting")


@perseus_app.command("report", no_args_is_help=True)
def report(
    job_path: JobPath,
    points: Annotated[int, typer.Option("--frontier", metavar="N", min=2, help="Deadlines from fastest to least energy.")] = 20,
    stragglers: Annotated[
        str, typer.Option("--stragglers", metavar="LIST", help="Slowdowns of one straggling pipeline.")
    ] = "1.05,1.1,1.2,1.3",
    pipelines: Annotated[int, typer.Option("--pipelines", min=1, help="Data-parallel pipelines of the whole job.")] = 16,
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="FILE", help="Keep the frontier here, and take it from here.")
    ] = None,
    picture: Annotated[
        list[Path] | None, typer.Option("--output", "-o", metavar="FILE", help="The frontier (.svg, .png); repeatable.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Plot and tabulate the frontier of time and energy, beside power limits and EnvPipe, alone and with a straggler."""
    solver_or_hint()
    from powerd import plot
    from powerd.cli import frontiers
    from powerd_policies.perseus import baselines
    from powerd_policies.perseus.quiet import stdout_to_stderr

    for path in picture or []:
        plot.check(path)
    factors = _factors(stragglers)
    job, _, problem = open_job(job_path)
    baseline = baselines.max_clock(problem)
    with stdout_to_stderr():
        front = frontiers.compute(problem, points, cache)
        made = frontiers.report(problem, front, baseline, job, factors, pipelines)
    if as_json:
        print(json.dumps(made.to_json(), indent=2))
    else:
        screen = console()
        screen.print(frontiers.frontier_table(made.points))
        screen.print(frontiers.side_by_side(made))
        screen.print(frontiers.straggler_table(made))
    if picture:
        for path in picture:
            frontiers.draw(path, made, job_path.name)
        note(f"wrote {', '.join(map(str, picture))}")


def _factors(text: str) -> list[float]:
    try:
        factors = [float(part.strip().removesuffix("x")) for part in text.split(",") if part.strip()]
    except ValueError:
        factors = []
    if not factors or not all(1 <= factor < 100 for factor in factors):
        raise RequestError(f"{text!r} are no slowdowns of a straggler", hint="write 1.05,1.2", code="bad_value")
    return factors
