"""Inference replicas in the daemon: held at the lowest clock while all is well, and at none as soon as it is not."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from powerd.client import Client
from powerd.errors import UnavailableError
from powerd.model import Control, Interval
from powerd.policytable import InstanceLoad, Slo, instance_policy
from tests.e2e.daemon_rig import CONFIG, Rig, closed, pin, rig
from tests.e2e.test_daemon_api import Stranger, needs_root
from tests.replicas.engine import Endpoint, Engine

FAST = """
[replicas]
scrape_s = 0.1
stale_s = 0.8
good_scrapes = 2
window_s = 1
park_after_s = 0.5
"""
SLO = {"ttft_s": 0.5, "tbt_s": 0.1}
PROFILE = "llama2-70b_h100"
HIGHEST = 1980  # of this profile, and of the fake card
_POLICY = instance_policy(PROFILE, "", 4, Slo(0.5, 0.1), range(210, 1981, 15), 1.0, 1.0)
PARKED = [_POLICY.clock(float(second), InstanceLoad()).clock_mhz for second in range(10)][-1]


@pytest.fixture(scope="module")
def shared() -> Iterator[Rig]:
    with rig(gpus=3) as made:
        made.write(CONFIG + FAST)
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
        made.write(CONFIG + FAST)
        yield made


def busy() -> Engine:
    return Engine(running=2, prompt_tokens=1000, requests_per_s=5)


@pytest.fixture
def engine() -> Iterator[Endpoint]:
    """An engine that decodes two requests, far within its SLO."""
    one = Endpoint(busy())
    yield one
    one.close()


def body(node: Rig, at: Endpoint, gpu: int = 0, **more: Any) -> dict[str, Any]:
    asked = {"name": "chat-0", "pool": "chat", "gpus": node.hw.uuids[gpu : gpu + 1], "metrics_url": at.url, "slo": SLO, "tp": 4}
    return {**asked, "profile": PROFILE, "detached": True, **more}


def register(node: Rig, engine: Endpoint, gpu: int = 0, **more: Any) -> Any:
    status, answer = node.request("POST", "/v1/replicas", body(node, engine, gpu, **more))
    assert status == 200, answer
    return answer


def seen(node: Rig, name: str = "chat-0") -> Any:
    return next((r for r in node.get("/v1/replicas") if r["name"] == name), {})


def until(node: Rig, what: str, condition: Callable[[Any], Any], name: str = "chat-0") -> Any:
    def look() -> Any:
        view = seen(node, name)
        return view if view and condition(view) else None

    return node.until(look, f"{what}: {node.request('GET', '/v1/replicas')}")


def held(node: Rig, gpu: int = 0) -> Interval | None:
    return node.hw.value(node.hw.uuids[gpu], Control.SM_CLOCK)


def until_full(node: Rig, gpu: int = 0) -> None:
    node.hw.wait(lambda: held(node, gpu) is None, "it is still held")


def controlled(node: Rig) -> Any:
    """Once the driver was told what the daemon shows, which may change with every look."""
    return until(node, "it was never controlled", lambda v: v["clock_mhz"] and held(node) == Interval(210, v["clock_mhz"]))


def test_a_busy_replica_is_held_at_the_clock_that_its_profile_decides_and_explain_says_so(node: Rig, engine: Endpoint) -> None:
    answer = register(node, engine)
    assert answer["replica"]["state"] == "starting"
    assert answer["replica"]["clock_mhz"] is None
    assert answer["lease"]["token"]
    view = controlled(node)
    assert view["state"] == "fresh"
    assert PARKED < view["clock_mhz"] < HIGHEST
    assert (view["running"], view["waiting"], view["engine"], view["user"]) == (2, 0, "vllm", answer["lease"]["user"])
    assert view["age_s"] < 1
    assert view["note"] == "the profile is of h100, the GPU is Test GPU"
    assert 300 < view["power_w"] < 301, "as the fake card draws"
    explained = node.get(f"/v1/explain/{node.hw.uuids[0]}")
    clock = next(c for c in explained["controls"] if c["control"] == "sm_clock")
    assert clock["setpoint"]["winner"] == view["id"] == answer["lease"]["id"]
    assert clock["setpoint"]["reason"].startswith("replica chat-0 of pool chat: least power that keeps TTFT and TBT")
    node.until(lambda: seen(node)["within_slo"] and seen(node)["ttft_p99_s"] == 0.25, "its latencies are not seen")
    node.until(lambda: (seen(node)["energy_j"] or 0) > 0, "no energy was counted")


def test_a_replica_without_work_is_parked_and_wakes_with_the_next_request(node: Rig, engine: Endpoint) -> None:
    engine.engine.running = 0
    register(node, engine)
    until(node, "it was not parked", lambda v: v["state"] == "idle" and v["clock_mhz"] == PARKED)
    node.hw.wait(lambda: held(node) == Interval(210, PARKED), "the driver was not told")
    assert node.events("replica_parked")[-1]["subject"] == "chat-0"
    engine.engine.waiting = 8
    engine.engine.running = 40
    node.hw.wait(lambda: held(node) is None or held(node).high > PARKED, "it sleeps on")
    until(node, "it is not awake", lambda v: v["state"] == "fresh" and v["clock_mhz"] != PARKED)


def test_a_pool_without_a_profile_is_only_parked(node: Rig, engine: Endpoint) -> None:
    register(node, engine, profile=None)
    view = until(node, "it is not followed", lambda v: v["state"] == "fresh")
    assert (view["clock_mhz"], view["reason"]) == (None, "no profile: full clock while there is work")
    engine.engine.running = 0
    until(node, "it was not parked", lambda v: v["clock_mhz"] == HIGHEST / 2)


def test_an_endpoint_that_is_gone_means_full_clock_until_it_is_back_for_a_while(node: Rig, engine: Endpoint) -> None:
    register(node, engine)
    controlled(node)
    engine.close()
    until_full(node)
    view = until(node, "it is not stale", lambda v: v["state"] == "stale")
    assert view["clock_mhz"] is None
    assert view["running"] is None, "an old figure is none"
    assert "onnect" in view["note"]
    stale = node.events("replica_stale")[-1]
    assert (stale["subject"], stale["data"]["lease"]) == ("chat-0", view["id"])
    back = Endpoint(busy(), port=engine.port)
    controlled(node)
    assert node.events("replica_recovered")[-1]["subject"] == "chat-0"
    back.close()


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (lambda e: setattr(e, "running", float("nan")), "nan cannot be"),
        (lambda e: setattr(e, "waiting", -3), "-3 cannot be"),
        (lambda e: setattr(e, "prompt_tokens", 1), "its counters have restarted"),
    ],
    ids=["nan", "negative", "restart"],
)
def test_a_page_that_cannot_be_means_full_clock_at_once(
    node: Rig, engine: Endpoint, broken: Callable[[Engine], None], why: str
) -> None:
    register(node, engine)
    controlled(node)
    broken(engine.engine)
    until_full(node)
    node.until(lambda: any(why in e["detail"] for e in node.events("replica_stale")), "nobody was told why")
    engine.engine.running, engine.engine.waiting = 2, 0
    controlled(node)


def test_garbage_and_a_hung_engine_hold_up_nobody(node: Rig, engine: Endpoint) -> None:
    register(node, engine)
    controlled(node)
    engine.text = b"\x00\xff" * 1_000_000
    until_full(node)
    engine.text, engine.release = None, type(engine.release)()
    until(node, "a hung engine is not noticed", lambda v: v["note"] == "no answer in time")
    assert node.get("/healthz")["ok"]
    assert seen(node)["state"] == "stale"
    engine.release.set()


def test_a_missed_slo_means_full_clock_while_it_is_missed(node: Rig, engine: Endpoint) -> None:
    register(node, engine)
    controlled(node)
    engine.engine.ttft += [5.0] * 10
    until_full(node)
    view = until(node, "the miss is not seen", lambda v: v["within_slo"] is False)
    assert view["ttft_p99_s"] == 5.0
    assert view["reason"] == "full clock: p99 of TTFT is up to 5 s, the SLO 0.5 s"
    view = controlled(node)
    assert "since the SLO was missed" in view["reason"]


def test_the_metrics_page_shows_pools_and_openapi_the_route(node: Rig, engine: Endpoint) -> None:
    register(node, engine)
    register(node, engine, gpu=1, name="chat-1")
    for name in ("chat-0", "chat-1"):
        until(node, "it is not followed", lambda v: v["state"] == "fresh" and v["clock_mhz"], name)
    page = node.exchange("GET", "/metrics")[1].decode()
    assert 'powerd_pool_replicas{pool="chat",tp="4"} 2.0' in page
    assert 'powerd_pool_requests_running{pool="chat",tp="4"} 4.0' in page
    assert re.search(r'powerd_pool_power_watts{pool="chat",tp="4"} 60[01]\.', page)
    assert 'powerd_replica_fresh{pool="chat",replica="chat-1"} 1.0' in page
    assert "/v1/replicas" in node.get("/openapi.json")["paths"]


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


def test_a_site_limit_above_the_parking_clock_is_kept_to(own: Rig, engine: Endpoint) -> None:
    own.write(CONFIG + FAST + "[limits]\nsm_clock_min_mhz = 1004\n")
    own.start()
    engine.engine.running = 0
    register(own, engine)
    own.hw.wait(lambda: held(own) == Interval(1005, 1005), "not parked within the site's limits")
    assert own.events("want_refused") == []


def test_a_daemon_that_only_monitors_shows_replicas_and_sets_nothing(own: Rig, engine: Endpoint) -> None:
    own.write(FAST)
    own.start()
    register(own, engine)
    view = until(own, "it is not followed", lambda v: v["state"] == "fresh")
    assert view["clock_mhz"] is None
    assert view["reason"].startswith("monitor only")
    view = until(own, "it does not say what it would do", lambda v: "least power" in v["reason"])
    assert view["running"] == 2
    assert own.hw.tables == [], "nothing was ever sent"


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
    own.write(CONFIG + FAST + static(own, engine, 0, "chat-0"))
    own.start()
    view = controlled(own)
    assert (view["static"], view["user"]) == (True, "configuration")
    assert own.request("POST", "/v1/replicas", body(own, engine, gpu=1))[0] == 409, "its name is taken"

    reload(own, CONFIG + FAST + static(own, engine, 0, "chat-0") + static(own, engine, 1, "chat-1"))
    until(own, "the second did not come", lambda v: v["clock_mhz"], "chat-1")
    assert seen(own)["id"] == view["id"], "the first goes on"

    reload(own, CONFIG + FAST + static(own, engine, 1, "chat-1", metrics_url="http://10.0.0.1/metrics"))
    assert "is not this host" in own.get("/v1/node")["config_error"]
    assert len(own.get("/v1/replicas")) == 2, "a file that is wrong changes nothing"

    reload(own, CONFIG + FAST + static(own, engine, 1, "chat-1"))
    until_full(own)
    assert [r["name"] for r in own.get("/v1/replicas")] == ["chat-1"]
    assert held(own, 1) is not None

    assert own.request("POST", "/v1/panic")[0] == 200
    until_full(own, 1)
    assert own.request("POST", "/v1/resume")[0] == 200
    own.hw.wait(lambda: held(own, 1) is not None, "it does not come back after panic")


def test_a_static_replica_on_a_gpu_that_is_not_there_waits_and_says_so(own: Rig, engine: Endpoint) -> None:
    own.write(CONFIG + FAST + static(own, engine, 0, "chat-0", gpus=["GPU-0"]))
    own.start()
    own.until(lambda: own.events("replica_refused"), "nobody was told")
    assert "no GPU" in own.events("replica_refused")[0]["detail"]
    reload(own, CONFIG + FAST + static(own, engine, 0, "chat-0"))
    controlled(own)


def test_new_settings_hold_for_running_replicas(own: Rig, engine: Endpoint) -> None:
    own.start()
    answer = register(own, engine)
    controlled(own)
    reload(own, CONFIG + FAST.replace("park_after_s = 0.5", "park_after_s = 600"))
    view = until(own, "it is not followed on", lambda v: v["state"] == "fresh")
    assert view["id"] == answer["lease"]["id"]
    until_full(own)


def test_a_killed_powerd_takes_its_replicas_up_again_at_full_clock(own: Rig, engine: Endpoint) -> None:
    own.write(CONFIG + FAST + static(own, engine, 1, "chat-1"))
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


def test_a_replica_and_a_lease_on_the_same_gpu_follow_the_lower_ceiling(node: Rig, engine: Endpoint) -> None:
    register(node, engine)
    controlled(node)
    lease = node.granted(pin(1005), detached=True)
    node.hw.wait(lambda: held(node) == Interval(1005, 1005), "the lower one does not win")
    node.request("DELETE", f"/v1/leases/{lease['id']}")
    assert controlled(node)["clock_mhz"] > 1005
