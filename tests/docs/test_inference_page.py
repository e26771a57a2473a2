"""docs/inference.md: its request is taken, its names are those that are read, its configuration is one that can be followed."""

from __future__ import annotations

import json
import re

from powerd import config
from powerd.enginepage import ENGINES
from powerd.replicacheck import check_replicas
from tests.docs import markdown
from tests.docs.markdown import ROOT
from tests.e2e.live import LiveNode

PAGE = ROOT / "docs" / "inference.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_request_of_the_page_is_taken_renewed_and_released(live: LiveNode) -> None:
    (block,) = [b for b in markdown.blocks("json") if b.page == PAGE]
    request = json.loads(block.text)
    known = [gpu["gpu"]["uuid"] for gpu in live.http("GET", "/v1/node").json()["gpus"]]
    answer = live.http("POST", "/v1/replicas", {**request, "gpus": known[: len(request["gpus"])]}).json()
    assert answer["replica"]["name"] == request["name"]
    lease, token = answer["lease"], {"Powerd-Lease-Token": answer["lease"]["token"]}
    assert live.http("POST", f"/v1/leases/{lease['id']}/heartbeat", **token).code == 200
    assert [r["id"] for r in live.http("GET", "/v1/replicas").json()] == [lease["id"]]
    assert live.http("DELETE", f"/v1/leases/{lease['id']}", **token).code == 200
    assert live.http("GET", "/v1/replicas").json() == []


def test_the_configuration_of_the_page_can_be_followed() -> None:
    (block,) = [b for b in markdown.blocks("toml") if b.page == PAGE]
    parsed = config.parse(block.text)
    assert len(parsed.replica) == 1
    check_replicas(parsed)


def test_the_names_of_the_page_are_those_that_are_read() -> None:
    shown = set(re.findall(r"`((?:vllm|sglang):\w+)`", TEXT))
    read = set()
    for names in ENGINES.values():
        read |= {names.running, names.waiting, names.kv_used[0], names.ttft, names.gap[0]}
        read |= {names.prompt_tokens, names.output_tokens, names.preemptions, names.prompts}
    assert shown == read


def test_the_events_of_the_page_are_those_that_are_told() -> None:
    source = "".join((ROOT / "powerd" / f"{name}.py").read_text(encoding="utf-8") for name in ("replicas", "replica"))
    told = set(re.findall(r'"(replica_[a-z]+)"', source)) - {"replica_failed"}
    assert set(re.findall(r"`(replica_[a-z]+)`", TEXT)) == told
