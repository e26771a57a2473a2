"""The controller of prefill and decode apart: who is bound by what, and a whole replay with it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from powerd.errors import RequestError
from powerd.sim import enginemodels
from powerd.sim.replay import compare, policies, report, runner, scale, session, trace
from powerd_policies.dynamollm.classes import Classes
from powerd_policies.dynamollm.fleet import ClassLoad, FleetPlan, FleetState, InstanceState, Role
from powerd_policies.dynamollm.knobs import Knobs
from powerd_policies.dynamollm.phases import Links, promised
from powerd_policies.dynamollm.policies import forecaster
from powerd_policies.dynamollm.predictor import Rate
from powerd_policies.dynamollm.splitphases import KNOBS, SplitPhases


def controller(gpus: int = 96, knobs: Knobs = KNOBS, links: Links | None = None) -> SplitPhases:
    return SplitPhases(enginemodels.load(), Classes(), gpus, forecaster, links=links, knobs=knobs)


def roles(plan: FleetPlan) -> dict[Role, list[tuple[int, int]]]:
    found: dict[Role, list[tuple[int, int]]] = {}
    for want in plan.instances:
        found.setdefault(want.role, []).append((want.tp, want.clock_mhz))
    return found


def test_each_side_is_bound_by_its_own_promise_alone() -> None:
    classes = Classes()
    prefill, decode = promised(classes, "prefill").slos["MS"], promised(classes, "decode").slos["MS"]
    assert (prefill.ttft_s, decode.tbt_s) == (0.4, 0.1)
    assert prefill.tbt_s == decode.ttft_s == float("inf")
    sides = controller().sides
    answers = {"MM": Rate(1.0, 600.0, 10_000.0)}
    assert sides["prefill"].capacity.serve(4, 1980, 1, answers).feasible, "answers are nothing to an instance that prefills"
    assert not sides["decode"].capacity.serve(4, 1980, 1, answers).feasible
    prompts = {"LM": Rate(10.0, 40_000.0, 1000.0)}
    assert not sides["prefill"].capacity.serve(4, 1980, 1, prompts).feasible
    assert sides["decode"].capacity.serve(4, 1980, 1, prompts).feasible


def test_short_answers_need_decode_to_be_faster_the_longer_their_kv_cache_moves() -> None:
    load = {"LS": Rate(10.0, 30_000.0, 500.0)}
    near, far = (controller(links=Links(bytes_per_s=rate)).sides["decode"].capacity for rate in (400e9, 10e9))
    assert near.least(4, 1980, load, 12) is not None
    assert far.least(4, 1980, load, 12) is None
    assert "TBT of LS: the second token is late" in far.serve(4, 1980, 12, load).lacks
    assert far.least(4, 1980, {"LL": Rate(10.0, 30_000.0, 5000.0)}, 24) is not None, "in long answers one gap is not the P99"


def test_gpus_are_divided_and_neither_side_takes_what_is_the_others() -> None:
    both = controller(32)
    given = {role: side.gpus for role, side in both.sides.items()}
    assert sum(given.values()) == 32
    assert min(given.values()) >= 8
    first = roles(both.decide(FleetState(0.0, 0.0, (), {}, 32)))
    assert {role: sum(tp for tp, _ in own) for role, own in first.items()} == given, "nothing is known: all are on"
    with pytest.raises(ValueError, match="at least 16 GPUs, an instance of TP8 for each phase; there are 12"):
        controller(12)
    with pytest.raises(ValueError, match="no watt budget"):
        controller(knobs=replace(KNOBS, budget_w=1e4))
    with pytest.raises(ValueError, match="one pool"):
        controller(knobs=replace(KNOBS, partitions=("nine",)))


def test_a_side_that_has_no_work_rests_while_the_other_runs() -> None:
    """Long prompts, a few answers: decode goes to a lower clock and to fewer GPUs than it began with."""
    both, state = controller(32), FleetState(0.0, 0.0, (), {}, 32)
    for step in range(1, 40):
        plan = both.decide(state)
        instances = tuple(
            InstanceState(want.id or f"{want.role}-{step}-{n}", want.pool, want.tp, want.clock_mhz, role=want.role)
            for n, want in enumerate(plan.instances)
        )
        state = FleetState(5.0 * step, 5.0, instances, {"LM": ClassLoad(10, 30_000, 1200)}, 32)
    plan = both.decide(state)
    clocks = {role: max(mhz for _, mhz in own) for role, own in roles(plan).items()}
    gpus = {role: sum(tp for tp, _ in own) for role, own in roles(plan).items()}
    assert clocks["decode"] < clocks["prefill"]
    assert gpus["decode"] < both.sides["decode"].gpus
    assert all("(decode)" in e.subject or "(prefill)" in e.subject for e in plan.events if "fleet" in e.subject)


def test_a_replay_keeps_its_promises_with_a_clock_for_each_side_and_loses_nobody() -> None:
    """Eight minutes of the conversation trace at three times their load."""
    hour = trace.read(session.shipped_hour())
    comparison = session.prepare(scale.scaled(hour.between(600, 1080), 3.0, 1), session.scenario(None))
    built = policies.build("splitphases", comparison.scenario, comparison.workload, comparison.setting, comparison.known)
    outcome = runner.replay(built.controller, comparison.workload, comparison.setting, config=built.config)
    counts, requests = outcome.results.counts, comparison.workload.requests
    assert counts["finished"] + counts["rejected"] == len(requests)
    assert counts["moves"] == int((requests.output_tokens > 1).sum()) - counts["rejected"]
    sides = outcome.timeline.sides()
    assert set(sides) == {"prefill", "decode"}
    assert abs(sides["prefill"]["clock_mhz"] - sides["decode"]["clock_mhz"]) > 100
    assert report.attainment(outcome, comparison.workload, comparison.setting.classes)[0] > 0.985


def test_the_report_tells_of_both_sides_and_only_where_there_are_two() -> None:
    hour = trace.read(session.shipped_hour())
    few = session.prepare(hour.between(600, 660), session.scenario(None))
    made = {name: compare.one(name, few).entry for name in ("singlepool", "splitphases")}
    assert "sides" not in made["singlepool"]
    assert {key for side in made["splitphases"]["sides"].values() for key in side} == {"gpus", "clock_mhz"}
    assert made["splitphases"]["slo_attainment"] > 0.98


def test_a_cluster_that_has_no_room_for_both_sides_is_refused_in_words() -> None:
    hour = trace.read(session.shipped_hour())
    small = session.scenario(None)
    small = replace(small, cluster=replace(small.cluster, nodes=1))
    few = session.prepare(hour.between(600, 660), small)
    with pytest.raises(RequestError, match="splitphases needs at least 16 GPUs, an instance of TP8 for each phase; there are 8"):
        compare.one("splitphases", few)
