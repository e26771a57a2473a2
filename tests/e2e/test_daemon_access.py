"""Permission by peer credentials: what another user sees, is denied, and cannot use up."""

from __future__ import annotations

import grp
import json
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.e2e.daemon_rig import Rig, limit, pin
from tests.e2e.strangers import NOBODY, Stranger, needs_root


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
