"""One engine, by hand: what a person can follow with a pencil."""

from __future__ import annotations

import numpy as np
import pytest

from powerd.sim.cluster import Cluster, ClusterConfig, Requests
from powerd_policies.dynamollm.fleet import FleetPlan
from tests.sim.cluster.models import fleet, llama, patient, ran, toy

CONFIG = ClusterConfig(chunk_tokens=64, max_running=8)


def one(arrival_s: float, prompt: int, output: int) -> Requests:
    return Requests.of([arrival_s], [prompt], [output], patient())


def test_a_lone_request_takes_what_the_formula_says() -> None:
    cluster = ran(one(1.0, 100, 5))
    cluster.advance(10.0)
    seen = cluster.results()
    # 64 and 36 tokens of prompt, 5 ms fixed each; then 4 decodes of 11 ms.
    assert seen.ttft_s[0] == pytest.approx(2 * 0.005 + 100 * 1e-4)
    assert seen.finish_s[0] == pytest.approx(1.0 + 0.020 + 4 * 0.011)
    assert seen.tbt_p99_s[0] == pytest.approx(0.011)
    assert seen.energy_j[0] == pytest.approx(600 * 0.020 + (200 + 25) * 4 * 0.011)
    assert seen.idle_j == pytest.approx(100 * (10 - 0.064))
    assert seen.total_j == pytest.approx(seen.idle_j + seen.energy_j[0])
    assert seen.gpu_s == pytest.approx(10.0)
    assert seen.off_gpu_s == pytest.approx(30.0)
    assert seen.off_j == pytest.approx(30.0 * 70)


def test_one_token_has_no_gaps() -> None:
    cluster = ran(one(0.0, 10, 1))
    cluster.advance(1.0)
    seen = cluster.results()
    assert np.isnan(seen.tbt_p99_s[0])
    assert seen.ttft_s[0] == seen.finish_s[0] == pytest.approx(0.006)


def test_a_prompt_that_comes_later_stretches_the_gaps_of_those_that_decode() -> None:
    cluster = ran(Requests.of([0.0, 0.1], [10, 128], [200, 1], patient()))
    cluster.advance(10.0)
    seen = cluster.results()
    # Of 199 gaps three belong to chunks of 63, 63 and 2 prompt tokens; the second longest is the P99 by nearest rank.
    assert seen.tbt_p99_s[0] == pytest.approx(0.010 + 0.001 + 63 * 1e-4)
    alone = ran(Requests.of([0.0], [10], [200], patient()))
    alone.advance(10.0)
    assert seen.finish_s[0] - alone.results().finish_s[0] == pytest.approx(128 * 1e-4)


def test_a_clock_change_in_the_middle_costs_its_time_once_and_counts_as_a_gap() -> None:
    cluster = ran(one(0.0, 10, 50))
    cluster.advance(0.1)
    cluster.apply(fleet(("all-0", 1, 500)))
    cluster.apply(fleet(("all-0", 1, 500)))
    cluster.advance(10.0)
    seen = cluster.results()
    # 6 ms of prompt, decodes of 11 ms until 105 ms, the rest at half the clock: 20 + 1 ms, the first held up by 4.5 ms.
    before = 9
    assert seen.finish_s[0] == pytest.approx(0.006 + before * 0.011 + (49 - before) * 0.021 + 0.0045)
    assert seen.tbt_p99_s[0] == pytest.approx(0.021 + 0.0045)
    assert seen.counts["clock_sets"] == 1


def test_a_parked_engine_draws_less_and_needs_to_wake() -> None:
    config = ClusterConfig(chunk_tokens=64, max_running=8, park_after_s=0.5, park_clock_mhz=500, wake_s=0.02)
    cluster = ran(one(2.0, 10, 1), config)
    cluster.advance(1.0)
    assert cluster.state().power_w == pytest.approx(0.5 * 100 + 0.5 * 60)
    cluster.advance(3.0)
    seen = cluster.results()
    assert seen.ttft_s[0] == pytest.approx(0.02 + 0.006)
    assert seen.idle_j == pytest.approx(100 * 0.5 + 60 * 1.5 + 100 * 0.02 + 100 * 0.5 + 60 * (0.5 - 0.026))
    assert (seen.counts["parks"], seen.counts["wakes"]) == (2, 1)


def test_the_kv_cache_admits_no_more_than_fits_and_nobody_overtakes() -> None:
    """2000 tokens fit: two of 900, then a small one has to wait behind the third big one."""
    trace = Requests.of([0.0, 0.0, 0.0, 0.01], [180, 180, 180, 10], [720, 720, 720, 10], patient(100.0))
    cluster = ran(trace, ClusterConfig(chunk_tokens=512, max_running=8))
    most = 0.0
    for n in range(1, 400):
        cluster.advance(n * 0.1)
        load = cluster.state().instances[0].load
        most = max(most, load.kv_used_ratio or 0.0)
        assert load.running <= 2 or n > 80
    seen = cluster.results()
    assert most == pytest.approx(0.9)
    assert seen.ttft_s[2] > seen.finish_s[0]
    assert seen.ttft_s[3] + 0.01 >= seen.ttft_s[2] - 1e-9  # in one iteration, at best


def test_a_request_that_no_cache_can_hold_and_a_prompt_beyond_the_limit_are_rejected() -> None:
    cluster = ran(Requests.of([0.0, 0.5, 0.6], [201, 100, 100], [10, 1901, 10], patient()))
    cluster.advance(10.0)
    seen = cluster.results()
    assert list(seen.rejected) == [True, True, False]
    assert list(seen.finish_s[:2]) == [0.0, 0.5]
    assert np.isnan(seen.ttft_s[:2]).all()
    assert seen.counts["rejected_context"] == 2


def test_by_deadline_the_most_urgent_goes_first() -> None:
    """Long prompts were promised 2 s, short ones 0.25 s: once reordered, the last to come is the first to be served."""
    trace = Requests.of([0.0, 0.01, 0.02], [8000, 8000, 100], [1, 1, 1])
    plan = FleetPlan(fleet((None, 8, 1980)).instances, fleet().routes)
    found = {}
    for reordered in (frozenset[str](), frozenset({"all-0"})):
        cluster = Cluster(llama(), trace, gpus=8)
        cluster.apply(plan)
        cluster.advance(0.03)
        cluster.apply(FleetPlan(fleet(("all-0", 8, 1980)).instances, plan.routes, reordered=reordered))
        cluster.advance(10.0)
        found[bool(reordered)] = trace.arrival_s + cluster.results().ttft_s
    assert found[False][2] >= found[False][1] - 1e-9
    assert found[True][2] < found[True][1] - 0.5
    assert found[True][0] == found[False][0]  # what has begun goes on


def test_waiting_too_long_is_rejected_when_a_plan_says_so() -> None:
    trace = Requests.of([0.0, 0.01, 0.3], [8000, 8000, 100], [1, 1, 1])
    cluster = Cluster(llama(), trace, gpus=8)
    cluster.apply(fleet((None, 8, 1980)))
    cluster.advance(0.4)
    events = cluster.apply(FleetPlan(fleet(("all-0", 8, 1980)).instances, fleet().routes, shed={"all-0": 0.2}))
    assert [(e.kind, e.subject) for e in events if e.kind == "shed"] == [("shed", "all-0")]
    cluster.advance(10.0)
    seen = cluster.results()
    assert list(seen.rejected) == [False, True, False]
    assert seen.finish_s[1] == 0.4
    assert seen.counts["rejected_shed"] == 1


def test_what_is_not_done_at_the_end_is_unfinished_and_its_energy_is_counted() -> None:
    cluster = ran(one(0.0, 10, 100))
    cluster.advance(0.506)
    seen = cluster.results()
    assert np.isnan(seen.finish_s[0])
    assert np.isnan(seen.tbt_p99_s[0])
    assert seen.ttft_s[0] == pytest.approx(0.006)
    assert seen.counts["unfinished"] == 1
    assert seen.energy_j[0] == pytest.approx(600 * 0.006 + 225 * 0.5)
    with pytest.raises(RuntimeError, match="the run is over"):
        cluster.advance(1.0)


def test_the_load_is_what_an_engines_metrics_say() -> None:
    cluster = ran(Requests.of([0.0, 0.001, 0.5], [50, 200, 200], [100, 100, 100], patient(10.0)))
    cluster.advance(0.512)
    load = cluster.state().instances[0].load
    assert (load.running, load.queued, load.queued_prompt_tokens) == (2, 1, 200)
    assert load.oldest_wait_s == pytest.approx(0.012)
    assert load.kv_used_ratio == pytest.approx((150 + 300 + 300) / 2000)
    assert load.requests_per_s == pytest.approx(2 / 0.512)
    assert load.prompt_tokens_per_s == pytest.approx(250 / 0.512)
    assert load.ttft_p99_s is not None
    cluster.advance(1.0)
    load = cluster.state().instances[0].load
    assert load.requests_per_s == pytest.approx(1 / 0.488)
    assert (load.running, load.queued, load.queued_prompt_tokens) == (3, 0, 0)
    cluster.advance(60.0)
    load = cluster.state().instances[0].load
    assert (load.ttft_p99_s, load.tbt_p99_s) == (None, None)  # nothing in the last 30 s


def test_arrivals_are_told_once_by_predicted_class() -> None:
    trace = Requests.of([0.0, 1.0, 2.0], [10, 100, 10], [5, 15, 40], patient(), predicted_tokens=[5, 40, 40])
    cluster = ran(trace)
    cluster.advance(1.5)
    first = cluster.state()
    assert first.window_s == 1.5
    told = {name: load for name, load in first.arrivals.items() if load.requests}
    assert {name: (load.requests, load.prompt_tokens, load.output_tokens) for name, load in told.items()} == {
        "SS": (1, 10, 5),
        "LL": (1, 100, 40),
    }
    cluster.advance(2.0)
    assert [name for name, load in cluster.state().arrivals.items() if load.requests] == ["SL"]


def test_the_power_of_a_tick_is_the_energy_in_it() -> None:
    cluster = Cluster(toy(), one(0.25, 10, 1), patient(), ClusterConfig(tick_s=0.5), gpus=2)
    cluster.apply(fleet((None, 1, 1000)))
    cluster.advance(1.25)
    seen = cluster.results()
    assert list(seen.power_w) == pytest.approx([(100 * 0.494 + 600 * 0.006) / 0.5, 100.0, 100.0])
    assert list(seen.gpus_on) == pytest.approx([1.0, 1.0, 1.0])
