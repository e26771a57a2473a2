"""Whatever a program gets wrong in a request: one complete error of the right code, and nothing changed."""

from __future__ import annotations

import json
import os
import socket

import pytest

from powerd.api import API_HEADER, API_VERSION, LEASE_TOKEN_HEADER
from powerd.client import Lease
from powerd.errors import CODES
from tests.e2e.live import LiveNode, header
from tests.e2e.mistakes import (
    UNKNOWN,
    Case,
    api,
    assert_one_error,
    attach,
    clock,
    fill,
    lease_body,
    stranger,
)

pytestmark = pytest.mark.xdist_group("bad_input")
API = [
    api("malformed JSON", "POST", "/v1/leases", b'{"gpus": [', "bad_request", "JSON"),
    api("not an object", "POST", "/v1/leases", b"[]", "bad_request", "JSON object"),
    api("empty body", "POST", "/v1/leases", b"", "bad_request", "JSON"),
    api("not UTF-8", "POST", "/v1/leases", b'{"reason": "\xff"}', "bad_request", "JSON"),
    api("nested without end", "POST", "/v1/leases", b"[" * 60_000, "bad_request", "JSON"),
    api("unknown field", "POST", "/v1/leases", lease_body(gpu="0"), "bad_request", "gpu", "did you mean 'gpus'"),
    api("unknown field inside", "POST", "/v1/leases", lease_body(wants=clock(hgih=1200)), "bad_request", "hgih", "high"),
    api("missing field", "POST", "/v1/leases", {"gpus": ["{gpu}"]}, "bad_value", "wants"),
    api("wrong type", "POST", "/v1/leases", lease_body(ttl_s="1h"), "bad_value", "ttl_s"),
    api("unknown control", "POST", "/v1/leases", lease_body(wants=[{"control": "fan", "high": 1}]), "bad_value", "fan"),
    api("unknown UUID", "POST", "/v1/leases", lease_body(gpus=[UNKNOWN]), "unknown_gpu", UNKNOWN),
    api("one good and one unknown UUID", "POST", "/v1/leases", lease_body(gpus=["{gpu}", UNKNOWN]), "unknown_gpu", UNKNOWN),
    api("no GPU", "POST", "/v1/leases", lease_body(gpus=[]), "bad_value", "at least one UUID"),
    api("a GPU twice", "POST", "/v1/leases", lease_body(gpus=["{gpu}", "{gpu}"]), "bad_value", "twice"),
    api("no want", "POST", "/v1/leases", lease_body(wants=[]), "bad_value", "at least one control"),
    api("no bound", "POST", "/v1/leases", lease_body(wants=clock()), "bad_value", "low, high", "MHz"),
    api("bound below zero", "POST", "/v1/leases", lease_body(wants=clock(high=-5)), "bad_value", "above 0 MHz"),
    api("bounds reversed", "POST", "/v1/leases", lease_body(wants=clock(low=1300, high=900)), "bad_value", "1300", "900"),
    api("out of range", "POST", "/v1/leases", lease_body(wants=clock(low=9000)), "bad_value", "210..1410 MHz"),
    api("fraction of a megahertz", "POST", "/v1/leases", lease_body(wants=clock(high=1200.5)), "bad_value", "int"),
    api("number beyond 64 bits", "POST", "/v1/leases", lease_body(wants=clock(high=10**30)), "bad_value", "sm_clock"),
    api("no reason", "POST", "/v1/leases", lease_body(reason=" "), "bad_value", "reason"),
    api("reason with control characters", "POST", "/v1/leases", lease_body(reason="a\x1b[2Jb"), "bad_value", "printable"),
    api("negative TTL", "POST", "/v1/leases", lease_body(ttl_s=-1), "bad_value", "ttl_s"),
    api("endless TTL", "POST", "/v1/leases", lease_body(ttl_s=1e12), "bad_value", "86400", "heartbeat"),
    api("endless wait", "POST", "/v1/leases", lease_body(wait_s=1e9), "bad_value", "wait_s"),
    api("oversized body", "POST", "/v1/leases", lease_body(reason="x" * 70_000), "bad_request", "65536"),
    api("bad lease token", "DELETE", "/v1/leases/{id}", None, "denied", "token", **header(LEASE_TOKEN_HEADER, "wrong")),
    api("unknown lease", "GET", "/v1/leases/l0123", None, "not_found", "l0123"),
    api("change to nothing", "PATCH", "/v1/leases/{id}", {"wants": []}, "bad_value", "at least one control"),
    api("change out of range", "PATCH", "/v1/leases/{id}", {"wants": clock(low=9000)}, "bad_value", "210..1410 MHz"),
    api("unknown route", "GET", "/v1/snapshots", None, "not_found", "did you mean '/v1/snapshot'"),
    api("wrong method", "PUT", "/v1/node", None, "not_found", "GET"),
    api("unknown query", "GET", "/v1/events?sicne=3", None, "bad_request", "sicne", "since"),
    api("history of nonsense", "GET", "/v1/history?since=yesterday", None, "bad_value", "yesterday", "15m"),
    api("history reversed", "GET", "/v1/history?since=1h&until=2h", None, "bad_value", "since", "until"),
    api("history without end", "GET", "/v1/history?since=nan", None, "bad_value", "nan"),
    api("history of an unknown GPU", "GET", f"/v1/history?gpu={UNKNOWN}", None, "unknown_gpu", UNKNOWN),
    api("history of an unknown column", "GET", "/v1/history?columns=wattage", None, "bad_value", "wattage", "power"),
    api("explain of an unknown GPU", "GET", f"/v1/explain/{UNKNOWN}", None, "unknown_gpu", UNKNOWN),
    api("window on an unknown GPU", "POST", "/v1/windows", {"gpus": [UNKNOWN]}, "unknown_gpu", UNKNOWN),
    api("window on no GPU", "POST", "/v1/windows", {"gpus": []}, "bad_request", "at least one GPU"),
    api("end of an unknown window", "POST", "/v1/windows/w0123/end", None, "not_found", "w0123"),
    api("stream at no rate", "GET", "/v1/stream?hz=often", None, "bad_value", "hz"),
    api("quiesce for ever", "POST", "/v1/quiesce", {"max_s": 1e9}, "bad_value", "max_s"),
    api("other major version", "GET", "/v1/node", None, "version", "2.0", "1.", **header(API_HEADER, f"{API_VERSION[0] + 1}.0")),
    api("older major version", "GET", "/v1/node", None, "version", "0.9", **header(API_HEADER, "0.9")),
    api("version that is none", "GET", "/v1/node", None, "version", "latest", **header(API_HEADER, "latest")),
    api("other major version sets", "POST", "/v1/leases", lease_body(), "version", "install", **header(API_HEADER, "2.0")),
    api("TCP without token", "GET", "/v1/node", None, "denied", "Bearer", tcp=True),
    api("TCP with a wrong token", "POST", "/v1/leases", lease_body(), "denied", "token", tcp=True, Authorization="Bearer x"),
    attach("malformed JSON", b"{", "bad_request", "JSON"),
    attach("unknown field", {"api": "1.0", "lease": "{id}", "tokn": "x"}, "bad_request", "tokn", "token"),
    attach("unknown lease", {"api": "1.0", "lease": "l0123", "token": "x"}, "lease_lost", "acquire"),
    attach("wrong token", {"api": "1.0", "lease": "{id}", "token": "x"}, "lease_lost", "token"),
    attach("other major version", {"api": "2.0", "lease": "{id}", "token": "{token}"}, "version", "2.0"),
    attach("oversized message", b'{"api": "' + b"1" * 5000 + b'"}', "bad_request", "4096"),
]
# Only root can become somebody else to try.
STRANGER = [
    stranger("sets", "POST", "/v1/leases", lease_body(), "denied", "operator", "group"),
    stranger("releases what is not theirs to see", "DELETE", "/v1/leases/{id}", None, "not_found", "{id}"),
    stranger("panics", "POST", "/v1/panic", None, "denied", "operator"),
    stranger("measures another's GPU", "POST", "/v1/windows", {"gpus": ["{gpu}"]}, "denied", "lease"),
    stranger("explains another's GPU", "GET", "/v1/explain/{gpu}", None, "denied", "not yours", "lease"),
    stranger("reads history", "GET", "/v1/history", None, "denied", "open_reads"),
    stranger("reads metrics", "GET", "/metrics", None, "denied", "open_reads"),
]


@pytest.mark.parametrize("case", [*API, *(STRANGER if os.geteuid() == 0 else [])], ids=lambda case: case.name)
def test_a_mistake_in_a_request(case: Case, live: LiveNode, held: Lease) -> None:
    before = live.state()
    answer = case.how(live, held)
    if not case.name.startswith("attach"):
        assert answer.code == CODES[str(case.code)].http_status, answer.out
    assert_one_error(case, answer, live, held)
    assert live.state() == before


def test_a_stranger_sees_no_gpu_of_others(live: LiveNode, held: Lease) -> None:
    if os.geteuid() == 0:
        assert live.http_as_nobody("GET", "/v1/snapshot").json()["readings"] == []
        assert live.http_as_nobody("GET", "/v1/leases").json() == []
    assert {r["uuid"] for r in live.http("GET", "/v1/snapshot").json()["readings"]} == set(live.uuids)


@pytest.mark.parametrize("minor", range(API_VERSION[1] + 1))
def test_an_older_client_of_the_same_major_version_works(minor: int, live: LiveNode, held: Lease) -> None:
    stated = f"{API_VERSION[0]}.{minor}"
    answer = live.http("GET", "/v1/node", **header(API_HEADER, stated))
    assert (answer.code, answer.json()["api_version"]) == (200, f"{API_VERSION[0]}.{API_VERSION[1]}")
    dry = live.http(
        "POST", "/v1/leases", json.loads(fill(json.dumps(lease_body(dry_run=True)), live, held)), **header(API_HEADER, stated)
    )
    assert dry.code == 200, dry.out


def test_bytes_that_are_no_http_do_no_harm(live: LiveNode, held: Lease) -> None:
    before = live.state()
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(20)
        link.connect(str(live.socket))
        link.sendall(b"\x00\xff" * 500 + b"\r\n\r\n")
        assert b" 400 " in link.recv(65536)
    assert live.state() == before
