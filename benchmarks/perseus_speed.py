"""`python -m benchmarks.perseus_speed`: CPU seconds and energy beside lowtime 0.3.0, same problem, same run.

House rules: CPU seconds of the process that plans, rounding included, imports not; lowtime runs unmodified in the peers'
environment; its plans are taken with the times and energies that were measured for the clocks they name.

lowtime starts with every instruction at its slowest and takes one unit of time off at a time, so that its one plan for a deadline
costs the walk down to it, and its frontier costs the walk down to the shortest time. ``POWERD_BENCH_QUICK=1`` ends that walk
after a few steps and scales its time by the steps it would take, which is in lowtime's favour: early steps are the cheap ones.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Progress, Report, Table, run
from powerd_policies.perseus import dag, frontier, planner, profile, schedules
from powerd_policies.perseus.baselines import max_clock
from powerd_policies.perseus.problem import Option, Plan, Problem

PEERS = Path(__file__).parents[1] / ".venv-peers" / "bin" / "python"
PROGRAM = Path(__file__).with_name("lowtime_peer.py")
PROFILE = Path(__file__).parents[1] / "policies" / "profiles" / "stage_profile_gpt3-175b_a100_sxm.csv"
UNIT_S = 0.001
QUICK_ITERATIONS = 150
SAMPLE_EVERY = 50
PLAN_FASTER, FRONTIER_FASTER, POINTS = 500.0, 20.0, 50
BLOCKING_W = 75.0


def synthetic(stages: int, microbatches: int) -> Problem:
    """A100-like: 10 clocks from 1410 to 735 MHz, 30 and 60 ms, stages 8 % apart, the last one 12 % longer, 0.3 % noise."""
    random = np.random.default_rng(0)
    clocks = np.linspace(1410, 735, 10)
    share = clocks / 1410
    tables: dict[tuple[int, str], tuple[Option, ...]] = {}
    for stage in range(stages):
        size = 1 + random.uniform(-0.08, 0.08) + (0.12 if stage == stages - 1 else 0.0)
        for kind, seconds in (("forward", 0.03), ("backward", 0.06)):
            times = seconds * size * (0.2 + 0.8 / share) * (1 + 0.003 * random.standard_normal(10))
            joules = times * (85 + 300 * share**2.6) * (1 + 0.003 * random.standard_normal(10))
            rows = [profile.Row(stage, kind, int(f), float(t), float(e)) for f, t, e in zip(clocks, times, joules, strict=True)]
            tables[stage, kind] = profile.options(rows, BLOCKING_W)[stage, kind]
    return dag.problem(dag.build(schedules.order("1f1b", stages, microbatches)), tables, BLOCKING_W)


def measured(stages: int, microbatches: int) -> Problem:
    """The A100 profile with its 38 clocks, each of its eight stages taken by several ranks."""
    rows = [
        profile.Row(stage, row.instruction, row.mhz, row.time_s, row.energy_j)
        for stage in range(stages)
        for row in profile.read(PROFILE)
        if row.stage == stage * 8 // stages
    ]
    options = profile.options(rows, 83.64)
    return dag.problem(dag.build(schedules.order("1f1b", stages, microbatches)), options, 83.64)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, and what came of them."""
    begin = time.process_time()
    found = work()
    return time.process_time() - begin, found


def lowtime(problem: Problem, iterations: int) -> dict[str, Any]:
    """Run the peer; ``iterations`` 0: to the end. RuntimeError when it cannot run."""
    if not PEERS.exists():
        raise RuntimeError(f"{PEERS} is missing: run `make .venv-peers/.installed`")
    columns = problem.columns
    question = {
        "tables": [np.stack([t, e], 1).tolist() for t, e in zip(columns.times_s, columns.effective_j, strict=True)],
        "table": problem.table.tolist(),
        "edges": problem.dag.edges.tolist(),
        "unit_s": UNIT_S,
        "iterations": iterations,
        "sample_every": SAMPLE_EVERY,
    }
    told = subprocess.run(  # its progress goes to stderr, as ours does
        [str(PEERS), str(PROGRAM)], input=json.dumps(question), stdout=subprocess.PIPE, text=True, check=False
    )
    if told.returncode:
        raise RuntimeError(f"lowtime ended with {told.returncode}")
    return dict(json.loads(told.stdout.splitlines()[-1]))


def compare(problem: Problem, plans: list[list[int]]) -> list[tuple[float, float, float]]:
    """For each of lowtime's plans: its real iteration time, its energy, and that of our plan for the same time."""
    own = planner.Planner(problem)
    rows = []
    for choice in plans:
        theirs = Plan(problem, np.array(choice), 0.0, 0.0)
        theirs = Plan(problem, theirs.choice, theirs.iteration_time_s, 0.0)
        rows.append((theirs.iteration_time_s, theirs.energy_j, own.plan(theirs.iteration_time_s).energy_j))
    return rows


def measure(report: Report, progress: Progress) -> bool:
    """One plan and a whole frontier against lowtime, and larger pipelines alone; True when each promise is kept."""
    quick = os.environ.get("POWERD_BENCH_QUICK", "") not in ("", "0")
    report.title = "planning beside lowtime 0.3.0: CPU seconds and energy, 1F1B"
    problem = synthetic(8, 32)
    top = max_clock(problem)
    planner.plan(synthetic(2, 2), 1e3)  # imports and first calls of the solvers are not planning
    plan_s, _ = timed(lambda: planner.plan(problem, top.iteration_time_s))
    progress(0.02)
    frontier_s, _ = timed(lambda: frontier.frontier(problem, POINTS))
    progress(0.05)
    peer = lowtime(problem, QUICK_ITERATIONS if quick else 0)
    progress(0.7)
    slowest = max(problem.dag.ends(Plan(problem, problem.table * 0 + _slowest(problem), 0.0, 0.0).times_s))
    needed = (slowest - top.iteration_time_s) / UNIT_S
    peer_s = peer["cpu_s"] * max(1.0, needed / peer["iterations"]) if quick else peer["cpu_s"]
    compared = compare(problem, peer["plans"])
    progress(0.8)
    kept = True

    def promise(what: str, value: float, unit: str, holds: bool, promised: str) -> None:
        nonlocal kept
        kept = kept and holds
        report.add(what, value, unit, f"{promised}: {'kept' if holds else 'MISSED'}")

    report.add("lowtime 0.3.0, 8 stages x 32 microbatches, unit 1 ms" + (", scaled up" if quick else ""), peer_s, "CPU s")
    report.add("its iterations", float(peer["iterations"]), "")
    report.add("one plan at the baseline's time", plan_s, "CPU s")
    promise("lowtime / one plan", peer_s / plan_s, "times", peer_s >= PLAN_FASTER * plan_s, f">= {PLAN_FASTER:.0f}")
    report.add(f"a frontier of {POINTS} points", frontier_s, "CPU s")
    promise(
        "lowtime / frontier", peer_s / frontier_s, "times", peer_s >= FRONTIER_FASTER * frontier_s, f">= {FRONTIER_FASTER:.0f}"
    )
    excess = [100 * (ours / theirs - 1) for _, theirs, ours in compared]
    promise("our energy above lowtime's at its plans' real times, worst", max(excess), "%", max(excess) <= 1e-6, "<= 0")
    report.add("the same, mean", float(np.mean(excess)), "%")
    rows = []
    for name, make, limit_s in (
        ("8 x 128, 10 clocks", lambda: synthetic(8, 128), 1.0),
        ("16 x 256, 10 clocks", lambda: synthetic(16, 256), 8.0),
        ("16 x 256, A100 profile, 38 clocks", lambda: measured(16, 256), 8.0),
    ):
        large = make()
        spent_s, found = timed(partial(planner.plan, large, max_clock(large).iteration_time_s))
        holds = spent_s < limit_s
        kept = kept and holds
        above = 100 * (found.energy_j / found.lower_bound_j - 1)
        rows.append(
            (name, str(len(large.table)), f"{spent_s:.2f}", f"< {limit_s:.0f}: {'kept' if holds else 'MISSED'}", f"{above:.3f}")
        )
        progress(0.8 + 0.07 * len(rows))
    report.tables.append(Table(("one plan", "instructions", "CPU s", "promised", "above the bound %"), tuple(rows)))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    promise("peak memory of all of it", peak_mb, "MB", peak_mb < 1000, "< 1000")
    report.notes += [
        f"lowtime walked {'the first steps only (quick)' if quick else 'its whole frontier'};"
        f" {len(compared)} of its plans compared, with the times and energies measured for the clocks it names.",
        "Synthetic A100-like stages (benchmarks/perseus_speed.py, seed 0); the last row's stages are the measured ones.",
    ]
    progress(1.0)
    return kept


def _slowest(problem: Problem) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array([times.argmax() for times in problem.columns.times_s])[problem.table]


if __name__ == "__main__":
    sys.exit(run("perseus-speed", "python -m benchmarks.perseus_speed", measure))
