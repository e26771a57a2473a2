"""What Perseus is measured against: each baseline does what its paper says, and keeps to its slowdown."""

from __future__ import annotations

import math

import pytest

from powerd.errors import RequestError
from powerd.resources import folder
from powerd_policies.perseus import baselines, dag, profile, schedules
from powerd_policies.perseus.document import chosen
from powerd_policies.perseus.problem import Plan, Problem
from powerd_policies.perseus.profile import Row
from powerd_policies.perseus.straggler import job_energy


def measured(gpu: str, blocking_power_w: float, microbatches: int = 12) -> Problem:
    rows = profile.read(folder("profiles") / f"stage_profile_gpt3-175b_{gpu}.csv")
    graph = dag.build(schedules.order("1f1b", 8, microbatches))
    return dag.problem(graph, profile.options(rows, blocking_power_w), blocking_power_w)


A100 = measured("a100_sxm", 83.6)
A40 = measured("a40", 70.4)


@pytest.mark.parametrize(("problem", "mhz", "published_s"), [(A100, 1410, 28.18), (A40, 1740, 75.5)])
def test_the_baseline_runs_every_gpu_at_its_highest_clock(problem: Problem, mhz: int, published_s: float) -> None:
    plan = baselines.max_clock(problem)
    assert {option.mhz for option in chosen(plan)} == {mhz}
    assert plan.iteration_time_s * 10 == pytest.approx(published_s, rel=0.01)  # rows are a tenth of a microbatch
    assert plan.deadline_s == plan.iteration_time_s


def test_the_highest_clock_counts_even_where_a_power_cap_makes_another_one_better() -> None:
    rows = [
        Row(0, kind, mhz, time_s, 280 * time_s)
        for kind in ("forward", "backward")
        for mhz, time_s in ((1740, 0.1), (1605, 0.098))
    ]
    problem = dag.problem(dag.build(schedules.order("1f1b", 1, 3)), profile.options(rows, 70.0), 70.0)
    assert {option.mhz for table in problem.tables for option in table} == {1605}
    base = baselines.max_clock(problem)
    assert {option.mhz for option in chosen(base)} == {1740}
    assert base.iteration_time_s == pytest.approx(0.6)
    assert baselines.global_power_limit(problem).iteration_time_s <= base.iteration_time_s


@pytest.mark.parametrize("problem", [A100, A40])
@pytest.mark.parametrize("name", list(baselines.BASELINES))
def test_no_baseline_is_slower_than_allowed_or_dearer_than_the_highest_clocks(problem: Problem, name: str) -> None:
    base = baselines.max_clock(problem)
    before_j = base.energy_j
    for slowdown in (0.0, 0.03, 0.1):
        plan = baselines.BASELINES[name](problem, slowdown)
        assert plan.iteration_time_s <= base.iteration_time_s * (1 + slowdown) * (1 + 1e-9)
        at_end_j = baselines.until(plan, base.iteration_time_s * (1 + slowdown)).energy_j
        assert plan.lower_bound_j <= plan.energy_j
        if name != "max clock":
            assert at_end_j <= before_j * (1 + 1e-9) + base.problem.blocking_power_w * 8 * base.iteration_time_s * slowdown
    assert baselines.envpipe(problem).energy_j < before_j


def test_a_power_limit_holds_for_every_computation() -> None:
    plan = baselines.global_power_limit(A100, 0.1, step_w=5.0)
    tables, options = plan.problem.tables, chosen(plan)
    limit_w = 5.0 * math.ceil(max(option.energy_j / option.time_s for option in options) / 5.0)
    assert limit_w < max(option.energy_j / option.time_s for option in chosen(baselines.max_clock(A100)))
    for table, option in zip(plan.problem.table, options, strict=True):
        assert option.time_s == min(o.time_s for o in tables[table] if o.energy_j / o.time_s <= limit_w)


def test_stages_get_their_own_limits_and_the_slowest_keeps_its_time() -> None:
    plan = baselines.per_stage_power_limit(A100, 0.05)
    forward = {n.stage: o for n, o in zip(plan.problem.dag.nodes, chosen(plan), strict=True) if n.kind == "forward"}
    assert forward[7].mhz == max(o.mhz or 0 for o in forward.values()), "the last stage has the most layers"
    assert len({o.mhz for o in forward.values()}) > 1


def test_envpipe_keeps_its_envelope_and_slows_the_rest() -> None:
    plan = baselines.envpipe(A100)
    for node, option in zip(plan.problem.dag.nodes, chosen(plan), strict=True):
        first = node.kind == "forward" and node.microbatch == 0
        if node.stage == 7 or first or (node.kind == "backward" and node.microbatch == 11):
            assert option.mhz == 1410, node
    assert min(option.mhz or 0 for option in chosen(plan)) < 1000


def test_waiting_costs_blocking_power_on_every_rank() -> None:
    base = baselines.max_clock(A100)
    later = baselines.until(base, base.iteration_time_s + 2.0)
    assert later.energy_j - base.energy_j == pytest.approx(8 * 83.6 * 2.0)
    with pytest.raises(RequestError, match="longer than"):
        baselines.until(base, base.iteration_time_s * 0.9)


def test_an_operation_of_constant_time_has_no_limit() -> None:
    rows = [Row(0, "forward", 1400, 0.1, 40.0), Row(0, "forward", 1200, 0.12, 30.0), Row(0, "backward", None, 0.1, 60.0)]
    problem = dag.problem(dag.build(schedules.order("1f1b", 1, 2)), profile.options(rows, 50.0), 50.0)
    plan = baselines.global_power_limit(problem, 0.2)
    assert [option.mhz for option in chosen(plan)] == [1200, None, 1200, None]


def test_envpipe_saves_what_was_published_beside_a_straggler() -> None:
    """Perseus paper, figure 7: GPT-3 on A100, 96 microbatches, one of 16 pipelines 1.2x slower: EnvPipe saves 12.0 %."""
    problem = measured("a100_sxm", 83.6, microbatches=96)
    base, envpipe = baselines.max_clock(problem), baselines.envpipe(problem)

    def job_j(plan: Plan) -> float:
        late_s = 1.2 * base.iteration_time_s
        return job_energy(
            1.2 * plan.energy_j, plan.energy_j, plan.iteration_time_s, late_s, pipelines=16, ranks=8, blocking_power_w=83.6
        )

    assert 100 * (1 - job_j(envpipe) / job_j(base)) == pytest.approx(12.0, abs=0.3)
