"""Leases through a running powerd: granted, bound to their holders, decided between, refused, undone."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from powerd.model import Control, Interval
from tests.e2e.daemon_rig import Rig, closed, limit, pin

SM, POWER = Control.SM_CLOCK, Control.POWER_LIMIT


def test_a_detached_lease_is_set_verified_shown_and_undone_when_released(node: Rig) -> None:
    lease = node.granted(limit(300), pin(1203), detached=True)
    gpu = node.hw.uuids[0]
    assert {(o["control"], o["verdict"], o["requested"]["high"]) for o in lease["outcomes"]} == {
        ("power_limit", "applied", 300_000), ("sm_clock", "applied", 1200),
    }  # fmt: skip
    assert node.hw.value(gpu, SM) == Interval(1200, 1200), "the supported clock below 1203"
    assert "token" not in node.lease(lease) or node.lease(lease)["token"] is None
    explain = node.get(f"/v1/explain/{gpu}")
    clock = next(c for c in explain["controls"] if c["control"] == "sm_clock")
    assert clock["setpoint"]["winner"] == lease["id"] == clock["last_change_by"]
    assert clock["outcome"]["verdict"] == "applied"
    assert explain["clock_event_reasons"] == ["sw_power_cap"]
    status, ended = node.request("DELETE", f"/v1/leases/{lease['id']}", Powerd_Lease_Token=lease["token"])
    assert (status, ended["state"], ended["end"]) == (200, "ended", "released")
    assert [o["requested"] for o in ended["outcomes"]] == [None, None]
    node.hw.wait(lambda: not node.hw.desired, "still wanted")


def test_a_bound_lease_ends_with_its_connection(node: Rig) -> None:
    lease = node.granted(pin(1200))
    link, answer = node.attach(lease)
    assert answer["id"] == lease["id"]
    assert node.lease(lease)["state"] == "active"
    link.close()
    node.hw.wait(lambda: not node.hw.desired, "the setting outlived the connection")
    assert node.lease(lease)["end"] in ("connection_closed", "holder_died")


_HOLDER = """
import json, socket, sys, time
from tests.e2e.daemon_rig import Rig
class Hw: uuids = [sys.argv[2]]; path = ""
from pathlib import Path
rig = Rig.__new__(Rig); rig.folder = Path(sys.argv[1]); rig.hw = Hw; rig.socket = Path(sys.argv[1]) / "run" / "powerd.sock"
connection = None
if sys.argv[3] == "attached":
    lease = rig.granted({"control": "sm_clock", "low": 900, "high": 900})
    link, _ = rig.attach(lease)
else:
    from tests.e2e.daemon_rig import UnixConnection
    connection = UnixConnection(rig.socket)
    body = {"gpus": Hw.uuids, "wants": [{"control": "sm_clock", "high": 900}], "reason": "test"}
    connection.request("POST", "/v1/leases", json.dumps(body))
    lease = json.loads(connection.getresponse().read())
print(lease["id"], flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["attached", "granted"])
def test_a_killed_holder_loses_its_lease_at_once_also_before_it_has_attached(node: Rig, how: str) -> None:
    command = [sys.executable, "-c", _HOLDER, str(node.folder), node.hw.uuids[0], how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=__file__.rpartition("/tests/")[0]) as holder:
        assert holder.stdout is not None
        lease = {"id": holder.stdout.readline().strip()}
        node.hw.wait(lambda: node.hw.value(node.hw.uuids[0], SM), "not set")
        holder.kill()
        node.hw.wait(lambda: not node.hw.desired, "the setting outlived its holder", timeout_s=2.0)
    assert node.lease(lease)["end"] in ("holder_died", "connection_closed")


def test_an_expired_lease_is_undone_and_a_heartbeat_prevents_that(node: Rig) -> None:
    short = node.granted(pin(1200), detached=True, ttl_s=0.4)
    long = node.granted(limit(400), detached=True, ttl_s=0.4)
    node.request("POST", f"/v1/leases/{long['id']}/heartbeat", Powerd_Lease_Token=long["token"])
    node.hw.wait(lambda: (node.hw.uuids[0], SM) not in node.hw.desired, "not expired")
    assert node.lease(short)["end"] == "expired"
    status, answer = node.request("POST", f"/v1/leases/{short['id']}/heartbeat", Powerd_Lease_Token=short["token"])
    assert (status, answer["error"]["code"]) == (410, "lease_lost")


def test_the_lower_of_two_leases_wins_and_the_higher_is_told_and_follows(node: Rig) -> None:
    gpu = node.hw.uuids[0]
    fast = node.granted(pin(1500), detached=True)
    slow = node.granted(pin(1005), detached=True)
    assert node.hw.value(gpu, SM) == Interval(1005, 1005)
    told = node.lease(fast)["refused"]
    assert len(told) == 1
    assert slow["id"] in told[0]["why"]
    assert any(e["subject"] == fast["id"] for e in node.events("want_refused"))
    node.request("DELETE", f"/v1/leases/{slow['id']}")
    assert node.hw.value(gpu, SM) == Interval(1500, 1500)


def test_a_policy_gives_way_to_a_lease_and_nobody_takes_the_class_of_safety(node: Rig) -> None:
    gpu = node.hw.uuids[0]
    policy = node.granted(pin(900), detached=True, want_class=4)
    lease = node.granted(pin(1500), detached=True)
    assert (policy["want_class"], lease["want_class"]) == (4, 3)
    assert node.hw.value(gpu, SM) == Interval(1500, 1500)
    status, answer = node.acquire(pin(900), detached=True, want_class=0)
    assert (status, answer["error"]["code"]) == (422, "bad_value")


def test_a_lease_that_could_not_be_served_at_all_is_a_conflict_and_changes_nothing(node: Rig) -> None:
    node.granted(pin(900), detached=True)
    before = node.get("/v1/leases")
    status, answer = node.acquire(pin(1500), detached=True)
    assert (status, answer["error"]["code"]) == (409, "conflict")
    assert [x["id"] for x in node.get("/v1/leases")] == [x["id"] for x in before]


def test_a_dry_run_says_what_would_be_set_and_sets_nothing(node: Rig) -> None:
    tables = len(node.hw.tables)
    status, answer = node.acquire(pin(1200), dry_run=True)
    assert (status, answer["dry_run"], answer["outcomes"][0]["requested"]) == (200, True, {"low": 1200, "high": 1200})
    assert answer["token"] is None
    assert node.get("/v1/leases") == []
    assert all(not table for table in node.hw.tables[tables:])


def test_changed_wants_replace_the_old_ones_only_when_they_can_be_served(node: Rig) -> None:
    lease = node.granted(pin(1500), detached=True)
    path, token = f"/v1/leases/{lease['id']}", lease["token"]
    status, _ = node.request("PATCH", path, {"wants": [limit(900)]}, Powerd_Lease_Token=token)
    assert status == 422
    assert node.hw.value(node.hw.uuids[0], SM) == Interval(1500, 1500)
    status, changed = node.request("PATCH", path, {"wants": [limit(350)]}, Powerd_Lease_Token=token)
    assert (status, changed["outcomes"][0]["requested"]["high"]) == (200, 350_000)
    assert (node.hw.uuids[0], SM) not in node.hw.desired


def test_a_failed_set_undoes_the_whole_lease_and_says_why(node: Rig) -> None:
    node.hw.failing = 4
    try:
        status, answer = node.acquire(pin(1200), detached=True)
    finally:
        node.hw.failing = None
    assert (status, answer["error"]["code"]) == (403, "no_permission")
    assert node.get("/v1/leases") == []
    node.hw.wait(lambda: not node.hw.desired, "half a lease stayed")


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        ({"gpus": ["GPU-nope"]}, 404, "unknown_gpu", "GPU-0000"),
        ({"gpus": []}, 422, "bad_value", "no GPUs"),
        ({"wants": [{"control": "sm_clock"}]}, 422, "bad_value", "no bound"),
        ({"wants": [{"control": "sm_clock", "low": 1500, "high": 1200}]}, 422, "bad_value", "above high"),
        ({"wants": [{"control": "power_limit", "low": 900_000, "high": 900_000}]}, 422, "bad_value", "200..700 W"),
        ({"wants": [{"control": "sm_clock", "high": 100}]}, 422, "bad_value", "210..1980 MHz"),
        ({"wants": [{"control": "memory_clock", "high": 2000}]}, 422, "not_supported", "power_limit, sm_clock"),
        ({"wants": [{"control": "fan", "high": 2000}]}, 422, "bad_value", "fan"),
        ({"wants": [{"control": "sm_clock", "hgih": 2000}]}, 400, "bad_request", "'high'"),
        ({"wants": [{"control": "sm_clock", "high": "1200MHz"}]}, 422, "bad_value", "int"),
        ({"reason": " "}, 422, "bad_value", "reason"),
        ({"reason": "a\nb"}, 422, "bad_value", "printable"),
        ({"ttl_s": 1e9}, 422, "bad_value", "ttl_s"),
        ({"wait_s": -1}, 422, "bad_value", "wait_s"),
        ({"gpu": "x"}, 400, "bad_request", "'gpus'"),
    ],
)
def test_a_bad_request_is_refused_with_what_would_be_right(
    node: Rig, body: dict[str, object], status: int, code: str, says: str
) -> None:
    base = {"gpus": node.hw.uuids[:1], "wants": [pin(1200)], "reason": "test", "detached": True}
    got, answer = node.request("POST", "/v1/leases", {**base, **body})
    error = answer["error"]
    assert (got, error["code"]) == (status, code), error
    assert says in f"{error['message']} {error['hint']}"
    assert error["fault"] in ("request", "device")
    assert node.get("/v1/leases") == []


def test_a_bound_lease_that_nobody_attaches_to_is_undone(node: Rig) -> None:
    connectionless = node.granted(pin(1200), ttl_s=0.5)
    node.hw.wait(lambda: not node.hw.desired, "still set")
    assert node.lease(connectionless)["state"] == "ended"


def test_attaching_needs_the_token_and_the_same_major_version(node: Rig) -> None:
    lease = node.granted(pin(1200))
    link, answer = node.attach(lease, token="wrong")
    assert answer["error"]["code"] == "lease_lost"
    assert closed(link)
    link, answer = node.attach(lease, api="2.0")
    assert answer["error"]["code"] == "version"
    assert closed(link)
    link, answer = node.attach(lease)
    assert answer["state"] == "active"
    link.close()


def test_garbage_on_the_attach_socket_is_answered_and_closed(node: Rig) -> None:
    for garbage in (b"{", b"[]", b'{"api":"1.0"}', b"x" * 4000):
        link, _ = node.attach({"id": "x", "token": "y"})
        link.close()
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        raw.settimeout(10)
        raw.connect(str(node.socket.with_name("attach.sock")))
        raw.send(garbage)
        assert "error" in json.loads(raw.recv(4096))
        assert closed(raw)
        raw.close()
