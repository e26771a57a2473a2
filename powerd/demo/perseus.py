"""The training part of the demonstration: two pipelines of four stages profile themselves, save energy, and follow a straggler.

House rules: time is stepped unless told otherwise (eight ranks and a daemon on a few busy cores fall behind a scaled clock, and
the figures would be the machine's); predicted and measured figures stand side by side; every number says simulated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from powerd.cli.output import console, table
from powerd.demo.children import DemoError
from powerd.demo.stage import stage
from powerd.demo.training import Energy, Measured, Shape, Step, Training, start

SHAPE = Shape(microbatches=8)
#: Every fourth clock (60 MHz apart) where the published profile was measured: each costs two iterations, one to settle.
OPTIONS: dict[str, Any] = {
    "cache": None, "iterations_per_clock": 1, "clock_stride": 4, "lowest_clock_mhz": 855, "job": "demo", "plan_locally": True,
}  # fmt: skip
CLOCKS = 10  # that this makes
BASELINE = 5
MEASURED = 4
THROTTLED_STAGE = 2
FAULT = "sw-thermal"


@dataclass(frozen=True, slots=True)
class Saving:
    """A share of energy, with 95 % bounds."""

    saving: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.saving:.1%} (95 % bounds {self.low:.1%} to {self.high:.1%})"


def saving(was: Energy, now: Energy) -> Saving:
    """What ``now`` saves of ``was``; the bounds are cautious: what sensors misread in both alike would cancel."""
    return Saving(1 - now.energy_j / was.energy_j, 1 - now.high_j / was.low_j, 1 - now.low_j / was.high_j)


def train(out: Path, time_mode: str = "stepped", shape: Shape = SHAPE) -> dict[str, Any]:
    """Run it, print it, draw it; the figures as plain data. DemoError when a step does not show what it should."""
    stages = ", ".join(map(str, shape.stages))
    print(f"\nTraining: GPT-3 175B, {shape.pipelines} pipelines of {len(shape.stages)} stages (profile stages {stages}),"
          f" 1F1B, {shape.microbatches} microbatches;\na process per GPU, the driver's delays as measured,"
          " durations the published rows x 10. All numbers below are simulated.")  # fmt: skip
    began_s = time.monotonic()
    with stage(shape.world, time_mode, latency=1.0, fit_on=None) as here:
        run = start(here, shape, OPTIONS, BASELINE)
        with _Bar() as bar:
            found = _campaign(run, bar)
        run.stop()
        simulated_s = (run.steps[-1].end_ns - run.steps[0].begin_ns) / 1e9
    real_s = time.monotonic() - began_s
    kind = "Stepped time" if time_mode == "stepped" else f"Scaled time ({time_mode})"
    print(f"{kind}: {simulated_s:.0f} simulated seconds of training in {real_s:.0f} s, starting powerd included:"
          f" factor {simulated_s / real_s:.0f}.")  # fmt: skip
    return _tell(out, run, found, time_mode)


@dataclass(frozen=True, slots=True)
class Found:
    """What the campaign measured."""

    before: Measured
    planned: Step
    after: Measured
    waiting: Measured  # pipeline 2 is slow, pipeline 1 still in a hurry
    followed: Step
    following: Measured
    back: Step


def _campaign(run: Training, bar: _Bar) -> Found:
    """Full clocks, sweep, plan; then one GPU of pipeline 2 is throttled and let go again."""
    shape, node = run.shape, run.here.node
    run.each = bar.step
    bar.begin("at full clocks, without powerd", BASELINE)
    run.advance()
    before = run.measured(MEASURED - 1, "before")
    bar.begin("sweeping SM clocks during training", 2 * CLOCKS + 4)
    planned = run.until(lambda step: None not in step.plans, 4 * CLOCKS, "no plan was made")
    bar.begin("by the plan", MEASURED + 2)
    run.advance()
    after = run.measured(MEASURED, "after")
    slow = shape.gpus(1)[THROTTLED_STAGE]
    bar.begin(f"GPU {slow} is throttled", MEASURED + 8)
    node.fault(FAULT, slow)
    waiting = run.measured(2, "throttled")
    followed = run.until(lambda step: step.plans[0] != planned.plans[0], 16, "pipeline 1 does not follow")
    run.advance()
    following = run.measured(MEASURED, "following")
    bar.begin(f"GPU {slow} is well again", 6)
    node.clear_faults(slow)
    back = run.until(lambda step: step.plans == planned.plans, 20, "the plans did not come back")
    run.advance()
    return Found(before, planned, after, waiting, followed, following, back)


class _Bar:
    """One progress bar per phase; steps are counted as they end."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:45}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console(stderr=True))
        self._task: Any = None

    def begin(self, what: str, steps: int) -> None:
        """The next phase, of about so many steps."""
        self._finish()
        self._task = self._progress.add_task(f"{what} (simulated)", total=steps, said="")

    def step(self, step: Step) -> None:
        """One more."""
        seconds, state = (step.end_ns - step.begin_ns) / 1e9, step.state or "alone"
        self._progress.update(self._task, advance=1, said=f"iteration {step.number}: {seconds:.2f} s, {state}")

    def _finish(self) -> None:
        if self._task is not None:
            done = self._progress.tasks[-1].completed
            self._progress.update(self._task, total=done or 1, completed=done or 1)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._finish()
        self._progress.stop()


def _tell(out: Path, run: Training, found: Found, time_mode: str) -> dict[str, Any]:
    shape = run.shape
    told, late = (run.plans[str(step.plans[0])] for step in (found.planned, found.followed))
    plan, slower = told["planned"], late["planned"]
    profile_rows = told["profile"].strip().splitlines()[1:]
    clocks = sorted({int(row.split(",")[2]) for row in profile_rows}, reverse=True)
    print(f"\nMeasured online: {len(profile_rows)} rows, {len(clocks)} SM clocks from {clocks[0]} to {clocks[-1]} MHz;"
          f" a blocked GPU draws {told['blocking_power_w']:.1f} W (simulated)\n")  # fmt: skip
    promised = 1 - plan["energy_j"] / plan["baseline_j"]
    saved = saving(found.before.total, found.after.total)
    rows = table("", ">iteration", ">energy of all GPUs", ">95 % bounds", ">mean power", title="One iteration (simulated)")
    for name, measured in (("before: full clocks, measured", found.before), ("by the plan, measured", found.after)):
        rows.add_row(name, *_cells(measured, shape.world))
    rows.add_row("by the plan, predicted", f"{plan['iteration_s']:.4f} s", f"{plan['energy_j'] * shape.pipelines:.0f} J", "", "")
    console().print(rows)
    print(f"\nsaving: {saved}, predicted {promised:.1%}; iteration time {found.after.time_s / found.before.time_s - 1:+.2%}"
          " (simulated)")  # fmt: skip

    slow = shape.gpus(1)[THROTTLED_STAGE]
    first = [m.of(shape.gpus(0)) for m in (found.waiting, found.following)]
    followed = saving(first[0], first[1])
    # Waiting for the straggler is in the plan's energy, and must be in what it is compared with.
    haste_j = plan["energy_j"] + told["blocking_power_w"] * len(shape.stages) * (slower["deadline_s"] - plan["deadline_s"])
    predicted = 1 - slower["energy_j"] / haste_j
    back, beside = found.back.number - found.followed.number - MEASURED - 2, run.steps[found.followed.number + 1]
    print(f"\nGPU {slow} of pipeline 2 is throttled ({FAULT}): its iterations take {found.waiting.time_s:.2f} s"
          f" instead of {found.after.time_s:.2f} s, and pipeline 1 waits for it (simulated).\n"
          f"Pipeline 1 follows with its plan for T' = {slower['deadline_s']:.2f} s: {first[0].energy_j:.0f} J ->"
          f" {first[1].energy_j:.0f} J per iteration,\nsaving {followed}, predicted {predicted:.1%}; nobody is delayed:"
          f" {found.following.time_s:.2f} s (simulated).\nThe GPU is well again: both pipelines are back at"
          f" {plan['iteration_s']:.2f} s after {back} iterations (simulated).")  # fmt: skip
    _draw(out, run, found, told)
    return {
        "time": time_mode, "stages": shape.stages, "pipelines": shape.pipelines, "microbatches": shape.microbatches,
        "clocks_mhz": clocks, "blocking_power_w": told["blocking_power_w"], "plan": plan, "straggler_plan": slower,
        "before": _plain(found.before), "after": _plain(found.after), "waiting": _plain(found.waiting),
        "following": _plain(found.following), "saving": _bounds(saved), "saving_predicted": promised,
        "true_saving": 1 - found.after.true_j / found.before.true_j,
        "straggler": {"gpu": slow, "fault": FAULT, "saving": _bounds(followed), "saving_predicted": predicted,
                      "worked_s": beside.worked_s, "back": found.back.plans == found.planned.plans},
    }  # fmt: skip


def _cells(measured: Measured, gpus: int) -> Sequence[str]:
    total = measured.total
    watts = total.energy_j / measured.time_s / gpus
    bounds = f"{total.low_j:.0f} to {total.high_j:.0f} J"
    return (f"{measured.time_s:.4f} s", f"{total.energy_j:.0f} J", bounds, f"{watts:.0f} W per GPU")


def _plain(measured: Measured) -> dict[str, Any]:
    total = measured.total
    return {
        "iterations": measured.steps, "time_s": measured.time_s, "energy_j": total.energy_j, "low_j": total.low_j,
        "high_j": total.high_j, "true_j": measured.true_j,
    }  # fmt: skip


def _bounds(value: Saving) -> dict[str, float]:
    return {"saving": value.saving, "low": value.low, "high": value.high}


def _draw(out: Path, run: Training, found: Found, told: dict[str, Any]) -> None:
    """Pipeline 1 as it ran: at full clocks, by the plan, and beside a straggler."""
    from powerd.cli import timeline

    if told["document"] is None:
        raise DemoError("the plan is not made from the profile as it was measured")
    (out / "plan.json").write_text(json.dumps(told["document"], indent=1) + "\n", encoding="utf-8")
    top = max(clock for rank in told["planned"]["clocks"] for clock in rank)
    halves = [
        _half(run, told["order"], 1, "at full clocks", [[top] * len(rank) for rank in told["order"]]),
        _half(run, told["order"], found.planned.number + 1, "by the plan", told["planned"]["clocks"]),
        _half(run, told["order"], found.followed.number + 1, "beside a straggler",
              run.plans[str(found.followed.plans[0])]["planned"]["clocks"]),
    ]  # fmt: skip
    for kind in ("svg", "png"):
        timeline.draw(out / f"timeline.{kind}", halves, "GPT-3 175B, pipeline 1 of 2, as it ran (simulated)")
    screen = console()
    print()
    for line in timeline.text(halves, min(screen.width, 132)):
        screen.print(line, soft_wrap=True)
    print("F forward, B backward, · waiting; colour and MHz: the SM clock (simulated)")


def _half(run: Training, order: list[Any], number: int, what: str, clocks: list[list[int]]) -> Any:
    from powerd.cli.timeline import LETTERS, Bar, Timeline

    step = run.steps[number]
    joules = sum(step.true_j[gpu] for gpu in run.shape.gpus(0))
    seconds = (step.end_ns - step.begin_ns) / 1e9
    bars = [
        Bar(rank, begin_s, end_s - begin_s, LETTERS[kind], microbatch, mhz)
        for rank, (keys, times, own) in enumerate(zip(order, step.ran_s, clocks, strict=False))
        for (_, kind, microbatch), (begin_s, end_s), mhz in zip(keys, times, own, strict=True)
    ]
    return Timeline(f"{what}: {seconds:.4g} s, {joules:.0f} J", tuple(bars), len(run.shape.stages), seconds)
