"""One rule, two routers: the production one makes each choice of the simulator's on the same requests."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from powerd.sim.cluster import Cluster, ClusterConfig, Requests
from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.fleet import FleetPlan, InstanceWant
from powerd_policies.dynamollm.router import Router
from tests.policies.dynamollm.engines import engine


@pytest.mark.parametrize("load", [4.0, 25.0, 60.0])
def test_every_request_of_a_mixed_fleet_goes_where_the_simulator_sends_it(load: float) -> None:
    """Two pools of different parallelism and clocks, from idle over spilling to overload."""
    dice = np.random.default_rng(5)
    count = 1500
    arrival_s = np.round(np.cumsum(dice.exponential(1 / load, count)), 6)
    prompts = np.clip(dice.lognormal(6.0, 1.1, count), 1, 8192).astype(np.int32)
    outputs = np.clip(dice.lognormal(4.5, 0.9, count), 1, 800).astype(np.int32)
    predicted = np.clip(outputs * dice.choice([0.3, 1.0, 2.0], count), 1, None).astype(np.int32)
    requests = Requests.of(arrival_s, prompts, outputs, predicted_tokens=predicted)
    kinds = [("one", 2, 1980), ("one", 4, 1200), ("two", 4, 1980), ("two", 8, 1590), ("one", 2, 1590)]
    routes = {name: ("one", "two") if name[0] != "L" else ("two", "one") for name in NAMES}
    first = FleetPlan(tuple(InstanceWant(None, *kind) for kind in kinds), routes)
    cluster = Cluster(engine(), requests, config=ClusterConfig(horizon_s=600.0), gpus=20)
    cluster.apply(first)
    states = cluster.state().instances
    plan = FleetPlan(tuple(InstanceWant(each.id, each.pool, each.tp, each.clock_mhz) for each in states), routes)
    cluster.advance(cluster.end_s)
    results = cluster.results()
    assert results.finished.all()

    router = Router(engine(), chunk_tokens=cluster.config.chunk_tokens)
    router.update(plan, states)
    ends: list[tuple[float, int, int, str]] = []  # first tokens and ends of what was sent, in order of time
    chosen = []
    for n in range(count):
        while ends and ends[0][0] <= arrival_s[n] + 5e-10:
            _, last, request, instance = heapq.heappop(ends)
            if last:
                router.finished(instance)
            else:
                router.first_token(instance, int(prompts[request]))
        to = router.route(int(prompts[n]), int(requests.routed_class[n]) % 3)
        assert to is not None
        chosen.append(to)
        heapq.heappush(ends, (float(arrival_s[n] + results.ttft_s[n]), 0, n, to))
        heapq.heappush(ends, (float(results.finish_s[n]), 1, n, to))
        if chosen[-1] != results.instances[results.instance[n]]:
            break  # what follows would only follow from it
    assert chosen == [results.instances[at] for at in results.instance[: len(chosen)]]
    if load > 5:
        assert len(set(chosen)) == len(kinds), "the load reaches everyone"
