"""Registering inference replicas with the daemon: what is refused, whose they are, and everything that ends one."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

from powerd.client import Client
from powerd.errors import UnavailableError
from tests.e2e.daemon_rig import Rig, rig
from tests.e2e.replica_rig import PROFILE, SLO, body, controlled, register, seen, until_full
from tests.e2e.strangers import Stranger, needs_root
from tests.replicas.engine import Endpoint


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"metrics_url": "http://169.254.169.254/latest"}, 422, "is not this host"),
        ({"metrics_url": "file:///etc/passwd"}, 422, "http, a host"),
        ({"gpus": ["GPU-0"]}, 404, "no GPU"),
        ({"gpus": []}, 422, "no GPUs"),
        ({"slo": {"ttft_s": 0, "tbt_s": 0.1}}, 422, "slo.ttft_s 0 is outside"),
        ({"slo": {}}, 422, "slo promises nothing"),
        ({"tp": 0}, 422, "tp 0 is outside"),
        ({"tp": 16}, 422, "holds no clock for tensor parallelism 16: it holds"),
        ({"chunk_tokens": 0}, 422, "chunk_tokens 0 is outside"),
        ({"engine": "triton"}, 422, "is none of auto, vllm, sglang"),
        ({"profile": "llama2_h100"}, 422, "no engine profile"),
        ({"profile": "../../etc/passwd"}, 422, "no engine profile"),
        ({"pool": 'chat"} 1\nx{y="'}, 422, "letters, digits"),
        ({"name": ""}, 422, "letters, digits"),
        ({"ttl_s": 1e9}, 422, "ttl_s"),
        ({"clock_mhz": 210}, 400, "unknown field clock_mhz"),
    ],
)
def test_what_cannot_be_registered_is_refused_with_a_reason_and_changes_nothing(
    node: Rig, engine: Endpoint, change: dict[str, Any], status: int, says: str
) -> None:
    code, answer = node.request("POST", "/v1/replicas", body(node, engine, **change))
    assert (code, node.get("/v1/replicas"), node.get("/v1/leases")) == (status, [], [])
    assert says in answer["error"]["message"]
    assert engine.asked == 0


def test_a_gpu_has_one_replica_and_a_name_one_owner_who_may_replace_it(node: Rig, engine: Endpoint) -> None:
    first = register(node, engine)
    code, answer = node.request("POST", "/v1/replicas", body(node, engine, name="other"))
    assert (code, answer["error"]["code"]) == (409, "conflict")
    second = register(node, engine, gpu=1)
    assert [r["id"] for r in node.get("/v1/replicas")] == [second["lease"]["id"]]
    assert node.lease(first["lease"])["end"] == "released"
    register(node, engine, name="other")


def test_a_replica_ends_as_any_lease_does_by_release_ttl_and_connection(node: Rig, engine: Endpoint) -> None:
    answer = register(node, engine)
    controlled(node)
    assert node.request("DELETE", f"/v1/leases/{answer['lease']['id']}")[0] == 200
    until_full(node)
    assert node.get("/v1/replicas") == []
    register(node, engine, ttl_s=0.7)
    node.until(lambda: not node.get("/v1/replicas"), "its TTL does not end it")
    answer = register(node, engine, detached=False)
    link, _ = node.attach(answer["lease"])
    controlled(node)
    link.close()
    until_full(node)
    assert node.get("/v1/replicas") == []
    assert [e["detail"] for e in node.events("replica_released")][-3:] == ["released", "expired", "connection_closed"]


_HOLDER = """
import sys, time
from powerd.client import Client
from powerd.errors import UnavailableError
with Client(sys.argv[1]).register_replica("chat-0", pool="chat", metrics_url=sys.argv[2], ttft_s=0.5, tbt_s=0.1, gpus=[0], tp=4,
                                          profile="llama2-70b_h100") as replica:
    print(replica.id, flush=True)
    sys.stdin.read()
"""


def test_a_killed_holder_takes_its_replica_along(node: Rig, engine: Endpoint) -> None:
    command = [sys.executable, "-c", _HOLDER, str(node.socket), engine.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        lease_id = holder.stdout.readline().strip()
        assert controlled(node)["id"] == lease_id
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        until_full(node)
    assert node.get("/v1/replicas") == []
    assert node.get(f"/v1/leases/{lease_id}")["end"] in ("holder_died", "connection_closed"), "whichever the kernel tells first"


def test_the_client_registers_again_after_a_panic_and_powerctl_shows_it(node: Rig, engine: Endpoint) -> None:
    client = Client(node.socket)
    with client.register_replica(
        "chat-0", pool="chat", metrics_url=engine.url, gpus=[0], tp=4, profile=PROFILE, **SLO
    ) as replica:
        first = replica.id
        controlled(node)
        assert client.replicas()[0].id == first
        assert client.replicas()[0].slo.tbt_s == 0.1
        table = subprocess.run(
            [sys.executable, "-m", "powerd.cli.main", "--socket", str(node.socket), "replicas"], capture_output=True, text=True,
            env={"COLUMNS": "200", "PATH": ""}, timeout=60,
        )  # fmt: skip
        assert table.returncode == 0, table.stderr
        assert re.search(r"chat-0 +chat +4 +0 +fresh +\d+ MHz +2 +0 ", table.stdout), table.stdout
        assert node.request("POST", "/v1/panic")[0] == 200
        until_full(node)
        assert node.get("/v1/replicas") == []
        assert node.request("POST", "/v1/resume")[0] == 200
        node.until(lambda: replica.held and replica.id != first and seen(node), "it does not come back")
        controlled(node)
    node.until(lambda: not node.get("/v1/replicas"), "it is not released")


def test_a_launcher_that_only_logs_starts_without_a_daemon_and_is_registered_with_one(own: Rig, engine: Endpoint) -> None:
    asked: dict[str, Any] = {"pool": "chat", "metrics_url": engine.url, "gpus": [0], "tp": 4, "profile": PROFILE, **SLO}
    with Client(own.socket, on_error="log").register_replica("chat-0", **asked) as replica:
        assert (replica.held, replica.id) == (False, "")
        own.start()
        assert controlled(own)["id"] == replica.id
        assert replica.held
    with pytest.raises(UnavailableError), rig() as nobody:
        Client(nobody.socket).register_replica("chat-0", **asked)


@needs_root
def test_another_user_registers_none_and_sees_none(node: Rig, engine: Endpoint) -> None:
    register(node, engine)
    controlled(node)
    asked = json.dumps(body(node, engine, gpu=1, name="theirs"))
    with Stranger(node, "/v1/replicas", "POST", asked) as stranger:
        status, answer = stranger.ask()
    assert (status, answer["error"]["code"]) == (403, "denied")
    with Stranger(node, "/v1/replicas") as stranger:
        assert stranger.ask() == (200, [])
    with Stranger(node, "/v1/events?limit=1000") as stranger:
        kinds = {event["kind"] for event in stranger.ask()[1]}
    assert not {kind for kind in kinds if kind.startswith("replica")}
