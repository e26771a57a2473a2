"""How fast the simulator replays and controllers decide.

House rules: one core; the best of three for what is repeated; a decision's time is that of the call, on load that keeps it busy.
"""

from __future__ import annotations

import time
from dataclasses import replace

from benchmarks.dynamollm.study import BASE, FULL
from benchmarks.dynamollm.traces import Case, full_load, prepared, without
from benchmarks.report import Progress, Report, percentile
from powerd.sim.replay import policies, runner
from powerd.sim.replay.compare import Comparison
from powerd.sim.replay.scenario import Scenario
from powerd_policies.dynamollm.fleet import FleetController, FleetPlan, FleetState, InstanceLoad
from powerd_policies.dynamollm.instance import InstanceController


class Timed:
    """A controller whose decisions are timed."""

    def __init__(self, inner: FleetController) -> None:
        self.inner, self.name, self.period_s = inner, inner.name, inner.period_s
        self.took_s: list[float] = []

    def decide(self, state: FleetState) -> FleetPlan:
        """Decide and note how long that took."""
        begin = time.perf_counter()
        plan = self.inner.decide(state)
        self.took_s.append(time.perf_counter() - begin)
        return plan


def run(name: str, comparison: Comparison) -> tuple[float, list[float]]:
    """Replay a policy; seconds of it all, and of each decision."""
    built = policies.build(name, comparison.scenario, comparison.workload, comparison.setting, comparison.known)
    timed = Timed(built.controller)
    begin = time.perf_counter()
    runner.replay(timed, comparison.workload, comparison.setting, config=built.config)
    return time.perf_counter() - begin, timed.took_s


def measure(report: Report, hour: Case, week: Case | None, scenario: Scenario, progress: Progress) -> bool:
    """Time everything; whether the promises are kept."""
    full = prepared(hour, full_load(hour, scenario), scenario)
    best_s = min(run(BASE, full)[0] for _ in range(3))
    times = full.workload.length_s / best_s
    report.add(f"the hour at load 1.0 on 12 instances, {len(full.workload.requests)} requests", times, "x real time", ">= 500")
    took_s, _ = run(FULL, full)
    report.add("the hour with DynamoLLM's control", full.workload.length_s / took_s, "x real time")
    kept = times >= 500
    progress(0.2)
    large = without(scenario, "cluster", nodes=125)
    busy = prepared(replace(hour, trace=hour.trace.between(0, 900)), full_load(hour, scenario) * 125 / 12, large)
    _, decisions_s = run(FULL, busy)
    report.add("a whole decision at 1,000 GPUs, slowest of fifteen minutes", max(decisions_s), "s", "< 1")
    report.add("a whole decision at 1,000 GPUs, p50", 1e3 * percentile(decisions_s, 0.5), "ms")
    kept &= max(decisions_s) < 1
    progress(0.5)
    instance_ms = _instance_ms(full)
    report.add("an instance's decision, p99", percentile(instance_ms, 0.99), "ms", "< 5")
    kept &= percentile(instance_ms, 0.99) < 5
    if week is not None:
        comparison = prepared(week, full_load(week, scenario), scenario)
        took_s, decisions_s = run(FULL, comparison)
        report.add(f"the week at load 1.0 with control, {len(comparison.workload.requests)} requests", took_s / 60, "min", "< 10")
        report.add("of which decisions", sum(decisions_s) / 60, "min")
        kept &= took_s < 600
    progress(1.0)
    return kept


def _instance_ms(comparison: Comparison) -> list[float]:
    model, slo = comparison.setting.model, comparison.setting.classes.slos["MM"]
    controller, took = InstanceController(model, 4, slo, peers=16), []
    for n in range(2000):
        load = InstanceLoad(20 + n % 40, n % 5, 700 * (n % 5), 0.3, 0.05 * (n % 3), 2.0 + n % 3, 2400.0, 500.0, 0.2, 0.08)
        begin = time.perf_counter()
        controller.clock(5.0 * n, load)
        took.append(1e3 * (time.perf_counter() - begin))
    return took
