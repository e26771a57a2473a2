"""The HTTP side of a running powerd: every route, what it describes, bodies, versions and streams."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

from powerd.errors import CODES
from powerd.routes import ROUTES
from tests.e2e.daemon_rig import Rig, UnixConnection, limit, pin


def test_every_route_answers_and_only_the_listed_ones_exist(node: Rig) -> None:
    lease = node.granted(limit(300), detached=True)
    window = node.request("POST", "/v1/windows", {"gpus": node.hw.uuids[:1]})[1]
    bodies: dict[str, Any] = {
        "lease_create": {"gpus": node.hw.uuids[:1], "wants": [pin(900)], "reason": "r", "detached": True, "dry_run": True},
        "lease_change": {"wants": [limit(350)]}, "window_begin": {"gpus": node.hw.uuids}, "quiesce": {"max_s": 0.01},
        "job_event": {"kind": "start"},
        "energy_spans": {"uuid": node.hw.uuids[0], "spans": [{"label": "x", "begin_ns": 1, "end_ns": 2}], "wait": False},
        "replica_create": {"name": "r", "pool": "p", "gpus": node.hw.uuids[:1], "metrics_url": "http://127.0.0.1:9/metrics",
                           "slo": {"ttft_s": 1, "tbt_s": 0.1}, "detached": True},
    }  # fmt: skip
    ids = {"window_end": window["id"]}
    order = sorted(
        ROUTES,
        key=lambda r: (
            r.name in ("panic", "quiesce", "resume"),
            r.name == "lease_release",
            r.name in ("job", "job_steps"),
            r.name == "resume",
        ),
    )
    for route in order:
        if route.name in ("stream", "perseus_plan", "plan_arm", "plan_disarm", "dcgm"):
            continue  # have their own tests
        path = (
            route.path.replace("{uuid}", node.hw.uuids[0])
            .replace("{job}", "every-route")
            .replace("{id}", ids.get(route.name, lease["id"]))
        )
        status, body, headers = node.exchange(route.method, path, bodies.get(route.name))
        assert status == 200, (route.name, body)
        assert headers["Powerd-Api"] == "1.0", route.name
        if route.media == "application/json":
            answer = json.loads(body)
            assert isinstance(answer, list) is route.many, route.name
    status, answer = node.request("GET", "/v1/nodes")
    assert (status, answer["error"]["code"], answer["error"]["hint"]) == (404, "not_found", "did you mean '/v1/node'?")
    assert node.request("DELETE", "/v1/node")[1]["error"]["hint"] == "use GET"
    node.until(lambda: node.get("/v1/node")["control"], "still held")


def test_openapi_names_every_route_type_and_code(node: Rig) -> None:
    document = node.get("/openapi.json")
    assert document["openapi"] == "3.1.0"
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert described == {(r.method, r.path) for r in ROUTES}
    used = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert used <= set(document["components"]["schemas"])
    assert {"LeaseRequest", "LeaseView", "SnapshotView", "Reading", "Explain", "Error"} <= set(document["components"]["schemas"])
    assert all(f"`{code}`" in document["info"]["description"] for code in CODES)


def test_a_snapshot_has_everything_and_its_age(node: Rig) -> None:
    snapshot = node.get("/v1/snapshot")
    assert [r["uuid"] for r in snapshot["readings"]] == node.hw.uuids
    assert snapshot["readings"][0]["power_mw"] == 300_499
    assert snapshot["readings"][0]["temperature_c"] is None, "missing is null, never 0"
    assert 0 <= snapshot["age_s"] < 5
    later = node.until(lambda: (s := node.get("/v1/snapshot"))["seq"] > snapshot["seq"] and s, "the snapshot stands still")
    assert later["readings"][0]["energy_mj"] > snapshot["readings"][0]["energy_mj"]


def test_health_metrics_history_and_events(node: Rig) -> None:
    assert node.get("/healthz")["ok"] is True
    _, page, headers = node.exchange("GET", "/metrics")
    assert headers["Content-Type"].startswith("text/plain")
    assert page.decode().count("powerd_gpu_up{") == 2
    for said in (
        "powerd_hw_connected 1.0",
        "powerd_control_enabled 1.0",
        "powerd_panic 0.0",
        "powerd_config_last_reload_successful 1.0",
    ):
        assert said in page.decode()
    history = node.until(lambda: (h := node.get("/v1/history?since=1m"))["series"][0]["time_s"] and h, "nothing was stored")
    assert history["series"][0]["uuid"] == node.hw.uuids[0]
    status, answer = node.request("GET", "/v1/history?columns=powr_mw")
    assert (status, "power_mw" in answer["error"]["hint"]) == (422, True)
    assert node.request("GET", "/v1/history?since=yesterday")[0] == 422
    assert node.request("GET", "/v1/history?sinc=1")[1]["error"]["hint"] == "did you mean 'since'?"
    last = node.get("/v1/events")[-1]["seq"]
    node.granted(pin(1200), detached=True, ttl_s=0.2)
    node.until(lambda: any(e["kind"] == "lease_ended" for e in node.get(f"/v1/events?since={last}")), "no event")


def test_energy_between_two_requests(node: Rig) -> None:
    begun = node.request("POST", "/v1/windows", {"gpus": node.hw.uuids[:1], "name": "w"})[1]
    seq = node.get("/v1/snapshot")["seq"]
    node.until(lambda: node.get("/v1/snapshot")["seq"] >= seq + 5, "no samples")
    status, ended = node.request("POST", f"/v1/windows/{begun['id']}/end")
    figure = ended["figures"][0]
    assert status == 200
    assert figure["low_j"] <= figure["energy_j"] <= figure["high_j"]
    assert figure["energy_j"] > 0
    status, answer = node.request("POST", f"/v1/windows/{begun['id']}/end")
    assert (status, answer["error"]["code"]) == (404, "not_found")


def test_large_and_malformed_bodies_are_refused(node: Rig) -> None:
    status, answer = node.request("POST", "/v1/leases", b"x" * 70_000)
    assert (status, answer["error"]["code"]) == (400, "bad_request")
    assert "65536" in answer["error"]["message"]
    for body in (b"", b"{", b"[]", b"\xff", b'"x"', b"null"):
        status, answer = node.request("POST", "/v1/leases", body)
        assert (status, answer["error"]["code"]) == (400, "bad_request"), body


def test_another_major_version_is_refused_and_an_older_minor_is_served(node: Rig) -> None:
    status, answer = node.request("GET", "/v1/node", Powerd_Api="2.0")
    assert (status, answer["error"]["code"]) == (426, "version")
    assert node.request("GET", "/v1/node", Powerd_Api="1.7")[0] == 200


def lines(response: http.client.HTTPResponse) -> Iterator[dict[str, str]]:
    fields: dict[str, str] = {}
    while raw := response.readline():
        line = raw.decode().rstrip("\n")
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        else:
            yield fields
            fields = {}


def stream(node: Rig, query: str = "", **headers: str) -> tuple[Any, Iterator[dict[str, str]]]:
    connection = UnixConnection(node.socket)
    connection.request("GET", f"/v1/stream{query}", headers={n.replace("_", "-"): v for n, v in headers.items()})
    return connection, lines(connection.getresponse())


def test_the_stream_carries_snapshots_and_events_in_order_and_resumes(node: Rig) -> None:
    connection, messages = stream(node, "?hz=20")
    first = next(m for m in messages if m["event"] == "snapshot")
    assert len(json.loads(first["data"])["readings"]) == 2
    lease = node.granted(pin(1200), detached=True)
    seen = []
    for message in messages:
        if message["event"] == "event":
            event = json.loads(message["data"])
            assert int(message["id"]) == event["seq"]
            seen.append(event)
            if event["kind"] == "setpoint":
                break
    assert [e["kind"] for e in seen][:1] == ["lease_granted"]
    assert [e["seq"] for e in seen] == sorted(e["seq"] for e in seen)
    connection.close()
    node.request("DELETE", f"/v1/leases/{lease['id']}")
    connection, messages = stream(node, "?events=1", Last_Event_ID=str(seen[-1]["seq"]))
    assert json.loads(next(messages)["data"])["seq"] == seen[-1]["seq"] + 1
    connection.close()


def test_a_stream_is_as_slow_as_asked(node: Rig) -> None:
    connection, messages = stream(node, "?hz=4")
    times: list[int] = []
    for message in messages:
        if message["event"] == "snapshot":
            times.append(json.loads(message["data"])["time_ns"])
        if len(times) == 5:
            break
    connection.close()
    assert times[-1] - times[1] > 0.45e9, "three periods of a quarter second; every sample would be 0.15 s"
    assert node.request("GET", "/v1/stream?hz=fast")[0] == 422


def test_a_reader_that_does_not_read_is_dropped(own: Rig) -> None:
    own.start()
    raw = socket.socket(socket.AF_UNIX)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(str(own.socket))
    raw.sendall(b"GET /v1/stream?events=1 HTTP/1.1\r\nHost: x\r\n\r\n")
    for number in range(1500):
        own.hw.event("noise", own.hw.uuids[0], None, f"{number} " + "x" * 900)
    own.until(lambda: own.get("/v1/events?limit=1")[0]["detail"].startswith("1499"), "powerd stopped to listen to hw")
    raw.settimeout(15)
    received = 0
    while data := raw.recv(65536):
        received += len(data)
    assert received < 1500 * 900, "it was cut off, not served to the end"
    raw.close()
