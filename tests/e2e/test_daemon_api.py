"""The HTTP side of a running powerd: every route, permission by peer credentials, streams, TCP, limits."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from powerd.client import Client
from powerd.errors import CODES, DeniedError, UnavailableError
from powerd.routes import ROUTES
from tests.e2e.daemon_rig import Rig, limit, pin, rig

NOBODY = 65534


@pytest.fixture(scope="module")
def node() -> Iterator[Rig]:
    with rig() as made:
        made.start()
        yield made


@pytest.fixture
def own() -> Iterator[Rig]:
    with rig() as made:
        yield made


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
            route.path.replace("{uuid}", node.hw.uuids[0]).replace("{job}", "j").replace("{id}", ids.get(route.name, lease["id"]))
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
    from tests.e2e.daemon_rig import _UnixConnection

    connection = _UnixConnection(node.socket)
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


_ASK = """
import http.client, json, os, socket, sys
path, method, route, body, headers = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], json.loads(sys.argv[5])
if os.getuid() == 0:
    os.setgroups(json.loads(sys.argv[6])); os.setgid(65534); os.setuid(65534)
print(os.getpid(), flush=True)
class C(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX); self.sock.connect(path)
for line in sys.stdin:
    c = C("x"); c.request(method, route, body or None, headers); r = c.getresponse()
    print(r.status, r.read().decode().replace(chr(10), " "), flush=True)
"""


class Stranger:
    """A process of another user."""

    def __init__(
        self, node: Rig, route: str, method: str = "GET", body: str = "", groups: list[int] | None = None, **headers: str
    ) -> None:
        named = json.dumps({n.replace("_", "-"): v for n, v in headers.items()})
        command = [sys.executable, "-c", _ASK, str(node.socket), method, route, body, named, json.dumps(groups or [])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.pid = int(self.process.stdout.readline())

    def ask(self) -> tuple[int, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        status, _, body = self.process.stdout.readline().partition(" ")
        return int(status), json.loads(body)

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


needs_root = pytest.mark.skipif(os.geteuid() != 0 and not os.environ.get("CI"), reason="becoming another user needs root")


@needs_root
def test_another_user_sees_no_gpu_until_it_runs_there(node: Rig) -> None:
    gpu = node.hw.uuids[1]
    with Stranger(node, "/v1/snapshot") as asks, Stranger(node, "/v1/snapshot") as runs:
        assert asks.ask()[1]["readings"] == []
        node.hw.set_processes({gpu: [runs.pid]})
        try:
            node.until(lambda: runs.ask()[1]["readings"], "ownership was not seen")
            full = runs.ask()[1]["readings"]
            assert [r["uuid"] for r in full] == [gpu]
            assert full[0]["power_mw"] == 300_500, "the process on the GPU reads it in full"
            slow = asks.ask()[1]["readings"]
            assert [r["uuid"] for r in slow] == [gpu]
            reading = slow[0]
            assert reading["power_mw"] % 1000 == reading["energy_mj"] % 1000 == reading["time_ns"] % 10**9 == 0
        finally:
            node.hw.set_processes({})
        node.until(lambda: asks.ask()[1]["readings"] == [] or None, "ownership outlived the process")


@needs_root
@pytest.mark.parametrize(
    ("method", "route", "body"),
    [
        ("POST", "/v1/leases", {"gpus": ["GPU-x"], "wants": [{"control": "sm_clock", "high": 900}], "reason": "r"}),
        ("POST", "/v1/panic", None),
        ("POST", "/v1/resume", None),
        ("POST", "/v1/quiesce", {"max_s": 1}),
        ("GET", "/metrics", None),
        ("GET", "/v1/history", None),
        ("GET", "/v1/explain/{gpu}", None),
        ("POST", "/v1/windows", {"gpus": ["{gpu}"]}),
    ],
)
def test_another_user_is_denied_what_is_not_its_own(node: Rig, method: str, route: str, body: Any) -> None:
    text = json.dumps(body) if body else ""
    with Stranger(node, route.replace("{gpu}", node.hw.uuids[0]), method, text.replace("{gpu}", node.hw.uuids[0])) as stranger:
        status, answer = stranger.ask()
    assert (status, answer["error"]["code"]) == (403, "denied"), answer


@needs_root
def test_a_lease_token_shows_its_gpu_and_another_users_lease_is_hidden(node: Rig) -> None:
    lease = node.granted(limit(300), detached=True)
    with Stranger(node, "/v1/snapshot", Powerd_Lease_Token=lease["token"]) as stranger:
        assert [r["uuid"] for r in stranger.ask()[1]["readings"]] == node.hw.uuids[:1]
    with Stranger(node, "/v1/leases") as stranger:
        assert stranger.ask() == (200, [])
    with Stranger(node, f"/v1/leases/{lease['id']}", "DELETE") as stranger:
        assert stranger.ask()[0] == 404
    node.request("DELETE", f"/v1/leases/{lease['id']}")


@needs_root
def test_members_of_the_configured_group_control_and_open_reads_opens_reads(own: Rig) -> None:
    own.write('[daemon]\ncontrol = true\n[access]\ngroup = "games"\n')
    own.start()
    import grp

    body = {"gpus": own.hw.uuids[:1], "wants": [pin(900)], "reason": "r", "detached": True}
    with Stranger(own, "/v1/leases", "POST", json.dumps(body), groups=[grp.getgrnam("games").gr_gid]) as member:
        status, lease = member.ask()
        assert (status, lease["uid"]) == (200, NOBODY)
    own.write('[daemon]\ncontrol = true\n[access]\ngroup = ""\nopen_reads = true\n')
    assert own.process is not None
    own.process.send_signal(signal.SIGHUP)
    own.until(lambda: own.events("config_reloaded"), "not reloaded")
    with Stranger(own, "/v1/snapshot") as reader:
        assert len(reader.ask()[1]["readings"]) == 2
    with Stranger(own, "/v1/leases", "POST", json.dumps(body)) as reader:
        assert reader.ask()[0] == 403


@needs_root
def test_a_user_without_control_cannot_flood(own: Rig) -> None:
    own.start()
    with Stranger(own, "/v1/node") as stranger:
        statuses = [stranger.ask()[0] for _ in range(400)]
    assert statuses[0] == 200
    assert 429 in statuses
    assert own.get("/v1/node")["hw_connected"] is True


@needs_root
def test_one_user_cannot_use_up_the_connections_of_others(own: Rig) -> None:
    own.start()
    script = f"""
import os, socket
os.setgid({NOBODY}); os.setuid({NOBODY})
links = []
for _ in range(40):
    link = socket.socket(socket.AF_UNIX); link.settimeout(10); link.connect({str(own.socket)!r}); links.append(link)
print(links[-1].recv(100).split()[1].decode())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "429", result.stderr
    assert own.get("/v1/node")["hw_connected"] is True


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


def tcp_config(node: Rig, **values: Any) -> None:
    lines = "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())
    node.write(f"[daemon]\ncontrol = true\n[tcp]\n{lines}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask_tcp(
    port: int, method: str, path: str, body: Any = None, context: ssl.SSLContext | None = None, **headers: str
) -> tuple[int, Any]:
    connection: http.client.HTTPConnection
    if context is not None:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
    else:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def token_file(node: Rig, token: str = "s" * 32) -> str:
    path = node.folder / "token"
    path.write_text(token + "\n")
    path.chmod(0o600)
    return str(path)


def test_over_tcp_nothing_without_the_token_and_control_with_it(own: Rig) -> None:
    port = free_port()
    tcp_config(own, listen=f"127.0.0.1:{port}", token_file=token_file(own))
    own.start()
    assert ask_tcp(port, "GET", "/v1/node")[0] == 403
    assert ask_tcp(port, "GET", "/v1/node", Authorization="Bearer wrong")[0] == 403
    right = {"Authorization": "Bearer " + "s" * 32}
    assert ask_tcp(port, "GET", "/v1/snapshot", **right)[0] == 200
    body = {"gpus": own.hw.uuids[:1], "wants": [pin(900)], "reason": "r"}
    status, answer = ask_tcp(port, "POST", "/v1/leases", body, **right)
    assert (status, "detached" in answer["error"]["message"]) == (422, True)
    assert ask_tcp(port, "POST", "/v1/leases", {**body, "detached": True}, **right)[0] == 200


def test_loopback_reads_without_a_token_are_reads_only_and_for_local_names(own: Rig) -> None:
    port = free_port()
    tcp_config(own, listen=f"127.0.0.1:{port}", loopback_reads=True)
    own.start()
    assert len(ask_tcp(port, "GET", "/v1/snapshot")[1]["readings"]) == 2
    assert ask_tcp(port, "POST", "/v1/panic")[0] == 403
    assert ask_tcp(port, "GET", "/v1/snapshot", Host="evil.example")[0] == 403


def test_tls_is_served(own: Rig) -> None:
    port, key, certificate = free_port(), own.folder / "key.pem", own.folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subprocess.run(
        [*command, "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    tcp_config(own, listen=f"127.0.0.1:{port}", token_file=token_file(own), certificate=str(certificate), key=str(key))
    own.start()
    context = ssl.create_default_context(cafile=str(certificate))
    assert ask_tcp(port, "GET", "/v1/node", context=context, Authorization="Bearer " + "s" * 32)[0] == 200
    with Client(url=f"https://127.0.0.1:{port}", token_file=own.folder / "token", ca_file=certificate) as trusting:
        assert len(trusting.snapshot().readings) == 2
        lease = trusting.lease(own.hw.uuids[:1], sm_clock_mhz=900, reason="from afar", detached=True)
        assert lease.held
        lease.release()
    with Client(url=f"https://127.0.0.1:{port}", token_file=own.folder / "token") as doubting, pytest.raises(UnavailableError):
        doubting.snapshot()  # nobody vouches for this certificate
    with Client(url=f"https://127.0.0.1:{port}", ca_file=certificate) as unknown, pytest.raises(DeniedError):
        unknown.snapshot()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"listen": "0.0.0.0:9478", "token_file": "{token}"}, "TLS"),
        ({"listen": "127.0.0.1:9478"}, "token_file"),
        ({"listen": "localhost", "token_file": "{token}"}, "ADDRESS:PORT"),
        ({"listen": "127.0.0.1:9478", "token_file": "/nowhere"}, "token_file"),
        ({"listen": "0.0.0.0:9478", "token_file": "{token}", "certificate": "/x.pem"}, "belong together"),
    ],
)
def test_an_unsafe_tcp_listener_is_refused_at_start(own: Rig, values: dict[str, str], says: str) -> None:
    tcp_config(own, **{k: v.replace("{token}", token_file(own)) for k, v in values.items()})
    result = subprocess.run(own.command(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 78
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
