"""Inference replicas in the daemon: held at the lowest clock while all is well, and at none as soon as it is not."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from powerd.model import Interval
from tests.e2e.daemon_rig import CONFIG, Rig, pin
from tests.e2e.replica_rig import HIGHEST, PARKED, busy, controlled, held, register, seen, until, until_full
from tests.replicas.engine import Endpoint, Engine


def test_a_busy_replica_is_held_at_the_clock_that_its_profile_decides_and_explain_says_so(node: Rig, engine: Endpoint) -> None:
    answer = register(node, engine)
    assert answer["replica"]["state"] == "starting"
    assert answer["replica"]["clock_mhz"] is None
    assert answer["lease"]["token"]
    view = controlled(node)
    assert view["state"] == "fresh"
    assert PARKED < view["clock_mhz"] < HIGHEST
    assert (view["running"], view["waiting"], view["engine"], view["user"]) == (2, 0, "vllm", answer["lease"]["user"])
    assert view["age_s"] < 1
    assert view["note"] == "the profile is of h100, the GPU is Test GPU"
    assert 300 < view["power_w"] < 301, "as the fake card draws"
    explained = node.get(f"/v1/explain/{node.hw.uuids[0]}")
    clock = next(c for c in explained["controls"] if c["control"] == "sm_clock")
    assert clock["setpoint"]["winner"] == view["id"] == answer["lease"]["id"]
    assert clock["setpoint"]["reason"].startswith("replica chat-0 of pool chat: least power that keeps TTFT and TBT")
    node.until(lambda: seen(node)["within_slo"] and seen(node)["ttft_p99_s"] == 0.25, "its latencies are not seen")
    node.until(lambda: (seen(node)["energy_j"] or 0) > 0, "no energy was counted")


def test_a_replica_without_work_is_parked_and_wakes_with_the_next_request(node: Rig, engine: Endpoint) -> None:
    engine.engine.running = 0
    register(node, engine)
    until(node, "it was not parked", lambda v: v["state"] == "idle" and v["clock_mhz"] == PARKED)
    node.hw.wait(lambda: held(node) == Interval(210, PARKED), "the driver was not told")
    assert node.events("replica_parked")[-1]["subject"] == "chat-0"
    engine.engine.waiting = 8
    engine.engine.running = 40
    node.hw.wait(lambda: (now := held(node)) is None or now.high > PARKED, "it sleeps on")
    until(node, "it is not awake", lambda v: v["state"] == "fresh" and v["clock_mhz"] != PARKED)


def test_a_pool_without_a_profile_is_only_parked(node: Rig, engine: Endpoint) -> None:
    register(node, engine, profile=None)
    view = until(node, "it is not followed", lambda v: v["state"] == "fresh")
    assert (view["clock_mhz"], view["reason"]) == (None, "no profile: full clock while there is work")
    engine.engine.running = 0
    until(node, "it was not parked", lambda v: v["clock_mhz"] == HIGHEST / 2)


def test_an_endpoint_that_is_gone_means_full_clock_until_it_is_back_for_a_while(node: Rig, engine: Endpoint) -> None:
    register(node, engine)
    controlled(node)
    engine.close()
    until_full(node)
    view = until(node, "it is not stale", lambda v: v["state"] == "stale")
    assert view["clock_mhz"] is None
    assert view["running"] is None, "an old figure is none"
    assert "onnect" in view["note"]
    stale = node.events("replica_stale")[-1]
    assert (stale["subject"], stale["data"]["lease"]) == ("chat-0", view["id"])
    back = Endpoint(busy(), port=engine.port)
    controlled(node)
    assert node.events("replica_recovered")[-1]["subject"] == "chat-0"
    back.close()


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (lambda e: setattr(e, "running", float("nan")), "nan cannot be"),
        (lambda e: setattr(e, "waiting", -3), "-3 cannot be"),
        (lambda e: setattr(e, "prompt_tokens", 1), "its counters have restarted"),
    ],
    ids=["nan", "negative", "restart"],
)
def test_a_page_that_cannot_be_means_full_clock_at_once(
    node: Rig, engine: Endpoint, broken: Callable[[Engine], None], why: str
) -> None:
    register(node, engine)
    controlled(node)
    broken(engine.engine)
    until_full(node)
    node.until(lambda: any(why in e["detail"] for e in node.events("replica_stale")), "nobody was told why")
    engine.engine.running, engine.engine.waiting = 2, 0
    controlled(node)


def test_garbage_and_a_hung_engine_hold_up_nobody(node: Rig, engine: Endpoint) -> None:
    register(node, engine)
    controlled(node)
    engine.text = b"\x00\xff" * 1_000_000
    until_full(node)
    engine.text, engine.release = None, type(engine.release)()
    until(node, "a hung engine is not noticed", lambda v: v["note"] == "no answer in time")
    assert node.get("/healthz")["ok"]
    assert seen(node)["state"] == "stale"
    engine.release.set()


def test_a_missed_slo_means_full_clock_while_it_is_missed(node: Rig, engine: Endpoint) -> None:
    register(node, engine)
    controlled(node)
    engine.engine.ttft += [5.0] * 10
    until_full(node)
    view = until(node, "the miss is not seen", lambda v: v["within_slo"] is False)
    assert view["ttft_p99_s"] == 5.0
    assert view["reason"] == "full clock: p99 of TTFT is up to 5 s, the SLO 0.5 s"
    view = controlled(node)
    assert "since the SLO was missed" in view["reason"]


def test_the_metrics_page_shows_pools_and_openapi_the_route(node: Rig, engine: Endpoint) -> None:
    register(node, engine)
    register(node, engine, gpu=1, name="chat-1")
    for name in ("chat-0", "chat-1"):
        until(node, "it is not followed", lambda v: v["state"] == "fresh" and v["clock_mhz"], name)
    page = node.exchange("GET", "/metrics")[1].decode()
    assert 'powerd_pool_replicas{pool="chat",tp="4"} 2.0' in page
    assert 'powerd_pool_requests_running{pool="chat",tp="4"} 4.0' in page
    assert re.search(r'powerd_pool_power_watts{pool="chat",tp="4"} 60[01]\.', page)
    assert 'powerd_replica_fresh{pool="chat",replica="chat-1"} 1.0' in page
    assert "/v1/replicas" in node.get("/openapi.json")["paths"]


def test_a_site_limit_above_the_parking_clock_is_kept_to(own: Rig, engine: Endpoint) -> None:
    own.write(CONFIG + "[limits]\nsm_clock_min_mhz = 1004\n")
    own.start()
    engine.engine.running = 0
    register(own, engine)
    own.hw.wait(lambda: held(own) == Interval(1005, 1005), "not parked within the site's limits")
    assert own.events("want_refused") == []


def test_a_daemon_that_only_monitors_shows_replicas_and_sets_nothing(own: Rig, engine: Endpoint) -> None:
    own.write(CONFIG.replace("control = true", "control = false"))
    own.start()
    register(own, engine)
    view = until(own, "it is not followed", lambda v: v["state"] == "fresh")
    assert view["clock_mhz"] is None
    assert view["reason"].startswith("monitor only")
    view = until(own, "it does not say what it would do", lambda v: "least power" in v["reason"])
    assert view["running"] == 2
    assert own.hw.tables == [], "nothing was ever sent"


def test_a_replica_and_a_lease_on_the_same_gpu_follow_the_lower_ceiling(node: Rig, engine: Endpoint) -> None:
    register(node, engine)
    controlled(node)
    lease = node.granted(pin(1005), detached=True)
    node.hw.wait(lambda: held(node) == Interval(1005, 1005), "the lower one does not win")
    node.request("DELETE", f"/v1/leases/{lease['id']}")
    assert controlled(node)["clock_mhz"] > 1005
