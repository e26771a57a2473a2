"""How fast the cluster simulator runs: an hour, a crowded hour and a week, with a controller's call every 5 s.

House rules: as benchmarks.cases; CPU seconds of this process, making the requests not counted; lengths are drawn (log-normal,
means near 1,100 and 210 tokens), the engine is the shipped model of Llama-2-70B on H100; whoever controls costs nothing here.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import numpy as np

from benchmarks.report import Progress, Report
from powerd.sim import enginemodels
from powerd.sim.cluster import Cluster, ClusterConfig, Requests, Results
from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.fleet import FleetPlan, InstanceWant

PERIOD_S = 5.0
CLOCKS_MHZ = (1980, 1605)  # in turn, so that every plan changes a sixth of the fleet
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Run:
    """A fleet of TP8 instances that serves ``count`` requests in ``span_s``, with day and night where that is longer than one."""

    title: str
    count: int
    span_s: float
    instances: int
    real_time: str = ""
    total: str = ""


RUNS = (
    Run("1 hour, 19,366 requests, 12 instances", 19_366, 3600.0, 12, real_time=">= 500"),
    Run("1 hour, 200,000 requests, 60 instances", 200_000, 3600.0, 60, real_time=">= 500"),
    Run("1 week, 10,000,000 requests, 48 instances", 10_000_000, 7 * DAY_S, 48, total="< 600"),
)


def requests(run: Run, seed: int = 0) -> Requests:
    """Draw a trace."""
    random = np.random.default_rng(seed)
    at_s = np.sort(random.uniform(0.0, run.span_s, run.count))
    if run.span_s > DAY_S:  # twice as many by day as by night
        at_s = np.sort(at_s - 0.33 * DAY_S / (2 * np.pi) * np.sin(2 * np.pi * at_s / DAY_S))
    prompts = np.clip(random.lognormal(6.6, 0.9, run.count), 1, 8192).astype(np.int32)
    answers = np.clip(random.lognormal(5.1, 0.7, run.count), 1, 1500).astype(np.int32)
    return Requests.of(np.clip(at_s, 0.0, None), prompts, answers)


def simulate(run: Run, trace: Requests, progress: Progress = lambda share: None) -> tuple[Results, float]:
    """Run it; return what it did and the CPU seconds that it took."""
    begin = time.process_time()
    cluster = Cluster(enginemodels.load(), trace, config=ClusterConfig(park_after_s=1.0), gpus=8 * run.instances)
    routes = dict.fromkeys(NAMES, ("all",))
    cluster.apply(FleetPlan(tuple(InstanceWant(None, "all", 8, CLOCKS_MHZ[0]) for _ in range(run.instances)), routes))
    end_s, turn = cluster.end_s, 0
    while cluster.now_s < end_s:
        cluster.advance(min(cluster.now_s + PERIOD_S, end_s))
        turn += 1
        wants = tuple(
            InstanceWant(
                i.id, i.pool, i.tp, CLOCKS_MHZ[(turn // 6 + n % 6) % 2 if turn % 6 == n % 6 else i.clock_mhz != CLOCKS_MHZ[0]]
            )
            for n, i in enumerate(cluster.state().instances)
        )
        cluster.apply(FleetPlan(wants, routes))
        if turn % 100 == 0:
            progress(min(1.0, cluster.now_s / end_s))
    return cluster.results(), time.process_time() - begin


def cluster(report: Report, progress: Progress) -> None:
    """The cluster simulator: an hour, a crowded one and a week."""
    report.title = "simulating a fleet iteration by iteration, state read and plan applied every 5 s (modelled)"
    for number, run in enumerate(RUNS):
        trace = requests(run)
        seen, took_s = simulate(run, trace, lambda share, n=number: progress((n + share) / len(RUNS)))  # type: ignore[misc]
        report.add(f"{run.title}: CPU", took_s, "s", run.total)
        report.add(f"{run.title}: speed", run.span_s / took_s, "x real time", run.real_time)
        report.add(f"{run.title}: a request", 1e6 * took_s / run.count, "us")
        report.add(f"{run.title}: iterations", seen.counts["iterations"] / took_s / 1e6, "million/s")
        report.add(f"{run.title}: finished", 100 * seen.counts["finished"] / run.count, "%")
    progress(1.0)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    report.add("resident memory at its peak, traces included", peak_mb, "MB")
    report.notes.append(
        "One core; the controller itself is not measured here: plans only change clocks, of a sixth of the fleet each."
    )
