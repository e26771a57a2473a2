"""Several policies over one workload, each in a process of its own when there are several: entries of report.json and series.

House rules: workers are forked after the workload exists, so that it is never copied; what a policy needs that is not the fleet's
state (forecasts, parking) is given here and nowhere else; results come back in the order in which policies were asked for.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from powerd.sim.replay import policies, report
from powerd.sim.replay.policies import Known
from powerd.sim.replay.runner import Outcome, Setting, replay
from powerd.sim.replay.scenario import Scenario
from powerd.sim.replay.workload import Workload

Progress = Callable[[float, float], None]  # seconds done of all policies, of how many
Series = tuple[list[float], list[float]]
MOST_POINTS = 1500


@dataclass(frozen=True, slots=True)
class Summary:
    """One policy's entry in report.json and what its pictures are made of."""

    policy: str
    entry: dict[str, Any]
    series: dict[str, Series]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Everything that policies are run with."""

    scenario: Scenario
    workload: Workload
    setting: Setting
    known: Known


_shared: tuple[Comparison, Any] | None = None  # a forked worker's own copy, set by its initializer


def compare(names: Sequence[str], comparison: Comparison, jobs: int = 1, progress: Progress | None = None) -> list[Summary]:
    """Run every policy; ``jobs`` processes at most."""
    told, length_s = progress or (lambda done, total: None), comparison.workload.length_s
    if jobs <= 1 or len(names) == 1:
        return [
            one(name, comparison, lambda at_s, n=n: told(n * length_s + at_s, len(names) * length_s))  # type: ignore[misc]
            for n, name in enumerate(names)
        ]
    context = multiprocessing.get_context("fork")
    done_s = context.Array("d", len(names))
    with ProcessPoolExecutor(min(jobs, len(names)), context, _begin, (comparison, done_s)) as pool:
        futures = [pool.submit(_work, name, n) for n, name in enumerate(names)]
        pending = set(futures)
        while pending:
            pending = wait(pending, timeout=0.2).not_done
            told(float(sum(done_s[:])), len(names) * length_s)
        return [future.result() for future in futures]


def _begin(comparison: Comparison, done_s: Any) -> None:
    global _shared
    _shared = (comparison, done_s)


def _work(name: str, number: int) -> Summary:
    assert _shared is not None
    comparison, done_s = _shared

    def watch(at_s: float) -> None:
        done_s[number] = at_s

    return one(name, comparison, watch)


def one(name: str, comparison: Comparison, watch: Callable[[float], None] = lambda at_s: None) -> Summary:
    """Run one policy."""
    setting = comparison.setting
    built = policies.build(name, comparison.scenario, comparison.workload, setting, comparison.known)
    outcome = replay(built.controller, comparison.workload, setting, watch, built.config)
    entry = report.of_policy(outcome, comparison.workload, setting, comparison.scenario.prices)
    if built.fleet is not None:
        entry["fleet"] = built.fleet
    if sides := outcome.timeline.sides():
        entry["sides"] = sides
    return Summary(name, entry, _series(outcome, setting))


def _series(outcome: Outcome, setting: Setting) -> dict[str, Series]:
    power_w, line = np.asarray(outcome.results.power_w), outcome.timeline
    step = max(1, len(power_w) // MOST_POINTS)
    blocks = power_w[: len(power_w) // step * step].reshape(-1, step).mean(axis=1)
    times = [(n + 0.5) * step * setting.config.tick_s for n in range(len(blocks))]
    thin = slice(None, None, max(1, len(line.time_s) // MOST_POINTS))
    gpus = [float(sum(tp * count for tp, count in row.items())) for row in line.instances]
    made: dict[str, Series] = {
        "power_kw": (times, (blocks / 1000).tolist()),
        "gpus": (line.time_s[thin], gpus[thin]),
        "clock_mhz": (line.time_s[thin], line.clock_mhz[thin]),
    }
    for tp in sorted({tp for row in line.instances for tp in row}):
        made[f"tp{tp}"] = (line.time_s[thin], [float(row.get(tp, 0)) for row in line.instances[thin]])
    return made
