"""A replica on a fake engine, registered with a powerd, and what a test waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from powerd.model import Control, Interval
from powerd.policytable import InstanceLoad, Slo, instance_policy
from tests.e2e.daemon_rig import Rig
from tests.replicas.engine import Endpoint, Engine

SLO: dict[str, Any] = {"ttft_s": 0.5, "tbt_s": 0.1}
PROFILE = "llama2-70b_h100"
HIGHEST = 1980  # of this profile, and of the fake card
_POLICY = instance_policy(PROFILE, "", 4, Slo(0.5, 0.1), range(210, 1981, 15), 1.0, 1.0)
PARKED = [_POLICY.clock(float(second), InstanceLoad()).clock_mhz for second in range(10)][-1]


def busy() -> Engine:
    return Engine(running=2, prompt_tokens=1000, requests_per_s=5)


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
