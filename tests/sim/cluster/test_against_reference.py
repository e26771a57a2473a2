"""The core, which jumps, against the plain simulator, which does not: same requests, same plans, same seconds and joules."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from powerd.sim.cluster import Cluster, ClusterConfig, Requests
from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.fleet import FleetPlan, InstanceWant, Role
from powerd_policies.dynamollm.phases import Links
from tests.sim.cluster.models import patient, toy
from tests.sim.cluster.reference import Reference
from tests.sim.cluster.reference_parts import p99_s


@dataclass(frozen=True)
class Step:
    """One plan: ``clocks`` of the instances so far (None: left out, so drained), how many new ones, and what queues are asked."""

    after_ms: int
    clocks: tuple[int | None, ...]
    new: int = 0
    reorder: frozenset[int] = frozenset()
    resteer: frozenset[int] = frozenset()
    shed_ms: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Case:
    requests: tuple[tuple[int, int, int, int], ...]  # ms since the last one, prompt and output tokens, class
    first: tuple[tuple[int, int, int], ...]  # TP, MHz, pool
    steps: tuple[Step, ...]
    config: ClusterConfig
    ttft_s: float = 0.05
    roles: tuple[Role, ...] = ()  # of the instances in the order of their start; beyond: both
    kv_tokens: int = 2000  # of TP1; TP2 has twice as much and a half


MAX_INSTANCES = 4
clock = st.sampled_from([1000, 500])
which = st.frozensets(st.integers(0, MAX_INSTANCES - 1), max_size=2)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    long = draw(st.booleans())
    answer = st.integers(1, 250 if long else 30)
    request = st.tuples(st.integers(0, 80), st.integers(1, 210), answer, st.integers(0, 8))
    requests = tuple(draw(st.lists(request, min_size=1, max_size=12 if long else 25)))
    first = tuple(draw(st.lists(st.tuples(st.sampled_from([1, 2]), clock, st.integers(0, 1)), min_size=1, max_size=2)))
    steps = []
    for drains in draw(st.lists(st.booleans(), max_size=4)):
        wanted: st.SearchStrategy[int | None] = st.one_of(st.none(), clock) if drains else clock
        steps.append(
            Step(
                draw(st.integers(1, 400)),
                tuple(draw(st.lists(wanted, min_size=MAX_INSTANCES, max_size=MAX_INSTANCES))),
                0 if drains else draw(st.integers(0, 1)),
                draw(which),
                draw(which),
                tuple(draw(st.dictionaries(st.integers(0, 3), st.integers(0, 300), max_size=2)).items()),
            )
        )
    config = ClusterConfig(
        chunk_tokens=draw(st.sampled_from([9, 32, 64])), max_running=draw(st.sampled_from([1, 2, 8])),
        start_s=draw(st.sampled_from([0.0, 0.02, 0.3])), clock_set_s=draw(st.sampled_from([0.0, 0.0045])),
        park_after_s=draw(st.sampled_from([None, 0.0, 0.05])), park_clock_mhz=draw(st.sampled_from([None, 1000])),
        wake_s=draw(st.sampled_from([0.0, 0.007])), tick_s=0.05,
        chunk_by_tp=draw(st.sampled_from([{}, {2: 20}])),
    )  # fmt: skip
    return Case(requests, first, tuple(steps), config, draw(st.sampled_from([0.02, 0.05, 0.5])))


@st.composite
def cases_apart(draw: st.DrawFn) -> Case:
    """The same with instances of one phase, slow links and little KV cache."""
    case = draw(cases())
    both = (2, 1000, draw(st.integers(0, 1)))
    first = (*case.first, both, both)[: draw(st.integers(2, 4))]
    role: st.SearchStrategy[Role] = st.sampled_from(["prefill", "decode", "both"])
    roles = draw(st.lists(role, min_size=8, max_size=8))
    links = draw(st.sampled_from([Links(1e6, 1e10, 0.0), Links(1e6, 1e9, 0.005), Links(0.0, 1e9, 0.0), Links(1e6, 1e8, 0.0)]))
    return replace(
        case, first=first, roles=("prefill", "decode", *roles), kv_tokens=draw(st.sampled_from([300, 600, 2000])),
        config=replace(case.config, links=links),
    )  # fmt: skip


def trace(case: Case) -> Requests:
    gaps, prompts, outputs, classes = zip(*case.requests, strict=True)
    kinds = np.asarray(classes, dtype=np.uint8)
    return Requests(np.cumsum(gaps) / 1000.0, np.asarray(prompts), np.asarray(outputs), kinds, kinds)


def plans(case: Case) -> list[tuple[float, FleetPlan]]:
    """When, and what is wanted then; an instance that was left out once is not asked for again."""

    def role(number: int) -> Role:
        return case.roles[number] if number < len(case.roles) else "both"

    routes = {name: ("a", "b") if n % 2 else ("b", "a") for n, name in enumerate(NAMES)}
    alive = {f"{'ab'[pool]}-{n}": (tp, "ab"[pool], role(n)) for n, (tp, _, pool) in enumerate(case.first)}
    begin = tuple(InstanceWant(None, "ab"[pool], tp, mhz, role(n)) for n, (tp, mhz, pool) in enumerate(case.first))
    found = [(0.0, FleetPlan(begin, routes))]
    at_ms = 0
    for step in case.steps:
        at_ms += step.after_ms
        names = list(alive)
        wants = []
        for name, mhz in zip(names, step.clocks, strict=False):
            if mhz is None:
                del alive[name]
            else:
                wants.append(InstanceWant(name, alive[name][1], alive[name][0], mhz, alive[name][2]))
        kept = list(alive)
        for _ in range(min(step.new, MAX_INSTANCES - len(alive))):
            number = len(case.first) + sum(want.id is None for _, plan in found[1:] for want in plan.instances)
            alive[f"a-{number}"] = (1, "a", role(number))
            wants.append(InstanceWant(None, "a", 1, 1000, role(number)))
        found.append(
            (
                at_ms / 1000.0,
                FleetPlan(
                    tuple(wants), routes,
                    reordered=frozenset(kept[n] for n in step.reorder if n < len(kept)),
                    resteered=frozenset(kept[n] for n in step.resteer if n < len(kept)),
                    shed={kept[n]: age / 1000.0 for n, age in step.shed_ms if n < len(kept)},
                ),
            )
        )  # fmt: skip
    return found


def near(got: float, expected: float) -> bool:
    return (math.isnan(got) and math.isnan(expected)) or math.isclose(got, expected, rel_tol=1e-9, abs_tol=1e-9)


def compare(case: Case, end_s: float, look_s: float | None = None) -> None:
    """Run both; with ``look_s`` the core is looked at that often in between, which must change nothing."""
    requests = trace(case)
    model = replace(toy(), kv_tokens={1: case.kv_tokens, 2: case.kv_tokens * 5 // 2})
    cluster = Cluster(model, requests, patient(case.ttft_s), case.config, gpus=16)
    plain = Reference(model, requests, patient(case.ttft_s), case.config)
    for at_s, plan in plans(case):
        while look_s is not None and cluster.now_s + look_s < at_s:
            cluster.advance(cluster.now_s + look_s)
            assert all((instance.load.kv_used_ratio or 0.0) <= 1.0 for instance in cluster.state().instances)
        cluster.advance(at_s)
        plain.advance(at_s)
        cluster.apply(plan)
        plain.apply(plan)
    cluster.advance(end_s)
    plain.advance(end_s)
    plain.close()
    seen = cluster.results()
    for request in plain.requests:
        n = request.number
        first_s = math.nan if request.first is None else (request.first - request.arrival) / 1e9
        gap_s = p99_s(request.gaps) if request.finish is not None and not request.rejected else math.nan
        assert near(seen.ttft_s[n], first_s), (n, "TTFT", seen.ttft_s[n], first_s)
        assert near(seen.tbt_p99_s[n], gap_s), (n, "TBT", seen.tbt_p99_s[n], gap_s)
        assert near(seen.finish_s[n], math.nan if request.finish is None else request.finish / 1e9), n
        assert near(seen.energy_j[n], request.joules), (n, "energy", seen.energy_j[n], request.joules)
        assert bool(seen.rejected[n]) == request.rejected, n
        assert int(seen.instance[n]) == request.instance, n
    assert plain.most_kv <= 1.0
    assert near(seen.total_j, plain.total_j)
    assert near(seen.idle_j, plain.idle_j)
    assert near(seen.gpu_s, plain.gpu_s)
    assert seen.counts["wakes"] == plain.wakes
    # Conservation: of energy, over requests and over time; of requests.
    assert near(float(seen.energy_j.sum()) + seen.idle_j, seen.total_j)
    edges_s = np.minimum(np.arange(len(seen.power_w) + 1) * seen.tick_s, seen.end_s)
    spans_s = np.diff(edges_s)
    assert edges_s[-1] == seen.end_s
    assert near(float(np.dot(seen.power_w, spans_s)), seen.total_j)
    assert near(float(np.dot(seen.gpus_on, spans_s)), seen.gpu_s)
    finished = int(seen.finished.sum())
    assert finished == seen.counts["finished"]
    assert finished + seen.counts["rejected"] + seen.counts["unfinished"] == len(requests)


BUSY = Case(
    tuple((10, 50, 150, n % 9) for n in range(12)),
    ((1, 1000, 0), (2, 500, 1)),
    (Step(100, (500, 1000, None, None)), Step(200, (None, 1000, None, None)), Step(100, (1000, 1000, 1000, 1000), new=1)),
    ClusterConfig(chunk_tokens=64, max_running=8, start_s=0.02, park_after_s=0.05),
)


@settings(max_examples=150, deadline=None)
@given(cases())
@example(BUSY)
def test_core_and_reference_agree_when_all_is_done(case: Case) -> None:
    compare(case, 60.0)


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 3000), st.sampled_from([None, 0.0123, 0.05]))
@example(BUSY, 333, 0.0123)
def test_core_and_reference_agree_in_the_middle_however_often_one_looks(case: Case, more_ms: int, look_s: float | None) -> None:
    compare(case, plans(case)[-1][0] + more_ms / 1000.0, look_s)


@settings(max_examples=80, deadline=None)
@given(cases_apart(), st.integers(0, 3000), st.sampled_from([None, 0.0123]))
def test_core_and_reference_agree_where_phases_are_apart(case: Case, more_ms: int, look_s: float | None) -> None:
    compare(case, plans(case)[-1][0] + more_ms / 1000.0, look_s)
    compare(case, 60.0)
