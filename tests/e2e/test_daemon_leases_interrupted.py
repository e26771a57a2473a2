"""What becomes of leases when a GPU, powerd-hw or powerd goes, control is taken back or the file changes."""

from __future__ import annotations

import json
import signal

from powerd.hw.frames import Command
from powerd.model import Control, Health, Interval
from tests.e2e.daemon_rig import Rig, closed, limit, pin

SM, POWER = Control.SM_CLOCK, Control.POWER_LIMIT


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
