"""Pipelines to plan for in tests: the measured profiles, and made-up ones of any shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from powerd_policies.perseus import dag, profile, schedules
from powerd_policies.perseus.baselines import max_clock
from powerd_policies.perseus.planner import Planner
from powerd_policies.perseus.problem import Dag, Instruction, Option, Problem

PROFILES = Path(__file__).parents[1] / "policies" / "profiles"
BLOCKING_POWER_W = {"a100_sxm": 83.64, "a40": 70.38}


def measured(gpu: str, microbatches: int) -> tuple[Problem, float]:
    """GPT-3 175B on eight stages, 1F1B, and its iteration time at the highest clock."""
    rows = profile.read(PROFILES / f"stage_profile_gpt3-175b_{gpu}.csv")
    options = profile.options(rows, BLOCKING_POWER_W[gpu])
    problem = dag.problem(dag.build(schedules.order("1f1b", 8, microbatches)), options, BLOCKING_POWER_W[gpu])
    return problem, max_clock(problem).iteration_time_s


def random_job(seed: int) -> tuple[Problem, float]:
    """1F1B of 2-8 stages, balanced or not, 8-40 clocks, measured with or without noise; and a deadline for it."""
    random = np.random.default_rng(seed)
    stages, microbatches = int(random.integers(2, 9)), int(random.integers(4, 25))
    clocks = np.linspace(1410, random.integers(600, 900), int(random.integers(8, 41))).round().astype(int)
    spread, noise = random.choice([0.0, 0.1, 0.4]), random.choice([0.0, 0.003])
    fixed, knee, static = random.uniform(0, 0.3), random.uniform(0.6, 0.9), random.uniform(60, 120)
    tables: dict[tuple[int, str], tuple[Option, ...]] = {}
    for stage in range(stages):
        size = 1 + spread * random.uniform(-1, 1)
        for kind, base in (("forward", 0.05), ("backward", 0.1)):
            share = clocks / 1410
            times = base * size * (fixed + (1 - fixed) / share) * (1 + noise * random.standard_normal(len(clocks)))
            watts = static + 250 * share * np.maximum(share, knee) ** 2
            energies = times * watts * (1 + noise * random.standard_normal(len(clocks)))
            tables[stage, kind] = tuple(
                Option(int(mhz), float(time), float(energy)) for mhz, time, energy in zip(clocks, times, energies, strict=True)
            )
    problem = dag.problem(dag.build(schedules.order("1f1b", stages, microbatches)), tables, 70.0)
    planner = Planner(problem)
    return problem, planner.shortest_s + float(random.choice([0.0, random.uniform(0, 0.5)])) * (
        planner.cheapest_s - planner.shortest_s
    )


def small(edges: list[tuple[int, int]], ranks: list[int], tables: list[list[tuple[float, float]]], table: list[int]) -> Problem:
    """Any graph, with (seconds, joules) for options; the fewer the seconds the higher the clock."""
    nodes = tuple(Instruction(rank, "forward", node) for node, rank in enumerate(ranks))
    array = np.array(sorted(edges, key=lambda edge: (edge[1], edge[0])), np.int64).reshape(-1, 2)
    options = tuple(tuple(Option(1000 - 10 * k, t, e) for k, (t, e) in enumerate(sorted(rows))) for rows in tables)
    return Problem(Dag(nodes, np.array(ranks), array, max(ranks) + 1), options, np.array(table), 50.0)
