"""Replicas that promise shorter prompts a shorter TTFT, or only one of the two latencies: through the API, TOML and client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from powerd.client import Client
from powerd.model import Control, SloClass
from powerd.replicatypes import SloSpec
from tests.e2e import replica_rig
from tests.e2e.daemon_rig import CONFIG, Rig
from tests.e2e.replica_rig import until
from tests.replicas.engine import Endpoint, Engine

CLASSES = {"ttft_s": 5.0, "tbt_s": 0.1, "classes": [{"max_prompt_tokens": 500, "ttft_s": 1.0}]}
STRICTEST = {"ttft_s": 1.0, "tbt_s": 0.1}


@pytest.fixture
def engine() -> Iterator[Endpoint]:
    """An engine that serves as many long prompts as short ones, the long ones in 2 s."""
    one = Endpoint(Engine(running=4, prompts=[], requests_per_s=2, long_tokens=1200))
    yield one
    one.close()


def body(node: Rig, at: Endpoint, slo: Any, gpu: int = 0) -> dict[str, Any]:
    return replica_rig.body(node, at, gpu, name=f"chat-{gpu}", slo=slo, tp=8)


def register(node: Rig, at: Endpoint, slo: Any, gpu: int = 0) -> Any:
    return replica_rig.register(node, at, gpu, name=f"chat-{gpu}", slo=slo, tp=8)["replica"]


def test_long_prompts_that_may_take_longer_hold_no_clock_up(node: Rig, engine: Endpoint) -> None:
    assert register(node, engine, CLASSES)["slo"] == CLASSES
    register(node, engine, STRICTEST, gpu=1)
    strict = until(node, "2 s are later than 1 s", lambda v: v["reason"].startswith("full clock: p99 of TTFT"), "chat-1")
    assert strict["clock_mhz"] is None
    held = until(node, "no clock is held", lambda v: v["clock_mhz"] and v["reason"].startswith("least power"), "chat-0")
    assert held["within_slo"] is True
    assert "5 s" not in held["note"]
    node.hw.wait(lambda: node.hw.value(node.hw.uuids[0], Control.SM_CLOCK) is not None, "the driver was not told")
    page = node.exchange("GET", "/metrics")[1].decode()
    assert 'powerd_pool_ttft_slo_seconds{pool="chat",tp="8"} 1.0' in page

    engine.engine.long_tokens = 400  # as slow as before, and short by now: no longer prompt explains it
    until(node, "a short prompt that is late is missed", lambda v: "later than the lengths of prompts" in v["reason"], "chat-0")


@pytest.mark.parametrize(
    ("slo", "says"),
    [
        ({}, "slo promises nothing"),
        ({"tbt_s": 0.1, "classes": CLASSES["classes"]}, "slo.classes without slo.ttft_s"),
        ({"ttft_s": 1, "classes": [{"max_prompt_tokens": 500, "ttft_s": -1}]}, "slo.classes[0].ttft_s -1 is outside"),
        ({"ttft_s": 1, "classes": [{"max_prompt_tokens": 500, "ttft_s": 2}]}, "ttft_s 2 is above the 1 of longer prompts"),
        ({"ttft_s": 1, "classes": [{"max_prompt_tokens": 0, "ttft_s": 1}]}, "max_prompt_tokens 0 is not from 1"),
        (
            {"ttft_s": 9, "classes": [{"max_prompt_tokens": n, "ttft_s": 1} for n in (500, 200)]},
            "classes[0].max_prompt_tokens",
        ),
        ({"ttft_s": 9, "classes": [{"max_prompt_tokens": n + 1, "ttft_s": 1} for n in range(17)]}, "at most 16"),
        ({"ttft_s": 9, "classes": [{"max_prompt_tokens": 500}]}, "ttft_s"),
        ({"ttft_s": 9, "classes": [{"max_prompt_tokens": 500, "ttft_s": 1, "tbt": 1}]}, "unknown field slo.classes.tbt"),
        ({"ttft_s": 9, "tbt_s": 0}, "slo.tbt_s 0 is outside"),
    ],
)
def test_promises_that_cannot_be_are_refused_with_a_reason(node: Rig, engine: Endpoint, slo: Any, says: str) -> None:
    status, answer = node.request("POST", "/v1/replicas", body(node, engine, slo))
    assert (status, says in answer["error"]["message"]) == (400 if "unknown" in says else 422, True), answer
    assert (node.get("/v1/replicas"), engine.asked) == ([], 0)


def test_a_prefill_engine_is_held_to_its_ttft_and_a_decode_engine_to_its_tbt(node: Rig, engine: Endpoint) -> None:
    engine.engine.gaps = [0.5] * 5000  # before anybody looked
    with Client(node.socket) as client:
        more: dict[str, Any] = {"pool": "split", "metrics_url": engine.url, "tp": 8, "profile": "llama2-70b_h100"}
        uuids = node.hw.uuids
        with (
            client.register_replica("prefill", ttft_s=5.0, classes={500: 1.0}, gpus=[uuids[0]], **more),
            client.register_replica("decode", tbt_s=0.1, gpus=[uuids[1]], **more),
        ):
            for name in ("prefill", "decode"):
                until(node, "no clock is held", lambda v: v["clock_mhz"] and v["within_slo"], name)
            found = {view.name: view.slo for view in client.replicas()}
            assert found == {"prefill": SloSpec(5.0, None, (SloClass(500, 1.0),)), "decode": SloSpec(None, 0.1)}
            table = subprocess.run(
                [sys.executable, "-m", "powerd.cli.main", "--socket", str(node.socket), "replicas"],
                capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "COLUMNS": "400"},
            ).stdout  # fmt: skip
            assert " of 1 to 5 s" in table
            assert " of 0.1 s" in table
            engine.engine.gaps += [0.5] * 5000
            until(node, "late tokens are not noticed", lambda v: "p99 of TBT" in v["reason"], "decode")
            until(node, "late tokens are none of its business", lambda v: v["within_slo"], "prefill")


def test_classes_of_the_configuration(own: Rig, engine: Endpoint) -> None:
    node = own
    node.start()
    static = f"""
[[replica]]
name = "chat-0"
pool = "chat"
tp = 8
gpus = ["{node.hw.uuids[0]}"]
metrics_url = "{engine.url}"
ttft_s = 5
classes = [{{max_prompt_tokens = 500, ttft_s = 1.0}}]
"""

    def reload(text: str) -> None:
        before = len(node.events("config_reloaded")) + len(node.events("config_refused"))
        node.write(CONFIG + text)
        assert node.process is not None
        node.process.send_signal(signal.SIGHUP)
        node.until(lambda: len(node.events("config_reloaded")) + len(node.events("config_refused")) > before, "no reload")

    reload(static)
    view = until(node, "it is not followed", lambda v: v["static"], "chat-0")
    assert view["slo"] == {**CLASSES, "tbt_s": None}
    for wrong, says in (
        (static.replace("ttft_s = 1.0", "ttft_s = 9"), "ttft_s 9 is above the 5 of longer prompts"),
        (static.replace("ttft_s = 1.0", "ttft = 1.0"), "expected a list of {max_prompt_tokens, ttft_s}"),
        (static.replace("= 500", '= "500"'), "replica.classes.max_prompt_tokens: expected int"),
        (static.replace("ttft_s = 5\n", "").partition("classes")[0], "slo promises nothing"),
    ):
        reload(wrong)
        assert says in node.get("/v1/node")["config_error"]
    assert len(node.get("/v1/replicas")) == 1
    reload("")
