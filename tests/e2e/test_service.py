"""The simulated service beside the cluster simulator: two programs that share nothing but the engine model tell the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from powerd.client import Client
from powerd.demo.stage import START_S, stage
from powerd.model import SloClass
from powerd.replicatypes import SloSpec
from powerd.sim.replay import scale, session
from powerd.sim.replay.policies import single_pool
from powerd.sim.replay.runner import replay
from powerd.sim.replay.trace import read

SECONDS, LOAD = 60.0, 0.15


def test_http_engines_and_powerd_measure_what_the_cluster_simulator_computes() -> None:
    with stage(8, "stepped", latency=0.0, fit_on=None, model="h100-sxm") as here:
        words = ["--policies", "singlepool", "--seconds", str(SECONDS), "--load", str(LOAD)]
        child = here.start("service", "-m", "powerd_integrations.simulated_service", "--ask", *words)
        ready = child.next(START_S)
        here.go()
        child.tell("go")
        while "served" not in (message := child.next(60)):
            assert message["simulated"] is True
    served = message["served"]
    seen = served.pop("seen")
    assert served["outcomes"] == {"answered": ready["requests"]}, json.dumps(served)

    scenario = session.scenario(None)
    scenario = replace(scenario, cluster=replace(scenario.cluster, nodes=1))
    trace = scale.scaled(read(session.shipped_hour()).between(1800, 1800 + SECONDS), LOAD, 1)
    comparison = session.prepare(trace, scenario)
    setting = replace(comparison.setting, config=replace(comparison.setting.config, start_s=0.0))
    outcome = replay(single_pool(setting, 8), comparison.workload, setting)
    results = outcome.results
    order = sorted(range(len(seen)), key=lambda n: seen[n]["at_s"])
    assert len(order) == len(results.ttft_s)
    differ = [abs(seen[n]["ttft_s"] - ttft_s) for n, ttft_s in zip(order, results.ttft_s, strict=True)]
    assert sorted(differ)[len(differ) // 2] < 0.001, "most first tokens come at the very same moment"
    assert sum(differ) / len(differ) < 0.02
    assert served["energy_low_j"] <= 1.01 * results.total_j
    assert served["energy_j"] == pytest.approx(results.total_j, rel=0.03)


def test_the_daemon_holds_the_clocks_of_registered_replicas_and_nobody_is_lost() -> None:
    with stage(8, "stepped", latency=0.0, fit_on=None, model="h100-sxm") as here:
        words = ["--policies", "dynamollm", "--clocks", "daemon", "--seconds", "90", "--load", "0.04"]
        child = here.start("service", "-m", "powerd_integrations.simulated_service", "--ask", *words)
        ready = child.next(START_S)
        here.go()
        child.tell("go")
        clocks, promised = [], list[SloSpec]()
        with Client(here.env["POWERD_SOCKET"]) as client:
            while "served" not in (message := child.next(60)):
                clocks.append(message["clock_mhz"])
                promised = [view.slo for view in client.replicas()] or promised
        assert set(promised) == {SloSpec(4.0, 0.15, (SloClass(1023, 1.5),))}, "short prompts are promised less than long ones"
        served = message["served"]
        assert served["outcomes"] == {"answered": ready["requests"]}
        assert min(clocks) < 1700, "the instance manager has lowered a clock by what it scraped"
        assert sum(seen["within_slo"] for seen in served["seen"]) >= 0.98 * ready["requests"]
        while "done" not in child.next(60):
            pass
        assert all(here.node.view(gpu).lock_max_mhz == 0 for gpu in range(8)), "nothing stays locked"
