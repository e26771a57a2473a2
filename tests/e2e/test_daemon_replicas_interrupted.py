"""Inference replicas over a reload of the configuration, which may name some itself, and over a restart of powerd."""

from __future__ import annotations

import json
import signal
from typing import Any

from tests.e2e.daemon_rig import CONFIG, Rig, closed
from tests.e2e.replica_rig import SLO, body, controlled, held, register, seen, until, until_full
from tests.replicas.engine import Endpoint


def static(node: Rig, engine: Endpoint, gpu: int, name: str, **more: Any) -> str:
    row = {**body(node, engine, gpu, name=name), **SLO, **more}
    del row["slo"], row["detached"]
    return "[[replica]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in row.items())


def reload(node: Rig, text: str) -> None:
    before = len(node.events("config_reloaded")) + len(node.events("config_refused"))
    node.write(text)
    assert node.process is not None
    node.process.send_signal(signal.SIGHUP)
    node.until(lambda: len(node.events("config_reloaded")) + len(node.events("config_refused")) > before, "no reload")


def test_replicas_of_the_configuration_come_and_go_with_it(own: Rig, engine: Endpoint) -> None:
    own.write(CONFIG + static(own, engine, 0, "chat-0"))
    own.start()
    view = controlled(own)
    assert (view["static"], view["user"]) == (True, "configuration")
    assert own.request("POST", "/v1/replicas", body(own, engine, gpu=1))[0] == 409, "its name is taken"

    reload(own, CONFIG + static(own, engine, 0, "chat-0") + static(own, engine, 1, "chat-1"))
    until(own, "the second did not come", lambda v: v["clock_mhz"], "chat-1")
    assert seen(own)["id"] == view["id"], "the first goes on"

    reload(own, CONFIG + static(own, engine, 1, "chat-1", metrics_url="http://10.0.0.1/metrics"))
    assert "is not this host" in own.get("/v1/node")["config_error"]
    assert len(own.get("/v1/replicas")) == 2, "a file that is wrong changes nothing"

    reload(own, CONFIG + static(own, engine, 1, "chat-1"))
    until_full(own)
    assert [r["name"] for r in own.get("/v1/replicas")] == ["chat-1"]
    assert held(own, 1) is not None

    assert own.request("POST", "/v1/panic")[0] == 200
    until_full(own, 1)
    assert own.request("POST", "/v1/resume")[0] == 200
    own.hw.wait(lambda: held(own, 1) is not None, "it does not come back after panic")


def test_a_static_replica_on_a_gpu_that_is_not_there_waits_and_says_so(own: Rig, engine: Endpoint) -> None:
    own.write(CONFIG + static(own, engine, 0, "chat-0", gpus=["GPU-0"]))
    own.start()
    own.until(lambda: own.events("replica_refused"), "nobody was told")
    assert "no GPU" in own.events("replica_refused")[0]["detail"]
    reload(own, CONFIG + static(own, engine, 0, "chat-0"))
    controlled(own)


def test_new_settings_hold_for_running_replicas(own: Rig, engine: Endpoint) -> None:
    own.start()
    answer = register(own, engine)
    controlled(own)
    reload(own, CONFIG.replace("park_after_s = 0.5", "park_after_s = 600"))
    view = until(own, "it is not followed on", lambda v: v["state"] == "fresh")
    assert view["id"] == answer["lease"]["id"]
    until_full(own)


def test_a_killed_powerd_takes_its_replicas_up_again_at_full_clock(own: Rig, engine: Endpoint) -> None:
    own.write(CONFIG + static(own, engine, 1, "chat-1"))
    own.start()
    bound = register(own, engine, detached=False)
    link, _ = own.attach(bound["lease"])
    controlled(own)
    own.stop(signal.SIGKILL)
    assert closed(link)
    engine.status = 503  # whatever it did before: from now on nobody knows how it is
    own.start(wait=False)
    own.until(lambda: own.get("/v1/leases"), "it does not come up")
    link, lease = own.attach(bound["lease"])
    assert lease["id"] == bound["lease"]["id"]
    until_full(own)
    assert until(own, "it is not listed", lambda v: v["state"] == "starting")["clock_mhz"] is None
    engine.status = 200
    assert controlled(own)["id"] == bound["lease"]["id"]
    until(own, "the configuration's own did not come back", lambda v: v["static"] and v["clock_mhz"], "chat-1")
    link.close()


def test_a_holder_that_does_not_come_back_after_a_restart_loses_its_replica(own: Rig, engine: Endpoint) -> None:
    own.start()
    link, _ = own.attach(register(own, engine, detached=False)["lease"])
    controlled(own)
    own.stop(signal.SIGKILL)
    own.start()
    own.until(lambda: not own.get("/v1/replicas") and not own.get("/v1/leases"), "it is still there")
    until_full(own)
    link.close()
