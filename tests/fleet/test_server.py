"""The planner's doors: real HTTP, good reports and bad ones."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from powerd_integrations.fleet.page import METRICS
from powerd_integrations.fleet.planner import LivePlanner
from powerd_integrations.fleet.published import PlanMirror
from powerd_integrations.fleet.reporter import ArrivalCounter, InstanceReporter, PlannerLink
from powerd_integrations.fleet.server import PlannerServer
from tests.e2e.live import free_port, wait_for
from tests.fleet.scripted import LL8, Clock, Scripted, planner, replica, report


@pytest.fixture
def live() -> LivePlanner:
    return planner(Scripted(ll8=2), Clock())


@pytest.fixture
def url(live: LivePlanner) -> Iterator[str]:
    with PlannerServer(("127.0.0.1", 0), live, token="let me in") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def ask(url: str, body: Any = None, token: str = "let me in", method: str | None = None) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Authorization": f"Bearer {token}"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]


def test_reports_come_in_and_the_plan_goes_out(url: str, live: LivePlanner) -> None:
    link = PlannerLink(url, "let me in")
    counter = ArrivalCounter(link, "r1", period_s=3600)
    counter.count("ML", 500, 300)
    counter.count("ML", 700, 300)
    wait_for("the first, empty report is out", counter.report)
    counter.report()
    reporter = InstanceReporter(link, lambda: replica("a/b"), period_s=3600)
    wait_for("the replica is known", lambda: live.tick() and live.figures().serving == {LL8: 1})
    assert live.figures().requests == {"ML": 2}
    mirror = PlanMirror(url, period_s=0.05)
    wait_for("the plan arrives", lambda: mirror.plan() == live.plan())
    reporter.close()
    live.tick()
    assert live.figures().serving == {}, "it said goodbye"
    mirror.close()


def test_a_planner_that_comes_back_gets_what_it_missed(live: LivePlanner) -> None:
    port = free_port()
    counter = ArrivalCounter(PlannerLink(f"http://127.0.0.1:{port}"), "r1", period_s=3600)
    for _ in range(3):
        counter.count("SS", 10, 10)
        assert not counter.report()
    with PlannerServer(("127.0.0.1", port), live) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        counter.count("SS", 10, 10)
        assert counter.report()
        assert counter.report()
        counter.close()
        server.shutdown()
    assert live.figures().requests == {"SS": 4}


def test_a_mirror_keeps_the_last_plan_when_the_planner_is_gone(live: LivePlanner) -> None:
    live.tick()
    with PlannerServer(("127.0.0.1", 0), live) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mirror = PlanMirror(f"http://127.0.0.1:{server.server_address[1]}", period_s=0.02)
        wait_for("the plan arrives", lambda: mirror.plan() is not None)
        server.shutdown()
    wait_for("the planner is gone", lambda: mirror.error != "")
    assert mirror.plan() == live.plan()
    mirror.close()


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("arrivals", b"{", 400, "Expecting property name"),
        ("arrivals", [], 400, "a report: a table"),
        ("arrivals", {"router": "", "sequence": 1}, 400, "router: a text"),
        ("arrivals", {"router": "r", "sequence": -1}, 400, "sequence: a whole number"),
        ("arrivals", {"router": "r", "sequence": 1, "classes": {"XX": {}}}, 400, "no class 'XX'; there are SS, SM"),
        ("arrivals", {"router": "r", "sequence": 1, "classes": {"SS": {"requests": 1.5}}}, 400, "SS.requests: a whole number"),
        ("arrivals", {"router": "r", "sequence": 1, "classes": {"SS": {"request": 1}}}, 400, "unknown 'request'"),
        ("instances", {"instances": [{"id": "a", "pool": "LL", "tp": 0}]}, 400, "tp 0: from 1 to 1024"),
        ("instances", {"instances": [{"id": "a", "pool": "LL", "tp": 8, "phase": "dead"}]}, 400, "phase 'dead'"),
        ("instances", {"instances": [{"id": "a", "pool": "LL", "tp": 8, "load": {"running": "3"}}]}, 400, "running: a whole"),
        ("instances", {"instances": [{"id": "a", "pool": "LL", "tp": 8, "load": {"age_s": 1e400}}]}, 400, "age_s: a number"),
        ("instances", {}, 400, "instances: a list"),
        ("plans", {}, 404, "no /v1/plans"),
    ],
)
def test_a_bad_report_is_refused_and_changes_nothing(
    url: str, live: LivePlanner, path: str, body: Any, status: int, said: str
) -> None:
    code, error = ask(f"{url}/v1/{path}", body)
    assert (code, said in error) == (status, True), error
    live.tick()
    assert (live.figures().requests, live.figures().serving) == ({}, {})


def test_who_reports_must_hold_the_token_and_anybody_may_read(url: str, live: LivePlanner) -> None:
    assert ask(f"{url}/v1/arrivals", {"router": "r", "sequence": 1}, token="guess")[0] == 401
    assert ask(f"{url}/v1/instances/a", token="guess", method="DELETE")[0] == 401
    assert live.figures().requests == {}
    assert ask(f"{url}/v1/plan", token="")[0] == 200


@pytest.mark.parametrize("length", [str(4 * 2**20 + 1), "-1", "many"])
def test_a_body_that_is_too_long_is_not_read(url: str, length: str) -> None:
    link = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    link.putrequest("POST", "/v1/arrivals")
    link.putheader("Content-Length", length)
    link.endheaders()
    assert link.getresponse().status == 413
    link.close()


def test_the_page_holds_every_metric_of_the_table(url: str, live: LivePlanner) -> None:
    live.add_arrivals(report(1, requests=3))
    live.add_instances([replica('i"1\n')])
    live.tick()
    text = ask(f"{url}/metrics")[1]
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert [sample.labels | {"": sample.value} for sample in families["powerd_desired_replicas"].samples] == [
        {"pool": "LL", "tp": "8", "": 2.0}
    ]
    assert families["powerd_desired_clock_hertz"].samples[0].value == 1.41e9
    assert set(families) == {metric.name.removesuffix("_total") for metric in METRICS}
    assert [family for family in families.values() if not family.samples] == []
