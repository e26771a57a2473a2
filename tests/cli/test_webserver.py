"""Who gets what from the dashboard's server: decided by one pure function, and kept by the server that listens."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from powerd.cli.webserver import MAX_CONNECTIONS, Asked, Dashboard, Gate, judge
from powerd.client import Client
from powerd.resources import folder
from tests.client.fake_daemon import UUIDS, FakeDaemon

FILES = {"index.html": None, "js/app.js": None}
HOST = "127.0.0.1:4711"


@pytest.fixture
def gate() -> Gate:
    return Gate(4711)


def session(gate: Gate) -> Asked:
    """A request of the browser that came by the link."""
    return Asked("GET", "/v1/node", HOST, cookie=f"a=b; {gate.cookie}={gate.session}", fetch_site="same-origin")


def test_the_session_reads_and_nothing_else_does(gate: Gate) -> None:
    good = session(gate)
    assert judge(good, gate, FILES).action == "ask"
    assert judge(replace(good, target="/"), gate, FILES).detail == "index.html"
    assert judge(replace(good, target="/js/app.js"), gate, FILES).action == "file"
    for cookie in ("", f"{gate.cookie}=", f"{gate.cookie}=x{gate.session}", f"powerd-1={gate.session}", 'a="'):
        assert judge(replace(good, cookie=cookie), gate, FILES).status == 403, cookie


@pytest.mark.parametrize("host", ["evil.example:4711", "", "127.0.0.1.evil.example", "10.0.0.1:4711", "0:4711", "[::2]:4711"])
def test_a_name_that_was_rebound_to_loopback_gets_nothing(gate: Gate, host: str) -> None:
    assert judge(replace(session(gate), host=host), gate, FILES).status == 421
    assert judge(replace(session(gate), host=host, target=f"/?token={gate.token}"), gate, FILES).status == 421
    assert gate.token is not None, "nor does it use up the link"


@pytest.mark.parametrize("host", ["127.0.0.1:4711", "localhost:8080", "[::1]:4711", "localhost"])
def test_an_ssh_tunnel_may_have_another_port(gate: Gate, host: str) -> None:
    assert judge(replace(session(gate), host=host, origin=f"http://{host}"), gate, FILES).action == "ask"


@pytest.mark.parametrize(
    "change",
    [
        {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:9999"},
        {"fetch_site": "cross-site"}, {"fetch_site": "same-site"},
    ],
)  # fmt: skip
def test_another_site_gets_nothing_even_with_the_cookie(gate: Gate, change: dict[str, Any]) -> None:
    assert judge(replace(session(gate), **change), gate, FILES).status == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_it_only_reads(gate: Gate, method: str) -> None:
    assert judge(replace(session(gate), method=method, target="/v1/leases"), gate, FILES).status == 405
    assert judge(replace(session(gate), has_body=True), gate, FILES).status == 400


@pytest.mark.parametrize(
    "target", ["/metrics", "/healthz", "/v1/panic", "/v1/leases/a/heartbeat", "/../index.html", "/js/../index.html", "//v1/node",
               "/v1/explain/", "/v1/explain/a/b", "/js/app.js%00", "/vendor"]
)  # fmt: skip
def test_only_listed_files_and_read_routes_exist(gate: Gate, target: str) -> None:
    assert judge(replace(session(gate), target=target), gate, FILES).status == 404


def test_the_token_is_good_once(gate: Gate) -> None:
    link = Asked("GET", f"/?token={gate.token}", HOST, fetch_site="cross-site")
    assert judge(replace(link, target="/?token=guess"), gate, FILES).status == 403
    assert judge(replace(link, method="HEAD"), gate, FILES).status == 403, "a preview does not use it up"
    assert judge(link, gate, FILES).action == "enter"
    assert judge(link, gate, FILES).status == 403
    assert judge(replace(link, cookie=session(gate).cookie), gate, FILES).action == "file", "the same browser, reloading"


# --- the server itself ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(daemon: FakeDaemon) -> Iterator[Dashboard]:
    made = Dashboard(0, folder("dashboards") / "web", Client(daemon.socket).transport)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def ask(server: Dashboard, target: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    link = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    try:
        link.request(method, target, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = link.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode()
    finally:
        link.close()


def test_the_link_becomes_a_cookie_that_no_script_and_no_other_site_gets(server: Dashboard) -> None:
    target = server.url.partition(str(server.server_address[1]))[2]
    status, headers, body = ask(server, target)
    assert status == 200
    assert server.gate.session not in body
    pair, *attributes = (part.strip() for part in headers["set-cookie"].split(";"))
    assert set(attributes) == {"Path=/", "HttpOnly", "SameSite=Strict"}
    assert ask(server, target)[0] == 403, "the link works once"
    assert "token" not in server.url
    for path in ("/", "/js/app.js", "/vendor/uPlot.iife.min.js", "/vendor/uPlot.LICENSE.txt", "/v1/node"):
        status, headers, body = ask(server, path, Cookie=pair)
        assert (status, bool(body)) == (200, True), path
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
    assert ask(server, "/v1/node")[0] == 403
    assert ask(server, "/v1/node", Cookie=pair, Host="rebound.example")[0] == 421
    assert ask(server, "/v1/node", Cookie=pair, Origin="http://rebound.example")[0] == 403
    assert ask(server, "/v1/leases", "POST", Cookie=pair)[0] == 405


def test_the_daemons_own_errors_arrive_as_they_are(server: Dashboard, daemon: FakeDaemon, tmp_path: Path) -> None:
    pair = f"{server.gate.cookie}={server.gate.session}"
    assert ask(server, f"/v1/explain/{UUIDS[0]}", Cookie=pair)[0] == 200
    daemon.fault = lambda request: web.Response(status=500, text="not JSON")
    status, headers, body = ask(server, "/v1/node", Cookie=pair)
    assert (status >= 400, headers["content-type"], "error" in body) == (True, "application/json", True)
    server.transport = Client(tmp_path / "none.sock").transport
    status, headers, body = ask(server, "/v1/node", Cookie=pair)
    assert (status, headers["content-type"]) == (503, "application/json")
    assert '"code": "unavailable"' in body
    assert ask(server, "/v1/stream?hz=1", Cookie=pair)[0] == 503


def test_it_listens_on_loopback_only(server: Dashboard) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_more_connections_than_one_browser_opens_are_closed(server: Dashboard) -> None:
    held = [socket.create_connection(("127.0.0.1", server.server_address[1])) for _ in range(MAX_CONNECTIONS)]
    try:
        with socket.create_connection(("127.0.0.1", server.server_address[1])) as one_more:
            one_more.settimeout(10)
            assert one_more.recv(1) == b""
    finally:
        for link in held:
            link.close()
