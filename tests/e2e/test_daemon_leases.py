"""Leases through a running powerd: granted, bound to their holders, re-attached, refused, undone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from powerd.hw.frames import Command
from powerd.model import Control, Health, Interval
from tests.e2e.daemon_rig import Rig, closed, limit, pin, rig

SM, POWER = Control.SM_CLOCK, Control.POWER_LIMIT


@pytest.fixture(scope="module")
def shared() -> Iterator[Rig]:
    with rig() as made:
        made.start()
        yield made


@pytest.fixture
def node(shared: Rig) -> Iterator[Rig]:
    yield shared
    for lease in shared.get("/v1/leases"):
        shared.request("DELETE", f"/v1/leases/{lease['id']}")
    shared.hw.wait(lambda: not shared.hw.desired, "left over settings")


@pytest.fixture
def own() -> Iterator[Rig]:
    with rig() as made:
        yield made


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
    from tests.e2e.daemon_rig import _UnixConnection
    connection = _UnixConnection(rig.socket)
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
        import socket

        raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        raw.settimeout(10)
        raw.connect(str(node.socket.with_name("attach.sock")))
        raw.send(garbage)
        assert "error" in json.loads(raw.recv(4096))
        assert closed(raw)
        raw.close()


def test_a_lost_gpu_suspends_its_leases_tells_the_holder_and_gives_them_back(node: Rig) -> None:
    gpu, other = node.hw.uuids
    lease = node.granted(pin(1200), gpus=[gpu, other])
    link, _ = node.attach(lease)
    node.hw.health[gpu] = Health.LOST
    assert json.loads(link.recv(4096))["state"] == "suspended"
    node.hw.wait(lambda: (gpu, SM) not in node.hw.desired, "a lost GPU is still wanted")
    assert node.hw.value(other, SM) == Interval(1200, 1200), "the other GPU keeps its setting"
    status, answer = node.acquire(pin(900), gpus=[gpu])
    assert (status, answer["error"]["code"]) == (503, "gpu_lost")
    node.hw.health[gpu] = Health.UP
    assert json.loads(link.recv(4096))["state"] == "active"
    node.hw.wait(lambda: node.hw.value(gpu, SM), "not set again")
    link.close()


def test_drift_yields_to_the_other_writer_and_ends_the_lease(node: Rig) -> None:
    lease = node.granted(limit(300))
    link, _ = node.attach(lease)
    node.hw.event("drift", node.hw.uuids[0], "power_limit", "500 W found")
    assert json.loads(link.recv(4096))["error"]["code"] == "lease_lost"
    assert closed(link)
    assert node.lease(lease)["end"] == "drift"
    node.hw.wait(lambda: not node.hw.desired, "still wanted")


def test_panic_ends_everything_and_lasts_until_resume(node: Rig) -> None:
    lease = node.granted(pin(1200), detached=True)
    assert node.request("POST", "/v1/panic")[0] == 200
    node.hw.wait(lambda: (Command.PANIC, 0) in node.hw.commands, "hw was not told")
    assert node.lease(lease)["end"] == "panic"
    status, answer = node.acquire(pin(1200))
    assert (status, answer["error"]["code"]) == (503, "busy")
    assert "resume" in answer["error"]["hint"]
    assert node.get("/v1/node")["panic"] is True
    assert node.request("POST", "/v1/resume")[0] == 200
    node.hw.wait(lambda: node.hw.commands[-1] == (Command.RESUME, 0), "hw was not told")
    node.until(lambda: node.get("/v1/node")["control"], "still held")
    node.granted(pin(1200), detached=True)


def test_the_panic_file_is_panic_and_resume_names_it(node: Rig) -> None:
    file = node.folder / "panic"
    node.granted(pin(1200), detached=True)
    file.touch()
    try:
        node.hw.wait(lambda: node.hw.hold == "panic", "hw was not told")
        status, answer = node.request("POST", "/v1/resume")
        assert (status, answer["error"]["code"]) == (409, "conflict")
        assert str(file) in answer["error"]["hint"]
    finally:
        file.unlink()
    assert node.request("POST", "/v1/resume")[0] == 200
    node.until(lambda: node.get("/v1/node")["control"], "still held")


def test_quiesce_keeps_leases_and_sets_them_again(node: Rig) -> None:
    gpu = node.hw.uuids[0]
    lease = node.granted(pin(1200), detached=True)
    assert node.request("POST", "/v1/quiesce", {"max_s": 30, "reason": "driver upgrade"})[0] == 200
    node.hw.wait(lambda: node.hw.hold == "quiesced" and not node.hw.desired, "not quiesced")
    assert node.get("/v1/node")["quiesced"] is True
    assert node.acquire(pin(900))[1]["error"]["code"] == "busy"
    assert node.request("POST", "/v1/resume")[0] == 200
    node.hw.wait(lambda: node.hw.value(gpu, SM) == Interval(1200, 1200), "not set again")
    assert node.lease(lease)["state"] == "active"
    assert node.request("POST", "/v1/quiesce", {"max_s": 0.3})[0] == 200
    node.hw.wait(lambda: node.hw.hold == "quiesced", "not quiesced")
    node.hw.wait(lambda: node.hw.value(gpu, SM) == Interval(1200, 1200), "did not resume by itself")


def test_hw_that_comes_back_is_told_everything_again(node: Rig) -> None:
    node.granted(pin(1200), detached=True)
    connections = node.hw.connections
    node.hw.drop()
    node.hw.wait(lambda: node.hw.connections > connections, "no new connection")
    tables = len(node.hw.tables)
    node.hw.wait(lambda: len(node.hw.tables) > tables, "nothing was sent")
    assert all((node.hw.uuids[0], SM) in table for table in node.hw.tables[tables:])


def test_a_killed_powerd_finds_its_leases_again_and_never_lets_hw_fall_to_baseline(own: Rig) -> None:
    own.start()
    gpu = own.hw.uuids[0]
    detached = own.granted(limit(300), detached=True)
    bound = own.granted(pin(1200))
    lonely = own.granted(pin(1300), gpus=[own.hw.uuids[1]])
    link, _ = own.attach(bound)
    other, _ = own.attach(lonely)
    own.stop(signal.SIGKILL)
    assert closed(link)
    assert closed(other)
    tables = len(own.hw.tables)
    own.start()
    assert own.lease(bound)["state"] == "detached"
    link, answer = own.attach(bound)
    assert answer["state"] == "active"
    own.hw.wait(lambda: (own.hw.uuids[1], SM) not in own.hw.desired, "nobody came back for this one")
    assert own.lease(lonely)["end"] == "not_reattached"
    assert own.lease(detached)["state"] == "active"
    assert all({(gpu, SM), (gpu, POWER)} <= set(table) for table in own.hw.tables[tables:]), own.hw.tables[tables:]
    link.close()
    own.hw.wait(lambda: (gpu, SM) not in own.hw.desired, "once attached again it is bound again")


def test_panic_outlives_a_restart(own: Rig) -> None:
    own.start()
    own.request("POST", "/v1/panic")
    own.stop(signal.SIGKILL)
    own.start()
    assert own.get("/v1/node")["panic"] is True
    assert own.acquire(pin(1200))[1]["error"]["code"] == "busy"


def test_a_lease_file_that_cannot_be_read_is_put_aside(own: Rig) -> None:
    own.start()
    own.granted(pin(1200), detached=True)
    own.stop(signal.SIGKILL)
    file = own.folder / "state" / "leases.json"
    file.write_bytes(file.read_bytes()[:40])
    own.start()
    assert own.get("/v1/leases") == []
    assert own.events("lease_file_quarantined")
    assert (own.folder / "state" / "leases.json.quarantined").exists()
    own.hw.wait(lambda: not own.hw.desired, "the setting of a forgotten lease stayed")


def test_leases_on_a_gpu_that_does_not_come_back_end(own: Rig) -> None:
    own.start()
    lease = own.granted(pin(1200), detached=True)
    own.hw.forget_gpu(own.hw.uuids[0])
    own.until(lambda: own.lease(lease)["end"] == "gpu_gone", "the lease outlived its GPU")
    assert len(own.get("/v1/node")["gpus"]) == 1


def test_reload_takes_over_limits_and_keeps_the_last_good_file(own: Rig) -> None:
    own.start()
    own.write("[daemon]\ncontrol = true\n[limits]\npower_limit_max_w = 400\n")
    assert own.process is not None
    own.process.send_signal(signal.SIGHUP)
    own.until(lambda: own.events("config_reloaded"), "not reloaded")
    status, answer = own.acquire(limit(500), detached=True)
    assert (status, answer["error"]["code"]) == (422, "bad_value")
    assert "200..400 W" in answer["error"]["message"]
    own.write("[daemon]\ncontrl = true\n")
    own.process.send_signal(signal.SIGHUP)
    error = own.until(lambda: own.get("/v1/node")["config_error"] or None, "not told")
    assert "contrl" in error
    assert "control" in error
    assert own.get("/v1/node")["config_reload_ok"] is False
    assert own.acquire(limit(500), detached=True)[0] == 422, "the limit of the last good file still holds"
    own.granted(limit(300), detached=True)
    own.write("[daemon]\ncontrol = false\n")
    own.process.send_signal(signal.SIGHUP)
    own.hw.wait(lambda: not own.hw.desired, "without control nothing stays set")
    assert own.acquire(limit(300), detached=True)[1]["error"]["code"] == "monitor_only"


def test_without_control_nothing_is_ever_sent(own: Rig) -> None:
    own.write("[daemon]\ncontrol = false\n")
    own.start()
    status, answer = own.acquire(pin(1200))
    assert (status, answer["error"]["code"]) == (403, "monitor_only")
    assert "control = true" in answer["error"]["hint"]
    assert own.get("/v1/node")["control"] is False
    own.stop()
    assert own.hw.tables == []
    assert own.hw.commands == []
