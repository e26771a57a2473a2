"""What Perseus is measured against: every GPU at its highest clock, power limits, and EnvPipe's envelope.

House rules: each is a Plan like the planner's, over every measured option (the highest clock need not be on the Pareto front);
each meets the slowdown that it was asked for or falls back to the highest clocks; ``1.0x`` everywhere is ``max_clock``'s time.

A plan's deadline is its own iteration time; ``until`` adds the waiting until a later one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from powerd.errors import RequestError
from powerd_policies.perseus.problem import Floats, Ints, Kind, Option, Plan, Problem

#: Rounding of sums of times: a plan that is later by less is in time.
EPSILON = 1e-9


def measured(problem: Problem) -> Problem:
    """The same problem with every measured option, dominated ones too, the highest clock first."""
    tables = problem.measured or problem.tables
    return replace(problem, tables=tuple(tuple(sorted(table, key=lambda o: -(o.mhz or 0))) for table in tables))


def until(plan: Plan, deadline_s: float) -> Plan:
    """The same clocks, waiting until ``deadline_s``; RequestError when that is before the plan ends."""
    if plan.iteration_time_s > deadline_s * (1 + EPSILON):
        raise RequestError(f"the plan takes {plan.iteration_time_s:.6g} s, longer than {deadline_s:.6g} s", code="bad_value")
    return replace(plan, deadline_s=deadline_s, lower_bound_j=_bound(plan.problem, deadline_s))


def max_clock(problem: Problem) -> Plan:
    """Every GPU at its highest clock: the baseline whose iteration time is 1.0x."""
    every = measured(problem)
    return _plan(every, [0] * len(every.tables))


def global_power_limit(problem: Problem, slowdown: float = 0.0, step_w: float = 5.0) -> Plan:
    """The best single power limit for all GPUs within a slowdown (0.05 is 5 %), as a search over limits in steps would find it.

    Under a limit every instruction runs at its fastest clock whose mean power is within it, as the driver's own control would.
    """
    every = measured(problem)
    return _best(every, [[_under(table, limit) for table in every.tables] for limit in _limits(every, step_w)], slowdown)


def per_stage_power_limit(problem: Problem, slowdown: float = 0.0, step_w: float = 5.0, targets: int = 50) -> Plan:
    """One power limit per stage that balances the stages' forward times (ZeusPerStage of the Perseus paper, section 6.1).

    For each of ``targets`` forward times from the slowest stage's at its highest clock upward, a stage takes the lowest limit at
    which its forward is no later; backward runs under the same limit. The best within the slowdown.
    """
    every = measured(problem)
    kinds = _kinds(every)
    stages = sorted({stage for stage, _ in kinds})
    limits = _limits(every, step_w)
    choices = {(limit, t): _under(table, limit) for limit in limits for t, table in enumerate(every.tables)}
    lead = {stage: kinds.get((stage, str(Kind.FORWARD)), kinds[min(k for k in kinds if k[0] == stage)]) for stage in stages}
    forward = {s: [(limit, every.tables[lead[s]][choices[limit, lead[s]]].time_s) for limit in limits] for s in stages}
    fastest_s = max(min(t for _, t in forward[s]) for s in stages)
    slowest_s = max(max(t for _, t in forward[s]) for s in stages)
    tried: list[list[int]] = []
    for target_s in np.linspace(fastest_s, slowest_s, targets):
        of = {s: min((limit for limit, t in forward[s] if t <= target_s * (1 + EPSILON)), default=limits[-1]) for s in stages}
        per_table = [0] * len(every.tables)
        for (stage, _), table in kinds.items():
            per_table[table] = choices[of[stage], table]
        if per_table not in tried:
            tried.append(per_table)
    return _best(every, tried, slowdown)


def envpipe(problem: Problem, slowdown: float = 0.0) -> Plan:
    """EnvPipe's point solution: everything outside the envelope runs slowly, the envelope at its highest clocks.

    EnvPipe (Choi et al., USENIX ATC'23, section 4) as the Perseus paper reads it (section 6.1: it assumes that the last stage is
    the bottleneck). Envelope: the first microbatch's way down, all of the last stage, the last microbatch's way back. Everything
    else starts at its clock of least effective energy; while the iteration is later than allowed, what is outside the envelope
    and on the critical path goes up by one clock. Under a GPU's power cap the highest clock need not be the fastest; EnvPipe does
    not know that.
    """
    every = measured(problem)
    dag = every.dag
    last_stage = max(node.stage for node in dag.nodes)
    last_microbatch = max(node.microbatch for node in dag.nodes)
    inside = np.array([
        node.stage == last_stage
        or (node.kind == Kind.FORWARD and node.microbatch == 0)
        or (node.kind != Kind.FORWARD and node.microbatch == last_microbatch)
        for node in dag.nodes
    ])  # fmt: skip
    power = every.blocking_power_w
    saving = [min(range(len(t)), key=lambda k, t=t: t[k].energy_j - power * t[k].time_s) for t in every.tables]  # type: ignore[misc]
    choice = np.where(inside, 0, np.array(saving, dtype=np.int64)[every.table])
    times = _times(every)
    limit_s = max_clock(problem).iteration_time_s * (1 + slowdown) * (1 + EPSILON)
    while True:
        early, late, total_s = dag.schedule(times[every.table, choice])
        if total_s <= limit_s:
            return _of(every, choice)
        critical = (late - early <= EPSILON * total_s) & (choice > 0)
        if not critical.any():
            return max_clock(problem)
        choice = np.where(critical, choice - 1, choice)


#: name -> (problem, slowdown) -> plan, in the order in which reports show them
BASELINES: Final[dict[str, Callable[[Problem, float], Plan]]] = {
    "max clock": lambda problem, slowdown: max_clock(problem),
    "global power limit": global_power_limit,
    "per-stage power limit": per_stage_power_limit,
    "EnvPipe": envpipe,
}


def _plan(problem: Problem, per_table: Sequence[int]) -> Plan:
    return _of(problem, np.array(per_table, dtype=np.int64)[problem.table])


def _of(problem: Problem, choice: Ints) -> Plan:
    plan = Plan(problem, choice, 0.0, -math.inf)
    return replace(plan, deadline_s=plan.iteration_time_s, lower_bound_j=_bound(problem, plan.iteration_time_s))


def _bound(problem: Problem, deadline_s: float) -> float:
    """A bound that needs no solver: nobody can do better than every instruction at its least effective energy."""
    power = problem.blocking_power_w
    least = np.array([min(o.energy_j - power * o.time_s for o in table) for table in problem.tables])
    return float(least[problem.table].sum()) + power * problem.dag.ranks * deadline_s


def _kinds(problem: Problem) -> dict[tuple[int, str], int]:
    """(stage, kind) -> its table."""
    return {(node.stage, str(node.kind)): int(t) for node, t in zip(problem.dag.nodes, problem.table, strict=True)}


def _times(problem: Problem) -> Floats:
    """[table, option] -> seconds; short tables repeat their last option."""
    width = max(len(table) for table in problem.tables)
    return np.array([[table[min(k, len(table) - 1)].time_s for k in range(width)] for table in problem.tables])


def _power_w(option: Option) -> float:
    return option.energy_j / option.time_s


def _limits(problem: Problem, step_w: float) -> list[float]:
    """Power limits worth trying, the highest first."""
    if not step_w > 0:
        raise RequestError(f"a step of power limits is above 0 W, not {step_w}", code="bad_value")
    powers = [_power_w(option) for table in problem.tables if len(table) > 1 for option in table] or [0.0]
    high, low = math.ceil(max(powers) / step_w), math.floor(min(powers) / step_w)
    return [step_w * n for n in range(high, low - 1, -1)]


def _under(table: Sequence[Option], limit_w: float) -> int:
    """The fastest option within a limit; the one that draws least when none is."""
    within = [k for k, option in enumerate(table) if _power_w(option) <= limit_w]
    if not within:
        return min(range(len(table)), key=lambda k: _power_w(table[k]))
    return min(within, key=lambda k: (table[k].time_s, k))


def _best(problem: Problem, tried: Sequence[Sequence[int]], slowdown: float) -> Plan:
    """The plan of least energy, waiting until the allowed time included; the highest clocks where none is in time."""
    base = max_clock(problem)
    deadline_s = base.iteration_time_s * (1 + slowdown)
    plans = [base, *(_plan(problem, choice) for choice in tried)]
    in_time = [plan for plan in plans if plan.iteration_time_s <= deadline_s * (1 + EPSILON)]
    return min(in_time, key=lambda plan: until(plan, max(deadline_s, plan.iteration_time_s)).energy_j)
