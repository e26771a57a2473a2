"""Instances that only prefill and instances that only decode: what a request feels of it, and that none is ever lost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerd.sim.cluster import Cluster, ClusterConfig, Requests, Results
from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import FleetPlan, InstanceWant, Role
from powerd_policies.dynamollm.phases import Links
from tests.sim.cluster.models import EVERYONE, patient, toy
from tests.sim.cluster.test_against_reference import Case, cases_apart, plans, trace

LINKS = Links(bytes_per_token=1e6, bytes_per_s=1e9, fixed_s=0.005)  # a prompt of 50 tokens takes 55 ms
CONFIG = ClusterConfig(chunk_tokens=64, max_running=8, start_s=0.5, links=LINKS)


def plan(*wants: tuple[str | None, Role] | tuple[str | None, Role, int]) -> FleetPlan:
    """One pool of TP1 instances: (id, role, MHz or 1000)."""
    full = [(want[0], want[1], want[2] if len(want) > 2 else 1000) for want in wants]
    return FleetPlan(tuple(InstanceWant(name, "all", 1, int(mhz), role) for name, role, mhz in full), EVERYONE)


def begun(requests: Requests, first: FleetPlan, config: ClusterConfig = CONFIG, model: EngineModel | None = None) -> Cluster:
    cluster = Cluster(model or toy(), requests, patient(), config, 8)
    cluster.apply(first)
    return cluster


def steady(count: int, every_s: float, prompt: int = 50, output: int = 20) -> Requests:
    return Requests.of(np.arange(count) * every_s, [prompt] * count, [output] * count, patient())


def whole(results: Results, count: int) -> None:
    """Every request has exactly one end, and every joule a place."""
    counts = results.counts
    assert counts["finished"] + counts["rejected"] + counts["unfinished"] == count
    assert float(results.energy_j.sum()) + results.idle_j == pytest.approx(results.total_j, rel=1e-12)


def test_the_way_of_the_kv_cache_is_in_the_gap_before_the_second_token_and_not_in_the_ttft() -> None:
    cluster = begun(steady(1, 1.0, output=10), plan((None, "prefill"), (None, "decode", 500)))
    cluster.advance(5.0)
    seen = cluster.results()
    assert seen.ttft_s[0] == pytest.approx(0.005 + 50 * 1e-4)  # as alone on an instance, at the clock of prefill
    assert seen.tbt_p99_s[0] == pytest.approx(0.055 + 0.021)  # the move, and an iteration at the clock of decode
    assert seen.finish_s[0] == pytest.approx(0.01 + 0.055 + 9 * 0.021)
    assert seen.counts["moves"] == 1
    assert seen.instances[seen.instance[0]] == "all-1"
    whole(seen, 1)


def test_one_long_gap_is_not_the_p99_of_a_long_answer() -> None:
    """201 gaps: the third longest counts. The other answer leaves after two iterations of 12 ms, so the rest are of 11 ms."""
    cluster = begun(Requests.of([0.0, 0.0], [30, 30], [202, 3], patient()), plan((None, "prefill"), (None, "decode")))
    cluster.advance(5.0)
    seen = cluster.results()
    assert seen.tbt_p99_s[0] == pytest.approx(0.011)
    assert seen.tbt_p99_s[1] == pytest.approx(0.035 + 0.012)


def test_an_answer_of_one_token_never_moves() -> None:
    cluster = begun(steady(5, 0.1, output=1), plan((None, "prefill"), (None, "decode")))
    cluster.advance(5.0)
    seen = cluster.results()
    assert seen.finished.all()
    assert seen.counts["moves"] == 0
    assert set(seen.instance) == {0}


def test_neither_side_takes_more_than_its_kv_cache_holds_and_all_are_served() -> None:
    model = replace(toy(), kv_tokens={1: 200, 2: 500})
    cluster = begun(steady(60, 0.01, 60, 30), plan((None, "prefill"), (None, "decode"), (None, "decode")), model=model)
    used: dict[Role, float] = {"prefill": 0.0, "decode": 0.0}
    while cluster.now_s < 30:
        cluster.advance(cluster.now_s + 0.003)
        for instance in cluster.state().instances:
            used[instance.role] = max(used[instance.role], instance.load.kv_used_ratio or 0.0)
    seen = cluster.results()
    assert used["prefill"] == 0.9, "three prompts of 60 tokens; a fourth waits until one has left"
    assert used["decode"] == 0.9, "two of 60 + 30 tokens"
    assert seen.counts["move_waits"] > 0
    assert seen.finished.all()
    whole(seen, 60)


def test_who_can_be_held_nowhere_is_refused_and_blocks_nobody() -> None:
    model = replace(toy(), kv_tokens={1: 200, 2: 500})
    trace = Requests.of(np.arange(4) * 0.01, [50, 150, 50, 50], [20, 60, 20, 20], patient())
    cluster = begun(trace, plan((None, "prefill"), (None, "decode")), model=model)
    cluster.advance(10.0)
    seen = cluster.results()
    assert list(seen.rejected) == [False, True, False, False]
    assert seen.counts["rejected_context"] == 1
    assert seen.counts["finished"] == 3
    whole(seen, 4)


def test_first_tokens_come_before_there_is_anybody_to_decode() -> None:
    cluster = begun(steady(5, 0.1), plan((None, "prefill")))
    cluster.advance(2.0)
    (waiting,) = cluster.state().instances
    assert waiting.load.kv_used_ratio == 5 * 50 / 2000, "the KV caches wait where they were made"
    cluster.apply(plan(("all-0", "prefill"), (None, "decode")))
    cluster.advance(10.0)
    assert cluster.state().instances[0].load.kv_used_ratio == 0.0
    seen = cluster.results()
    assert (seen.ttft_s < 0.03).all()
    assert seen.tbt_p99_s.min() > 2.0
    assert seen.finished.all()
    assert seen.counts["move_waits"] == 5


def test_kv_caches_stay_within_their_pool() -> None:
    wants = [InstanceWant(None, pool, 1, 1000, role) for pool in "ab" for role in ("prefill", "decode")]
    trace = steady(20, 0.02)
    cluster = Cluster(toy(), trace, patient(), CONFIG, 8)
    cluster.apply(FleetPlan(tuple(wants), dict.fromkeys(NAMES, ("b",))))
    cluster.advance(10.0)
    seen = cluster.results()
    assert {seen.instances[n] for n in seen.instance} == {"b-3"}


@pytest.mark.parametrize("leaves", ["prefill", "decode"])
def test_a_drained_instance_of_either_side_loses_nothing(leaves: str) -> None:
    trace = steady(200, 0.02)
    everyone: list[tuple[str, Role]] = [("all-0", "prefill"), ("all-1", "prefill"), ("all-2", "decode"), ("all-3", "decode")]
    cluster = begun(trace, plan(*[(None, role) for _, role in everyone]))
    cluster.advance(1.0)
    name = "all-1" if leaves == "prefill" else "all-3"
    cluster.apply(plan(*[each for each in everyone if each[0] != name]))
    assert {i.phase for i in cluster.state().instances if i.id == name} == {"draining"}
    cluster.advance(60.0)
    assert name not in [i.id for i in cluster.state().instances]
    seen = cluster.results()
    assert seen.finished.all()
    assert seen.counts["moves"] == 200
    assert seen.counts["stops"] == 1
    if leaves == "decode":
        assert seen.finish_s[seen.instance == 3].max() < 2.0
    whole(seen, 200)


def test_a_prefill_instance_that_is_cut_off_takes_with_it_what_it_holds_and_no_more() -> None:
    trace = steady(100, 0.02)
    first = plan((None, "prefill"), (None, "prefill"), (None, "decode"))
    cluster = begun(trace, first, replace(CONFIG, drain_limit_s=0.01, max_running=2))
    cluster.advance(1.0)
    cluster.apply(plan(("all-0", "prefill"), ("all-2", "decode")))
    cluster.advance(60.0)
    seen = cluster.results()
    lost = np.flatnonzero(seen.rejected)
    assert 0 < len(lost) == seen.counts["rejected_cut"]
    assert set(seen.finish_s[lost]) == {1.01}
    assert seen.counts["unfinished"] == 0, "the places that were kept for them at the other side are free again"
    whole(seen, 100)


def test_what_was_on_its_way_to_a_decode_instance_that_is_cut_off_goes_to_another() -> None:
    slow = replace(CONFIG, drain_limit_s=0.01, links=replace(LINKS, fixed_s=0.5))
    trace = steady(40, 0.05)
    cluster = begun(trace, plan((None, "prefill"), (None, "decode"), (None, "decode")), slow)
    cluster.advance(0.5)  # the first KV caches are still on their way
    cluster.apply(plan(("all-0", "prefill"), ("all-1", "decode")))
    cluster.advance(60.0)
    seen = cluster.results()
    assert seen.finished.all()
    assert seen.counts["moves"] > 40, "some set off twice"
    assert set(seen.instance) == {1}
    late = cluster_with_running(slow)
    whole(late, 40)
    assert 0 < late.counts["rejected_cut"] < 20, "what decoded there is lost"
    assert late.counts["unfinished"] == 0


def cluster_with_running(config: ClusterConfig) -> Results:
    """The same, later: some already decode at the instance that is cut off."""
    cluster = begun(steady(40, 0.05, output=100), plan((None, "prefill"), (None, "decode"), (None, "decode")), config)
    cluster.advance(1.5)
    cluster.apply(plan(("all-0", "prefill"), ("all-1", "decode")))
    cluster.advance(60.0)
    return cluster.results()


def mixed_run(config: ClusterConfig, *more: InstanceWant) -> bytes:
    random = np.random.default_rng(3)
    trace = Requests.of(
        np.sort(random.uniform(0, 20, 400)), random.integers(1, 200, 400), random.integers(1, 100, 400), patient()
    )  # fmt: skip
    cluster = Cluster(toy(), trace, patient(), config, 8)
    cluster.apply(FleetPlan((*(InstanceWant(None, "all", tp, 1000) for tp in (1, 1, 2)), *more), EVERYONE))
    for second in range(1, 60):
        cluster.advance(second)
        wants = [InstanceWant(i.id, i.pool, i.tp, (1000, 500)[second % 2], i.role) for i in cluster.state().instances]
        cluster.apply(FleetPlan(tuple(wants), EVERYONE))
    seen = cluster.results()
    arrays = (seen.ttft_s, seen.tbt_p99_s, seen.finish_s, seen.energy_j, seen.rejected, seen.instance)
    return b"".join(array.tobytes() for array in arrays)


def test_mixed_instances_are_the_same_to_the_byte_with_or_without_others_beside_them() -> None:
    alone = mixed_run(CONFIG)
    assert mixed_run(replace(CONFIG, links=Links(1.0, 1.0, 9.0))) == alone
    assert mixed_run(CONFIG, *(InstanceWant(None, "far", 1, 1000, role) for role in ("prefill", "decode"))) == alone


@settings(max_examples=60, deadline=None)
@given(cases_apart(), st.sampled_from([0.0, 0.03, 0.3]))
def test_no_request_is_lost_whatever_is_cut_off(case: Case, drain_limit_s: float) -> None:
    """Random plans whose drains have an end; at last one instance that does both is there for whoever still waits."""
    requests = trace(case)
    model = replace(toy(), kv_tokens={1: case.kv_tokens, 2: 2 * case.kv_tokens})
    cluster = Cluster(model, requests, patient(), replace(case.config, drain_limit_s=drain_limit_s), 16)
    for at_s, wanted in plans(case):
        cluster.advance(at_s)
        cluster.apply(wanted)
    cluster.apply(FleetPlan((InstanceWant(None, "last", 2, 1000),), dict.fromkeys(NAMES, ("last",))))
    cluster.advance(120.0)
    (last,) = cluster.state().instances
    assert last.load.kv_used_ratio == 0.0
    seen = cluster.results()
    assert seen.counts["unfinished"] == 0, "it is finished, or rejected and said so"
    whole(seen, len(requests))
