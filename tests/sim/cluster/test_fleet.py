"""A fleet that changes: starts, drains, re-shards, routes; what a plan may not ask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from powerd.sim.cluster import Cluster, ClusterConfig, PlanError, Requests
from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.fleet import FleetEvent, FleetPlan, InstanceWant
from tests.sim.cluster.models import EVERYONE, fleet, llama, patient, toy

CONFIG = ClusterConfig(chunk_tokens=64, max_running=8, start_s=3.0, reshard_s=0.5)


def steady(count: int, every_s: float, prompt: int = 50, output: int = 50) -> Requests:
    return Requests.of(np.arange(count) * every_s, [prompt] * count, [output] * count, patient())


def begun(requests: Requests, *wants: tuple[str | None, int, int], gpus: int = 8, **config: Any) -> Cluster:
    cluster = Cluster(toy(), requests, patient(), replace(CONFIG, **config), gpus)
    cluster.apply(fleet(*wants))
    return cluster


def kinds(events: tuple[FleetEvent, ...]) -> list[tuple[str, str]]:
    return [(event.kind, event.subject) for event in events]


def test_the_first_fleet_serves_at_once_unless_it_is_to_start_cold() -> None:
    warm = begun(steady(1, 1.0), (None, 1, 1000))
    assert warm.state().instances[0].phase == "serving"
    cold = Cluster(toy(), steady(1, 1.0), patient(), replace(CONFIG, warm_begin=False), 8)
    cold.apply(fleet((None, 1, 1000)))
    instance = cold.state().instances[0]
    assert (instance.phase, instance.ready_s) == ("starting", 3.0)
    cold.advance(10.0)
    seen = cold.results()
    assert seen.ttft_s[0] == pytest.approx(3.0 + 0.005 + 50 * 1e-4)  # it waited outside
    assert seen.counts["waited"] == 1


def test_a_new_instance_has_gpus_and_draws_before_it_serves() -> None:
    cluster = begun(steady(40, 0.25), (None, 1, 1000))
    cluster.advance(1.0)
    events = cluster.apply(fleet(("all-0", 1, 1000), (None, 2, 500)))
    assert ("start", "all-1") in kinds(events)
    cluster.advance(2.0)
    assert [i.phase for i in cluster.state().instances] == ["serving", "starting"]
    cluster.advance(4.0)
    assert [i.phase for i in cluster.state().instances] == ["serving", "serving"]
    cluster.advance(20.0)
    seen = cluster.results()
    arrived_at = np.asarray(steady(40, 0.25).arrival_s)
    assert set(seen.instance[arrived_at < 4.0]) == {0}
    assert 1 in set(seen.instance[arrived_at > 4.0])
    assert list(seen.gpus_on) == pytest.approx([1.0] + [3.0] * 19)
    alone = begun(steady(40, 0.25), (None, 1, 1000))
    alone.advance(20.0)
    assert list(seen.power_w[1:4]) == pytest.approx(list(alone.results().power_w[1:4] + 2 * 60))  # two idle GPUs at half clock


def test_a_drained_instance_gets_nothing_more_and_loses_nothing() -> None:
    trace = steady(200, 0.05)
    cluster = begun(trace, (None, 1, 1000), (None, 1, 1000))
    cluster.advance(5.0)
    events = cluster.apply(fleet(("all-0", 1, 1000)))
    assert kinds(events)[-1] == ("drain", "all-1")
    assert [i.phase for i in cluster.state().instances] == ["serving", "draining"]
    cluster.advance(60.0)
    assert [i.id for i in cluster.state().instances] == ["all-0"]
    assert kinds(cluster.apply(fleet(("all-0", 1, 1000)))) == [("stop", "all-1")]
    seen = cluster.results()
    assert seen.finished.all()
    at_second = seen.instance == 1
    assert trace.arrival_s[at_second].max() <= 5.0
    last_s = seen.finish_s[at_second].max()
    assert last_s > 5.0
    assert seen.gpu_s == pytest.approx(60.0 + last_s)  # its GPU is off from then on


def test_a_drained_instance_that_is_named_again_serves_again() -> None:
    cluster = begun(steady(100, 0.05), (None, 1, 1000), (None, 1, 1000))
    cluster.advance(2.0)
    cluster.apply(fleet(("all-0", 1, 1000)))
    assert ("keep", "all-1") in kinds(cluster.apply(fleet(("all-0", 1, 1000), ("all-1", 1, 1000))))
    cluster.advance(30.0)
    seen = cluster.results()
    assert seen.instance[-10:].max() == 1
    assert seen.finished.all()


def test_a_drain_that_takes_too_long_is_cut_off() -> None:
    cluster = begun(steady(20, 0.01, output=400), (None, 1, 1000), (None, 1, 1000), drain_limit_s=1.0)
    cluster.advance(0.5)
    cluster.apply(fleet(("all-0", 1, 1000)))
    cluster.advance(60.0)
    seen = cluster.results()
    cut = np.flatnonzero(seen.rejected)
    assert len(cut) == seen.counts["rejected_cut"] > 0
    assert set(seen.finish_s[cut]) == {1.5}
    assert seen.counts["resteered"] > 0  # what had not begun went to the other one
    assert seen.counts["finished"] + len(cut) == 20
    assert float(seen.energy_j.sum()) + seen.idle_j == pytest.approx(seen.total_j, rel=1e-12)


def test_a_reshard_waits_for_the_gpus_that_it_takes_and_is_quick_then() -> None:
    cluster = begun(steady(30, 0.1), (None, 2, 1000), (None, 1, 1000), gpus=3)
    cluster.advance(1.0)
    cluster.apply(fleet(("all-1", 1, 1000), (None, 1, 1000), (None, 1, 1000)))
    waiting = [i for i in cluster.state().instances if i.phase == "starting"]
    assert [i.ready_s for i in waiting] == [None, None]
    assert [i.phase for i in cluster.state().instances] == ["draining", "serving", "starting", "starting"]
    events: list[FleetEvent] = []
    for n in range(1, 40):
        cluster.advance(1.0 + n * 0.1)
        now = {i.id: i for i in cluster.state().instances}
        wants = tuple((name, i.tp, i.clock_mhz) for name, i in now.items() if name != "all-0")
        events += cluster.apply(fleet(*wants))
    assert {i.id: i.phase for i in cluster.state().instances} == dict.fromkeys(("all-1", "all-2", "all-3"), "serving")
    stopped = next(event for event in events if event.kind == "stop")
    assert [(e.subject, e.at_s) for e in events if e.kind == "reshard"] == [("all-2", stopped.at_s), ("all-3", stopped.at_s)]
    seen = cluster.results()
    assert (seen.counts["starts"], seen.counts["reshards"], seen.counts["stops"]) == (2, 2, 1)
    assert seen.gpu_s == pytest.approx(3 * seen.end_s)  # never a GPU off, never one too many


def test_gpus_that_wait_for_others_of_their_new_instance_stay_on() -> None:
    """Two TP1 become one TP2: the one that is empty first waits for the other with its weights loaded."""
    cluster = begun(Requests.of([0.0], [50], [100], patient()), (None, 1, 1000), (None, 1, 500), gpus=2)
    cluster.apply(fleet((None, 2, 1000)))
    cluster.advance(20.0)
    seen = cluster.results()
    assert seen.counts["reshards"] == 1
    assert seen.gpu_s == pytest.approx(40.0)
    ended_s = 0.01 + 99 * 0.011
    assert seen.finish_s[0] == pytest.approx(ended_s)
    assert seen.idle_j == pytest.approx(60 * ended_s + 2 * 100 * (20 - ended_s))
    assert float(seen.energy_j.sum()) + seen.idle_j == pytest.approx(seen.total_j, rel=1e-12)


def test_new_instances_without_a_drain_start_cold_and_wait_for_free_gpus() -> None:
    cluster = begun(steady(100, 0.02, output=400), (None, 2, 1000), gpus=2)
    cluster.advance(1.0)
    cluster.apply(FleetPlan((), EVERYONE))  # drains, and frees its GPUs a while later
    cluster.apply(fleet((None, 2, 1000)))
    assert [i.ready_s for i in cluster.state().instances if i.phase == "starting"] == [None]
    cluster.advance(300.0)
    seen = cluster.results()
    assert seen.counts["starts"] == 2
    stop_s = seen.finish_s[seen.instance == 0].max()
    assert seen.ttft_s[-1] + 99 * 0.02 > stop_s + 3.0
    assert seen.finished.all()


def test_waiting_and_starting_instances_can_be_taken_back() -> None:
    cluster = begun(steady(20, 0.1), (None, 1, 1000), gpus=2)
    cluster.advance(0.5)
    cluster.apply(fleet(("all-0", 1, 1000), (None, 1, 1000)))
    cluster.advance(1.0)
    assert kinds(cluster.apply(fleet(("all-0", 1, 1000)))) == [("drain", "all-1"), ("stop", "all-1")]
    cluster.apply(FleetPlan((), EVERYONE))
    cluster.apply(fleet((None, 2, 1000)))
    assert ("cancel", "all-2") in kinds(cluster.apply(FleetPlan((), EVERYONE)))
    cluster.advance(10.0)
    assert cluster.state().instances == ()
    seen = cluster.results()
    assert seen.counts["unfinished"] == 20 - seen.counts["finished"]
    assert seen.counts["unfinished"] > 0


def test_waiting_requests_go_elsewhere_when_a_plan_says_so() -> None:
    cluster = begun(steady(30, 0.001, output=300), (None, 1, 1000))
    cluster.advance(0.5)
    cluster.apply(fleet(("all-0", 1, 1000), (None, 1, 1000)))
    cluster.advance(3.6)
    both = fleet(("all-0", 1, 1000), ("all-1", 1, 1000))
    cluster.apply(FleetPlan(both.instances, both.routes, resteered=frozenset({"all-0"})))
    cluster.advance(200.0)
    seen = cluster.results()
    assert seen.finished.all()
    assert seen.counts["resteered"] == (seen.instance == 1).sum() > 0


def test_a_route_spills_over_to_the_next_pool_when_the_first_is_too_slow() -> None:
    near, far = InstanceWant(None, "near", 1, 1000), InstanceWant(None, "far", 1, 1000)
    trace = Requests.of([0.0] * 12, [200] * 12, [1] * 12, patient(0.05))
    cluster = Cluster(toy(), trace, patient(0.05), CONFIG, 8)
    cluster.apply(FleetPlan((far, near), dict.fromkeys(NAMES, ("near", "nowhere", "far"))))
    cluster.advance(5.0)
    seen = cluster.results()
    names = [seen.instances[n].split("-")[0] for n in seen.instance]
    # 200 tokens are 4 iterations and 40 ms; two of them are 75 ms, too late. Then the one with the least to wait.
    assert names[:4] == ["near", "far", "near", "far"] or names[:4] == ["near", "far", "far", "near"]
    assert names.count("near") == names.count("far") == 6


def test_a_class_without_a_route_waits_until_it_has_one() -> None:
    cluster = Cluster(toy(), steady(1, 1.0), patient(), CONFIG, 8)
    cluster.apply(FleetPlan((InstanceWant(None, "all", 1, 1000),), {"SS": ("all",)}))
    cluster.advance(2.0)
    cluster.apply(fleet(("all-0", 1, 1000)))
    cluster.advance(10.0)
    assert cluster.results().ttft_s[0] == pytest.approx(2.0 + 0.01)


def test_a_plan_that_cannot_be_is_refused_whole() -> None:
    cluster = begun(steady(20, 0.1), (None, 1, 1000), gpus=4)
    cluster.advance(1.0)
    before = cluster.state().instances
    wrong = [
        (fleet(("all-0", 1, 1000), (None, 2, 1000), (None, 2, 1000)), "needs 5 GPUs, there are 4"),
        (fleet((None, 4, 1000)), r"no figures for TP4 at 1000 MHz; the model of toy on paper holds TP 1, 2"),
        (fleet(("all-0", 1, 1234)), r"all-0: no figures for TP1 at 1234 MHz; .* holds TP1 at 1000, 500 MHz"),
        (fleet(("all-7", 1, 1000)), "all-7: there has never been"),
        (fleet(("all-0", 2, 1000)), "all-0 has TP1, it cannot become TP2"),
        (fleet(("all-0", 1, 1000), ("all-0", 1, 500)), "all-0 is named twice"),
        (FleetPlan((), {"XX": ("all",)}), "'XX', which is no class"),
        (FleetPlan((), EVERYONE, shed={"all-9": 1.0}), "all-9: there has never been"),
        (FleetPlan((InstanceWant("all-0", "all", 1, 1000, "prefill"),), EVERYONE), "'both', it cannot become 'prefill'"),
    ]
    for plan, message in wrong:
        with pytest.raises(PlanError, match=message):
            cluster.apply(plan)
    assert [(i.id, i.phase, i.clock_mhz) for i in cluster.state().instances] == [(i.id, i.phase, i.clock_mhz) for i in before]
    cluster.advance(10.0)
    assert cluster.results().finished.all()


def test_an_instance_that_has_ended_is_told_not_started() -> None:
    cluster = begun(steady(1, 1.0), (None, 1, 1000), (None, 1, 1000))
    cluster.advance(0.5)
    cluster.apply(fleet(("all-0", 1, 1000)))
    assert kinds(cluster.apply(fleet(("all-0", 1, 1000), ("all-1", 1, 1000)))) == [("gone", "all-1")]


def busy_run() -> bytes:
    random = np.random.default_rng(3)
    trace = Requests.of(
        np.sort(random.uniform(0, 300, 3000)), random.integers(1, 4000, 3000), random.integers(1, 500, 3000)
    )  # fmt: skip
    cluster = Cluster(llama(), trace, None, ClusterConfig(start_s=20.0, park_after_s=0.5), 64, seed=1)
    cluster.apply(fleet(*[(None, 8, 1980)] * 5, *[(None, 4, 1590)] * 4))
    while cluster.now_s < 400:
        cluster.advance(cluster.now_s + 5)
        state = cluster.state()
        number = int(cluster.now_s / 5)
        kept = [i for i in state.instances if i.phase != "draining" and not (number % 20 == 7 and i is state.instances[0])]
        wants = [(i.id, i.tp, (1980, 1590, 1200)[number % 3]) for i in kept]
        cluster.apply(fleet(*wants, *([(None, 4, 1980)] if number % 20 == 7 else [])))
    seen = cluster.results()
    arrays = (seen.ttft_s, seen.tbt_p99_s, seen.finish_s, seen.energy_j, seen.rejected, seen.instance, seen.power_w, seen.gpus_on)
    return b"".join(array.tobytes() for array in arrays) + repr((seen.total_j, seen.idle_j, seen.counts)).encode()


def test_the_same_run_gives_the_same_bytes() -> None:
    assert busy_run() == busy_run()
