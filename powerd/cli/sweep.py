"""The verb sweep: a command at many SM clocks, its energy-time curve, and the clock that saves most.

House rules: one lease for all clocks; a row is written before the next clock; what was measured before is not measured again
unless asked.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from powerd.cli.context import DryRun, GpuOption, Job, JsonFlag, connect, note, simulated, split_gpus, tell_outcomes
from powerd.cli.output import console, emit_json
from powerd.cli.run import Command, check_command, run_command
from powerd.errors import EXIT_CONFLICT, EXIT_OK, EXIT_OVERRIDDEN, LeaseLostError, RequestError
from powerd.model import Verdict
from powerd.sweep import PROGRESS_ENV, Progress, Row, Sweep, load, once, parse_clocks, save, steady

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from powerd.api import NodeView
    from powerd.client import Client, Lease


def sweep(
    ctx: typer.Context,
    command: Command,
    clocks: Annotated[
        str | None,
        typer.Option("--clocks", metavar="LIST", help="1410:855:15, 1410,1200,900 or 'every 4' (the default, to half)."),
    ] = None,
    progress: Annotated[
        bool, typer.Option("--steady", help=f"Start the command once; it appends a line per iteration to ${PROGRESS_ENV}.")
    ] = False,
    seconds_per_clock: Annotated[
        float, typer.Option("--seconds-per-clock", min=0.1, help="With --steady: measure this long.")
    ] = 10.0,
    iterations: Annotated[
        int | None,
        typer.Option("--iterations", min=1, help="With --steady: this many iterations; else: runs per clock (default 1)."),
    ] = None,
    gpus: GpuOption = None,
    slowdowns: Annotated[str, typer.Option("--slowdowns", metavar="LIST", help="Allowed slowdowns in percent.")] = "0,5,10",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="CSV; a .json with uncertainty beside it.")
    ] = Path("sweep.csv"),
    plot: Annotated[
        list[Path] | None, typer.Option("--plot", metavar="FILE", help="Energy-time curve (.svg, .png); repeatable.")
    ] = None,
    stage: Annotated[int, typer.Option("--stage", min=0, help="Stage column of the CSV.")] = 0,
    instruction: Annotated[str, typer.Option("--instruction", help="Instruction column of the CSV.")] = "command",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the output file holds already.")] = False,
    job: Job = None,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure time and energy of a command at many SM clocks and name the clock that saves most."""
    from powerd import plot as plots

    allowed = _percentages(slowdowns)
    for path in plot or []:
        plots.check(path)
    if "," in instruction or "\n" in instruction:
        raise RequestError("--instruction is one word of a CSV", code="bad_value")
    check_command(command)
    client = connect(ctx)
    node = client.node()
    uuids = client.resolve(split_gpus(gpus))
    chosen = [c for c in node.gpus if c.gpu.uuid in uuids]
    common = set.intersection(*(set(c.sm_clocks_mhz) for c in chosen)) if chosen else set()
    table = parse_clocks(clocks, sorted(common))
    names = " + ".join(sorted({c.gpu.name for c in chosen}))
    plan = Sweep(tuple(command), uuids, stage, instruction, progress, node.simulated, names, node.driver_version)
    before = None if fresh else load(output)
    if before is not None and before.key != plan.key:
        raise RequestError(f"{output} holds a sweep of something else", hint="choose another file with -o, or --fresh")
    results = before or plan
    todo = [c for c in table if c not in {r.clock_mhz for r in results.rows}]
    if len(todo) < len(table):
        note(f"{len(table) - len(todo)} of {len(table)} clocks are in {output} already")
    if dry_run:
        what = f"{' '.join(command)!r} at {len(todo)} clocks ({', '.join(map(str, todo))} MHz)"
        print(f"would measure {what} on {len(uuids)} GPU(s){_label(node)}; nothing was changed")
        return
    code = EXIT_OK
    if todo:
        results, code = _measure(client, node, results, todo, output, command, progress, seconds_per_clock, iterations, job)
    _report(results, table, allowed, plot or [], node, as_json)
    note(f"wrote {output} and {output.with_suffix('.json')}")
    raise typer.Exit(code)


def _percentages(text: str) -> list[float]:
    try:
        values = [float(part.strip().removesuffix("%")) / 100 for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values or not all(0 <= v < 10 for v in values):
        raise RequestError(f"{text!r} are no slowdowns", hint="write percentages such as 0,5,10", code="bad_value")
    return values


def _label(node: NodeView) -> str:
    return f" ({simulated(node)})" if node.simulated else ""


def _measure(
    client: Client, node: NodeView, results: Sweep, todo: list[int], output: Path, command: list[str], in_steps: bool,
    seconds: float, iterations: int | None, job: str | None,
) -> tuple[Sweep, int]:  # fmt: skip
    code = EXIT_OK
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(
            client.lease(list(results.gpus), sm_clock_mhz=todo[0], reason=f"sweep of {command[0]}", job=job, min_dwell_s=0.0)
        )
        tell_outcomes(node, lease.view, load_follows=True)
        if lease.refused:
            return results, EXIT_CONFLICT
        step: Callable[[int], Row | None]
        if in_steps:
            step = stack.enter_context(_steadily(client, lease, command, seconds, iterations, node.time_scale or 1.0))
        else:

            def step(clock: int) -> Row | None:
                return once(client, lease, clock, lambda: run_command(command), iterations or 1)

        bar = stack.enter_context(_bar())
        task = bar.add_task(f"sweep{_label(node)}", total=len(todo))
        for clock in todo:
            bar.update(task, description=f"{clock} MHz{_label(node)}")
            try:
                row = step(clock)
            except LeaseLostError as error:
                note(f"the lease was lost at {clock} MHz: {error.message}; run it again to go on")
                return results, EXIT_CONFLICT
            if row is None:
                note(f"the command ended before {clock} MHz was measured; run it again to go on")
                return results, code or 1
            if row.exit_code:
                note(f"the command failed at {clock} MHz with exit code {row.exit_code}; run it again to go on")
                return results, row.exit_code
            if row.verdict in (Verdict.OVERRIDDEN, Verdict.FAILED):
                code = EXIT_OVERRIDDEN
                note(f"{clock} MHz was not in effect ({row.verdict}): see `powerctl explain`")
            results = results.with_row(row)
            save(results, output)
            bar.advance(task)
    return results, code


@contextlib.contextmanager
def _steadily(
    client: Client, lease: Lease, command: list[str], seconds: float, iterations: int | None, scale: float
) -> Iterator[Callable[[int], Row | None]]:
    folder = Path(tempfile.mkdtemp(prefix="powerd-sweep-"))
    fifo = Progress(folder / "progress")
    try:
        child = subprocess.Popen(command, env={**os.environ, PROGRESS_ENV: str(fifo.path)})
    except OSError as error:
        fifo.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise RequestError(f"cannot run {command[0]}: {error.strerror}") from error
    try:

        def step(clock: int) -> Row | None:
            return steady(
                client, lease, clock, fifo, lambda: child.poll() is None, seconds=seconds, iterations=iterations, scale=scale
            )

        yield step
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
        child.wait()
        fifo.close()
        shutil.rmtree(folder, ignore_errors=True)


def _bar() -> Bar:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console(stderr=True)
    )


def _report(
    results: Sweep, table: tuple[int, ...], allowed: list[float], plot: list[Path], node: NodeView, as_json: bool
) -> None:
    from powerd.cli.choices import choice_line, choices_of, curve_table, front_of, points_of
    from powerd.plot import energy_time

    rows = [r for r in results.rows if r.clock_mhz in table]
    points = points_of(rows)
    choices = choices_of(points, allowed)
    if as_json:
        emit_json({"sweep": results, "choices": choices, "pareto": front_of(points)})
    else:
        title = f"{' '.join(results.command)} on {len(results.gpus)} x {results.gpu_name}{_label(node)}"
        console().print(curve_table(rows, choices, title))
        for choice in choices:
            print(choice_line(choice) + _label(node))
    if plot and points:
        xy = {p: (p.clock_mhz, p.time_s, p.energy_j) for p in points}
        by_clock = {r.clock_mhz: r for r in rows}
        bounds = [(by_clock[p.clock_mhz].low_j or p.energy_j, by_clock[p.clock_mhz].high_j or p.energy_j) for p in points]
        energy_time(
            plot, list(xy.values()), title=f"{' '.join(results.command)[:60]}, {results.gpu_name}", simulated=results.simulated,
            front=[xy[p] for p in front_of(points)], errors=bounds,
            choices={f"{c.slowdown_allowed:.0%}": xy[c.point] for c in choices},
        )  # fmt: skip
        note(f"wrote {', '.join(map(str, plot))}")
