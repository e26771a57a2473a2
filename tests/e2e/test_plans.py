"""The routes of clock plans at a whole daemon on a simulated node: who may, what is refused, what is shown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from powerd.client import Client, Lease
from powerd.model import ClockPlan
from tests.e2e.live import LiveNode, wait_for


@pytest.fixture(scope="module")
def node() -> Iterator[LiveNode]:
    with LiveNode(gpus=2) as made:
        yield made


@pytest.fixture
def lease(node: LiveNode) -> Iterator[Lease]:
    with Client(node.socket) as client, client.lease(node.uuids[:1], sm_clock_mhz=(None, 1410), reason="pipeline") as held:
        yield held
    wait_for("the GPU is at baseline", lambda: node.node.show()["gpus"][0]["locked_clocks_mhz"] is None)


def body(node: LiveNode, **other: Any) -> dict[str, Any]:
    plan = {"id": "p1", "uuid": node.uuids[0], "clocks_mhz": [1410, 900], "safe_mhz": 1005, "iteration_s": 60.0, **other}
    return {"plan": plan}


def path(lease: Lease, plan: str = "") -> str:
    return f"/v1/leases/{lease.id}/plans{plan and '/' + plan}"


def token(lease: Lease) -> dict[str, Any]:
    return {"Powerd_Lease_Token": lease.token or ""}


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"clocks_mhz": [1410, 99999]}, 422, "clocks_mhz[1]: 99999 MHz is outside the device's 210..1410 MHz"),
        ({"clocks_mhz": [1410, 0]}, 422, "clocks_mhz[1]"),
        ({"clocks_mhz": [1410, 900.5]}, 422, "clocks_mhz"),
        ({"clocks_mhz": []}, 422, "1 to 65536 instructions"),
        ({"clocks_mhz": [900] * 65537}, 422, "65537"),
        ({"safe_mhz": 9}, 422, "safe_mhz: 9 MHz"),
        ({"iteration_s": 0}, 422, "iteration_s"),
        ({"iteration_s": 3601}, 422, "3600"),
        ({"late_factor": 0.99}, 422, "late_factor"),
        ({"late_factor": 101}, 422, "late_factor"),
        ({"id": ""}, 422, "id"),
        ({"id": "x" * 33}, 422, "id"),
        ({"id": "tab\t"}, 422, "id"),
        ({"uuid": "GPU-00000000-0000-0000-0000-000000000000"}, 404, "is not of lease"),
        ({"clock_mhz": [900]}, 400, "clock_mhz"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_name_and_changes_nothing(
    node: LiveNode, lease: Lease, change: dict[str, Any], status: int, says: str
) -> None:
    before = node.state()
    answer = node.http("POST", path(lease), body(node, **change), **token(lease))
    assert (answer.code, says in answer.out) in ((status, True), (400, True)), answer.out
    assert json.loads(node.http("GET", path(lease), **token(lease)).out) == []
    assert node.state() == before


def test_who_is_not_the_holder_arms_nothing(node: LiveNode, lease: Lease) -> None:
    assert node.http("POST", path(lease), body(node), Powerd_Lease_Token="wrong").code == 403
    assert node.http("DELETE", path(lease, "p1"), Powerd_Lease_Token="wrong").code == 403
    if os.geteuid() == 0:
        for method in ("GET", "POST"):
            assert node.http_as_nobody(method, path(lease), body(node)).code in (403, 404)


def test_a_lease_without_connection_or_without_an_sm_clock_want_has_no_plan(node: LiveNode) -> None:
    with Client(node.socket) as client:
        detached = client.lease(node.uuids[:1], sm_clock_mhz=(None, 1410), detached=True, ttl_s=30)
        answer = node.http("POST", path(detached), body(node), **token(detached))
        assert (answer.code, "attach it first" in answer.out) == (409, True)
        detached.release()
        with client.lease(node.uuids[:1], power_limit_w=400) as limited:
            answer = node.http("POST", path(limited), body(node), **token(limited))
            assert (answer.code, "SM clock" in answer.out) == (409, True)
        answer = node.http("POST", path(detached), body(node), **token(detached))
        assert answer.code == 410
        assert node.http("POST", "/v1/leases/l0/plans", body(node)).code == 404


def test_a_gpu_follows_the_plans_of_one_lease(node: LiveNode, lease: Lease) -> None:
    with lease.arm(ClockPlan("p1", node.uuids[0], (1410, 900), 1005, 60.0)) as beats, Client(node.socket) as client:
        beats.send(0, 0)
        with client.lease(node.uuids[:1], sm_clock_mhz=(None, 1410), reason="another job") as other:
            answer = node.http("POST", path(other), body(node, id="p2"), **token(other))
            assert (answer.code, "p1 of lease" in answer.out) == (409, True)
        assert beats.alive
    with Client(node.socket) as client, client.lease(node.uuids[:1], sm_clock_mhz=(None, 1410)) as other:
        other.arm(ClockPlan("p2", node.uuids[0], (900,), None, 60.0)).close()


def test_giving_up_what_is_not_armed_says_so(node: LiveNode, lease: Lease) -> None:
    answer = node.http("DELETE", path(lease, "p9"), **token(lease))
    assert (answer.code, "no clock plan" in answer.out) == (404, True)


def test_a_plan_is_shown_wherever_a_lease_is(node: LiveNode, lease: Lease) -> None:
    with lease.arm(ClockPlan("p1", node.uuids[0], (1410, 900), 1005, 60.0)) as beats:
        beats.send(3, 0)
        beats.send(3, 1)

        def told() -> bool:
            plans = lease.plans()
            return bool(plans) and (plans[0].step, plans[0].index) == (3, 1)

        wait_for("the beats are told", told)
        assert lease.plans()[0].plan == ClockPlan("p1", node.uuids[0], (1410, 900), 1005, 60.0), (
            "with its clocks, for who draws it"
        )
        (shown,) = json.loads(node.powerctl("explain", "0", "--json").out)["plans"]
        assert (shown["id"], shown["lease"], shown["state"], shown["step"], shown["index"]) == ("p1", lease.id, "running", 3, 1)
        assert shown["switches"] >= 2
        assert shown["plan"] is None, "thousands of clocks travel only when asked for"
        assert "p1 running at step 3, 2 of 2" in node.powerctl("explain", "0").out
        assert "p1 running" in node.powerctl("lease", "list").out
        assert "p1 running" in node.powerctl("lease", "show", lease.id).out
        assert "plan p1 running" in node.powerctl("status").out
        assert json.loads(node.powerctl("explain", "1", "--json").out)["plans"] == []
        page = node.http("GET", "/metrics").out
        assert "powerd_plans_armed 1.0" in page
        assert 'powerd_plan_beats_total{verdict="begin"} 1.0' in page
        beats.send(3, 0)
        wait_for("the wrong beat is told", lambda: lease.plans()[0].why == "wrong")
        kinds = [e.kind for e in Client(node.socket).events() if e.subject == "p1"]
        assert kinds[-2:] == ["plan_armed", "plan_safe"]
        assert 'powerd_plan_beats_total{verdict="wrong"} 1.0' in node.http("GET", "/metrics").out


def test_a_budget_or_the_site_cuts_a_plan_and_powerctl_says_so(node: LiveNode, lease: Lease) -> None:
    with lease.arm(ClockPlan("p1", node.uuids[0], (1410, 900), 1005, 60.0)) as beats:
        beats.send(0, 0)
        node.write_config(node.config_text + "\n[limits]\nsm_clock_max_mhz = 1200\n")
        node.reload()
        wait_for("the plan is cut", lambda: beats.clamped == 1200)
        wait_for("by the driver too", lambda: node.node.show()["gpus"][0]["locked_clocks_mhz"] == [1200, 1200])
        assert "cut to 1200 MHz" in node.powerctl("lease", "list").out
        node.write_config(node.config_text)
        node.reload()
        wait_for("nothing cuts it", lambda: beats.clamped is None)


def test_when_control_is_taken_away_plans_go_too(node: LiveNode, lease: Lease) -> None:
    beats = lease.arm(ClockPlan("p1", node.uuids[0], (1410, 900), 1005, 60.0))
    beats.send(0, 0)
    node.write_config(node.config_text.replace("control = true", "control = false"))
    node.reload()
    wait_for("the plan is over", lambda: not beats.alive and not lease.held)
    wait_for("the GPU is free", lambda: node.node.show()["gpus"][0]["locked_clocks_mhz"] is None)
    node.write_config(node.config_text)
    node.reload()
    wait_for("powerd-hw may set again too", lambda: node.client.node().control)


def test_without_powerd_hw_a_plan_is_refused_and_afterwards_ended(node: LiveNode, lease: Lease) -> None:
    beats = lease.arm(ClockPlan("p1", node.uuids[0], (1410, 900), 1005, 60.0))
    beats.send(0, 0)
    answer = node.powerctl("quiesce", "--for", "60s")
    assert answer.code == 0, answer.err
    wait_for("the plan is over", lambda: not beats.alive)
    refused = node.http("POST", path(lease), body(node), **token(lease))
    assert (refused.code, "maintenance" in refused.out) == (503, True)
    assert node.powerctl("resume").code == 0
    wait_for("powerd-hw serves again", lambda: node.client.node().control and bool(node.client.snapshot().readings))
    wait_for("plans can be armed again", lambda: _arms(node, lease))


def _arms(node: LiveNode, lease: Lease) -> bool:
    from powerd.errors import PowerdError

    try:
        lease.arm(ClockPlan("p2", node.uuids[0], (900,), None, 60.0)).close()
        return True
    except PowerdError:
        return False
