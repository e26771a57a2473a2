"""The policies, configurations of one controller, in a simulated fleet: each turns its own knob, none flaps or looks ahead."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from powerd.sim import enginemodels
from powerd.sim.cluster import Cluster, ClusterConfig, Requests
from powerd_policies.dynamollm import optimizer, policies, pool
from powerd_policies.dynamollm.capacity import measured
from powerd_policies.dynamollm.classes import NAMES, Classes
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import ClassLoad, FleetController, FleetEvent, FleetPlan, FleetState, InstanceState
from powerd_policies.dynamollm.knobs import POLICIES, Knobs
from powerd_policies.dynamollm.optimizer import Weights
from powerd_policies.dynamollm.overheads import Fixes, Overheads
from powerd_policies.dynamollm.pace import Pace

MODEL, CLASSES, GPUS = enginemodels.load(), Classes(), 48
TOP = MODEL.max_clock_mhz
KINDS = (
    (150, 60, 0.1),
    (180, 180, 0.1),
    (420, 80, 0.25),
    (900, 420, 0.25),
    (2600, 60, 0.2),
    (1500, 420, 0.1),
)  # prompt, answer, share


def requests(rates: list[float], seed: int = 1, step_s: float = 60.0) -> Requests:
    """Poisson arrivals, one rate a minute."""
    dice = np.random.default_rng(seed)
    times = np.concatenate(
        [step_s * n + np.sort(dice.random(dice.poisson(rate * step_s))) * step_s for n, rate in enumerate(rates)]
    )
    rows = dice.choice(len(KINDS), len(times), p=[kind[2] for kind in KINDS])
    spread = dice.uniform(0.8, 1.2, len(times))
    prompt = (np.array([kind[0] for kind in KINDS])[rows] * spread).astype(int)
    return Requests.of(times, prompt, np.array([kind[1] for kind in KINDS])[rows], CLASSES)


def build(name: str, knobs: Knobs | None = None) -> FleetController:
    lengths = measured(CLASSES, [(prompt, answer) for prompt, answer, share in KINDS for _ in range(round(20 * share))])
    return policies.build(name, model=MODEL, classes=CLASSES, gpus=GPUS, lengths=lengths, knobs=knobs)


@dataclass
class Run:
    plans: list[FleetPlan]
    events: list[FleetEvent]
    slo: float
    energy_j: float
    power_w: list[float]


def run(controller: FleetController, load: Requests, length_s: float) -> Run:
    cluster = Cluster(MODEL, load, CLASSES, ClusterConfig(start_s=47.0), gpus=GPUS)
    plans, events, power_w, now_s = list[FleetPlan](), list[FleetEvent](), list[float](), 0.0
    while now_s < length_s:
        state = cluster.state()
        power_w.append(state.power_w or 0.0)
        plans.append(controller.decide(state))
        events += plans[-1].events
        cluster.apply(plans[-1])
        now_s = min(length_s, now_s + controller.period_s)
        cluster.advance(now_s)
    cluster.advance(length_s + 60.0)
    results = cluster.results()
    ttft_s = np.array([CLASSES.slos[name].ttft_s for name in NAMES])[load.true_class]
    kept = (results.ttft_s <= ttft_s) & (np.nan_to_num(results.tbt_p99_s) <= 0.1) & results.finished
    return Run(plans, events, float(kept.mean()), results.total_j, power_w)


LOAD = requests([9.0] * 6 + [16.0] * 6 + [5.0] * 6)
LENGTH_S = 18 * 60.0


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return {name: run(build(name), LOAD, LENGTH_S) for name in POLICIES if name != "dynamollm-paper"}


def shapes(plan: FleetPlan) -> Counter[int]:
    return Counter(want.tp for want in plan.instances)


def test_each_knob_changes_what_it_is_for_and_nothing_else(runs: dict[str, Run]) -> None:
    for name, found in runs.items():
        knobs = POLICIES[name]
        tps = {want.tp for plan in found.plans for want in plan.instances}
        clocks = {want.clock_mhz for plan in found.plans for want in plan.instances}
        gpus = {sum(want.tp for want in plan.instances) for plan in found.plans}
        if not knobs.shards:
            assert tps == {8}, name
        if not knobs.clocks:
            assert clocks == {TOP}, name
        if not knobs.instances and not knobs.shards:
            assert gpus == {GPUS}, name
        pools = {want.pool for plan in found.plans for want in plan.instances}
        assert (len(pools) > 1) == (name == "multipool")
    assert len({sum(want.tp for want in plan.instances) for plan in runs["scaleinst"].plans}) > 1
    assert len({want.clock_mhz for plan in runs["scalefreq"].plans for want in plan.instances}) > 1
    assert {want.tp for plan in runs["dynamollm"].plans for want in plan.instances} != {8}


def test_the_whole_saves_most_and_keeps_its_promises(runs: dict[str, Run]) -> None:
    base_j = runs["singlepool"].energy_j
    saved = {name: 1 - found.energy_j / base_j for name, found in runs.items()}
    assert runs["dynamollm"].slo >= 0.99
    assert saved["dynamollm"] > 0.3
    for name in ("scaleinst", "scaleshard", "scalefreq"):
        assert -0.005 <= saved[name] < saved["dynamollm"] - 0.005, name


def test_the_fleet_does_not_flap(runs: dict[str, Run]) -> None:
    found = runs["dynamollm"]
    changes = [event for event in found.events if event.kind == "scale"]
    downs = [e.at_s for e in changes if _gpus(e.detail.split(" -> ")[1]) < _gpus(e.detail.split(" -> ")[0]) and e.at_s > 300.0]
    assert all(later - earlier >= 300.0 - 1e-6 for earlier, later in pairwise(downs))
    reshards = [event.at_s for event in found.events if event.kind == "reshard"]
    assert all(later - earlier >= 300.0 for earlier, later in pairwise(reshards))
    steady = run(build("dynamollm"), requests([9.0] * 15, seed=7), 900.0)
    assert len({tuple(sorted(shapes(plan).items())) for plan in steady.plans[-60:]}) <= 2


def _gpus(text: str) -> int:
    words = text.split()
    return sum(int(words[n]) * int(words[n + 2][2:]) for n in range(0, len(words) - 2, 4)) if "x" in words else 0


def test_nothing_is_decided_by_what_comes_later() -> None:
    other = requests([9.0] * 6 + [2.0] * 6)
    same = min(360.0, 355.0)
    one, two = run(build("dynamollm"), LOAD, same), run(build("dynamollm"), _first(LOAD, other, same), same)
    assert [plan.instances for plan in one.plans] == [plan.instances for plan in two.plans]


def _first(head: Requests, tail: Requests, until_s: float) -> Requests:
    """The head's requests until then, the tail's after."""
    a, b = head.arrival_s < until_s, tail.arrival_s >= until_s
    parts = [np.concatenate([getattr(head, n)[a], getattr(tail, n)[b]]) for n in ("arrival_s", "prompt_tokens", "output_tokens")]
    return Requests.of(parts[0], parts[1], parts[2], CLASSES)


def test_a_watt_budget_is_kept() -> None:
    free = run(build("dynamollm"), LOAD, LENGTH_S)
    budget_w = 0.85 * max(free.power_w[60:])
    kept = run(build("dynamollm", replace(POLICIES["dynamollm"], budget_w=budget_w)), LOAD, LENGTH_S)
    assert max(free.power_w[60:]) > budget_w
    half_minutes = np.convolve(kept.power_w[20:], np.ones(6) / 6, "valid")
    assert half_minutes.max() <= budget_w
    assert np.quantile(kept.power_w[20:], 0.98) <= budget_w
    assert any(event.kind == "budget" for event in kept.events)


def test_a_strict_watt_budget_is_kept_at_every_moment() -> None:
    """Also at the begin, when nothing is known of the load."""
    budget_w = 16_000.0
    knobs = replace(POLICIES["dynamollm"], budget_w=budget_w, budget_strict=True)
    kept = run(build("dynamollm", knobs), requests([5.0] * 10), 600.0)
    assert max(kept.power_w) <= budget_w
    assert kept.slo >= 0.95
    assert any(event.kind == "budget" for event in kept.events)


@pytest.mark.parametrize("partition", ["prompt", "output", "nine"])
def test_more_than_one_pool_serves_every_class(partition: str) -> None:
    found = run(build("dynamollm", replace(POLICIES["dynamollm"], partitions=(partition,))), requests([9.0] * 8), 480.0)
    assert found.slo >= 0.98
    assert set(found.plans[-1].routes) == set(NAMES)
    pools = {want.pool for want in found.plans[-1].instances}
    assert all(set(way) & pools for way in found.plans[-1].routes.values())


def test_a_load_that_no_fleet_holds_is_said_to_be_one_and_served_as_far_as_it_goes() -> None:
    controller = build("dynamollm")
    flood = {"LS": ClassLoad(3000, 9_000_000, 180_000)}
    state = FleetState(0.0, 0.0, (), {}, GPUS)
    plan = controller.decide(state)
    events: list[FleetEvent] = []
    for n in range(1, 20):
        instances = tuple(InstanceState(f"LL-{k}", w.pool, w.tp, w.clock_mhz) for k, w in enumerate(plan.instances))
        plan = controller.decide(FleetState(5.0 * n, 5.0, instances, flood, GPUS))
        events += plan.events
    said = [event.detail for event in events if event.kind == "infeasible"]
    assert said
    assert "would be needed" in said[0]
    assert sum(want.tp for want in plan.instances) > GPUS // 2


def test_short_of_gpus_every_clock_is_the_highest_and_queues_go_by_deadline_until_the_load_fits_again() -> None:
    controller = build("dynamollm")
    plan = controller.decide(FleetState(0.0, 0.0, (), {}, GPUS))
    flood, quiet = ClassLoad(3000, 9_000_000, 180_000), ClassLoad(5, 2_000, 500)
    seen: list[tuple[str, FleetPlan]] = []
    for n in range(1, 200):
        instances = tuple(InstanceState(f"LL-{k}", w.pool, w.tp, w.clock_mhz) for k, w in enumerate(plan.instances))
        load = {"LS": flood} if n < 20 else {"SS": quiet}
        plan = controller.decide(FleetState(5.0 * n, 5.0, instances, load, GPUS))
        seen.append((",".join(i.id for i in instances), plan))
    ids, short = seen[18]
    assert {want.clock_mhz for want in short.instances if want.id is not None} == {TOP}
    assert short.reordered == frozenset(ids.split(","))
    calm = seen[-1][1]
    assert max(want.clock_mhz for want in calm.instances) < TOP
    assert not calm.reordered
    told = [event.detail for _, each in seen for event in each.events if event.kind == "infeasible"]
    assert "highest clocks" in told[0]
    assert told[-1] == "the load fits again"


def test_an_instance_that_died_is_replaced() -> None:
    controller = build("singlepool")
    first = controller.decide(FleetState(0.0, 0.0, (), {}, GPUS))
    assert len(first.instances) == 6
    alive = tuple(InstanceState(f"LL-{n}", "LL", 8, TOP) for n in range(5))
    second = controller.decide(FleetState(60.0, 60.0, alive, {}, GPUS))
    assert sorted(want.id or "" for want in second.instances) == ["", *(state.id for state in alive)]


def test_a_fixed_fleet_stays_and_what_is_not_there_is_refused() -> None:
    fixed = policies.static(4, 3, 1530, model=MODEL)
    plan = fixed.decide(FleetState(0.0, 0.0, (), {}, GPUS))
    assert [(want.tp, want.clock_mhz) for want in plan.instances] == [(4, 1530)] * 3
    with pytest.raises(ValueError, match="no TP3"):
        policies.static(3, 1, 1530, model=MODEL)
    with pytest.raises(ValueError, match="no policy 'singelpool'; there are"):
        build("singelpool")
    small = EngineModel("m", "g", {k: v for k, v in MODEL.table.items() if k[0] == 4}, MODEL.kv_tokens, 1)
    with pytest.raises(ValueError, match="needs tensor parallelism 8; the profile of m holds"):
        policies.build("singlepool", model=small, classes=CLASSES, gpus=GPUS)


def test_a_pace_that_readers_keep_is_what_clocks_are_chosen_for() -> None:
    knobs = POLICIES["scalefreq"]
    calm = run(build("scalefreq"), requests([6.0] * 6), 360.0)
    quick = run(build("scalefreq", replace(knobs, pace=Pace(faster=5.0))), requests([6.0] * 6), 360.0)
    assert _mean_mhz(quick) > _mean_mhz(calm)
    nobody = run(build("scalefreq", replace(knobs, pace=Pace(tokens_per_s=None))), requests([6.0] * 6), 360.0)
    assert nobody.plans[-1].instances == calm.plans[-1].instances


def _mean_mhz(found: Run) -> float:
    clocks = [want.clock_mhz for plan in found.plans[20:] for want in plan.instances]
    return sum(clocks) / len(clocks)


def test_a_fleet_that_starts_slowly_holds_more() -> None:
    quick, slow = (
        run(
            policies.build("dynamollm", model=MODEL, classes=CLASSES, gpus=GPUS, overheads=Overheads(fixes)),
            requests([9.0] * 8),
            480.0,
        )
        for fixes in (Fixes(), Fixes.none())
    )
    gpus = [sum(want.tp for want in found.plans[-1].instances) for found in (quick, slow)]
    assert gpus[1] > gpus[0]


@pytest.mark.parametrize(("carbon_g_per_kwh", "usd_per_kwh"), [(None, 0.1), (500.0, 0.1 + 0.5 * 0.2)])
def test_the_price_of_gpus_and_of_carbon_weigh_in_the_plan(
    monkeypatch: pytest.MonkeyPatch, carbon_g_per_kwh: float | None, usd_per_kwh: float
) -> None:
    """That a weight changes the plan is the optimizer's test; here: what energy costs now, in dollars, against a GPU's hour."""
    asked: list[Weights] = []

    def optimise(*args: Any, weights: Weights, **more: Any) -> Any:
        asked.append(weights)
        return optimizer.optimise(*args, weights=weights, **more)

    monkeypatch.setattr(pool, "optimise", optimise)
    controller = build("dynamollm", replace(POLICIES["dynamollm"], usd_per_gpu_hour=3.0, usd_per_kg_carbon=0.2))
    for n in range(20):
        load = {"ML": ClassLoad(40, 36_000, 16_800)}
        state = FleetState(5.0 * n, 5.0, (), load, GPUS, price_per_kwh=0.1, carbon_g_per_kwh=carbon_g_per_kwh)
        controller.decide(state)
    watts = 3.0 / usd_per_kwh * 1000.0  # that cost in an hour what a GPU does
    priced = [w.gpu / w.energy for w in asked if w != Weights()]  # partitions are compared without prices
    assert priced == [pytest.approx(watts)] * len(priced)
    assert priced
