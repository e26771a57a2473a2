"""`python -m benchmarks.perseus_replay`: the replay model against measured plan runs, half of them held out.

House rules: a model never sees the runs it is judged on; every split is made by rule or seed, so that figures repeat; the worst
run stands beside its cause.
"""

from __future__ import annotations

import csv
import gzip
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from powerd_policies.perseus import dag, schedules
from powerd_policies.perseus.problem import Floats
from powerd_policies.perseus.replay import Job, Model, Run, Runs

DATA = Path(__file__).with_name("data") / "perseus"
#: GPU -> its highest clock (MHz), the measured power of a rank that waits (W) and its power limit (W).
GPUS = {"A100-PCIe-80G": (1410.0, 83.64, 300.0), "A40-48G": (1740.0, 70.38, 300.0)}
TIME_BOUND, ENERGY_BOUND = 0.01, 0.02  # of the mean held-out error
RANDOM_SPLITS = 20


@cache
def load() -> dict[str, Runs]:
    """"model on GPU" -> its measured runs."""
    times: dict[tuple[str, str, str], dict[tuple[int, str], tuple[float, float, float]]] = {}
    for row in _rows("instructions.csv.gz"):
        stage = (int(row["rank"]), row["phase"])
        values = (float(row["mean_s"]), float(row["setting_mean"]), float(row["setting_max"]))
        times.setdefault((row["gpu"], row["model"], row["plan"]), {})[stage] = values
    totals: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in _rows("iterations.csv.gz"):
        totals.setdefault((row["gpu"], row["model"], row["plan"]), []).append(row)
    found: dict[str, list[Run]] = {}
    jobs: dict[str, Job] = {}
    for (gpu, model, plan), ranks in totals.items():
        name = f"{model} on {len(ranks)}x {gpu}"
        of = times[gpu, model, plan]
        if name not in jobs:
            graph = dag.build(schedules.order("1f1b", len(ranks), int(ranks[0]["num_microbatches"])))
            jobs[name] = Job(graph, *GPUS[gpu])
        seconds = {key: value[0] for key, value in of.items()}
        clocks = {key: value[1] for key, value in of.items()}
        time_s = max(float(row["iter_time_s"]) for row in ranks)
        energy_j = sum(float(row["iter_energy_J"]) for row in ranks)
        found.setdefault(name, []).append(Run(int(plan), seconds, clocks, time_s, energy_j))
    return {name: Runs(jobs[name], tuple(sorted(runs, key=lambda r: r.plan))) for name, runs in found.items()}


def _rows(name: str) -> list[dict[str, str]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class Judged:
    """One job, fitted on one half of its plans, judged on the other."""

    job: str
    model: Model
    plans: tuple[int, ...]  # the held-out ones
    time: Floats  # their relative errors
    energy: Floats


def judge(name: str, runs: Runs, fitted: Sequence[int]) -> Judged:
    """Fit on these positions, judge on all others."""
    held = [n for n in range(len(runs.runs)) if n not in set(fitted)]
    model = runs.fit(fitted)
    time, energy = runs.judge(model)
    return Judged(name, model, tuple(runs.runs[n].plan for n in held), time[held], energy[held])


def alternate(name: str, runs: Runs, first: int = 0) -> Judged:
    """Every second plan fits, the ones between are held out."""
    return judge(name, runs, range(first, len(runs.runs), 2))


def at_random(name: str, runs: Runs, seed: int) -> Judged:
    """A random half fits."""
    count = len(runs.runs)
    return judge(name, runs, sorted(random.Random(seed).sample(range(count), (count + 1) // 2)))  # noqa: S311 repeatable


if __name__ == "__main__":
    for name, runs in load().items():
        for j in [alternate(name, runs), alternate(name, runs, 1)]:
            t, e = abs(j.time), abs(j.energy)
            print(name, len(runs.runs), len(j.plans), f"{t.mean():.4f} {t.max():.4f} {j.plans[int(t.argmax())]} {e.mean():.4f} {e.max():.4f} {j.plans[int(e.argmax())]}", j.model)
        r = [at_random(name, runs, s) for s in range(RANDOM_SPLITS)]
        print("  random: time mean of mean %.4f worst mean %.4f worst %.4f energy %.4f %.4f %.4f" % tuple(f(x) for k in ("time","energy") for x,f in [([abs(getattr(j,k)).mean() for j in r],np.mean),([abs(getattr(j,k)).mean() for j in r],max),([abs(getattr(j,k)).max() for j in r],max)]))
