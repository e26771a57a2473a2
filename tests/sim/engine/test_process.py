"""`powerd sim engine` as a process: OpenAI over HTTP, vLLM's metrics, an end that loses nobody; and a fleet of such processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from powerd.sim import node as nodes
from powerd_integrations.fleet.front import Front
from powerd_integrations.fleet.launcher import SIMULATED, CommandLauncher
from powerd_integrations.fleet.reconfigure import Reconfigurer, Times
from tests.integrations.fleet.rig import MODEL, ask, plan

COMMAND = [sys.executable, "-m", "powerd.main", "sim", "engine"]


@pytest.fixture(scope="module")
def node() -> Iterator[nodes.SimNode]:
    with nodes.create("h100-sxm", 4, "x10") as made:
        yield made


@pytest.fixture(scope="module")
def engine(node: nodes.SimNode) -> Iterator[tuple[subprocess.Popen[str], str]]:
    words = [*COMMAND, "--gpus", "0,1", "--tp", "2", "--stream-interval", "10", "--served-model-name", "llama"]
    env = {**os.environ, **node.env()}
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["simulated"] is True
        yield process, ready["url"]
        process.kill()


def call(url: str, body: Any = None, **headers: str) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_completions_and_chat(engine: tuple[subprocess.Popen[str], str]) -> None:
    url = engine[1]
    status, text = call(f"{url}/v1/completions", {"model": "llama", "prompt": "one two  three", "max_tokens": 7})
    answer = json.loads(text)
    assert (status, answer["object"], answer["choices"][0]["finish_reason"]) == (200, "text_completion", "length")
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}
    body = {"messages": [{"role": "user", "content": "a b"}, {"role": "user", "content": [{"type": "text", "text": "c"}]}],
            "max_completion_tokens": 25, "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}}  # fmt: skip
    status, text = call(f"{url}/v1/chat/completions", body, **{"X-Stop-After": "15"})
    events = [line.removeprefix("data: ") for line in text.split("\n") if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert chunks.pop()["usage"] == {"prompt_tokens": 3, "completion_tokens": 15, "total_tokens": 18}
    assert [c["choices"][0]["delta"]["content"].count("tok") for c in chunks] == [1, 10, 4], "the first at once, then ten by ten"
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 11, 15]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "stop"]
    assert json.loads(call(f"{url}/v1/models")[1])["data"][0]["id"] == "llama"
    for wrong, status_wanted in (
        ({"prompt": "a", "model": "gpt"}, 404), ({"prompt": []}, 400), ({"prompt": "a", "max_tokens": 0}, 400),
        ({"prompt": "a", "priority": 5}, 400), ({"prompt": "a", "priority": "high"}, 400), ({"prompt": "a", "n": 2}, 400),
        ({"prompt": "a", "max_tokens": 99999}, 400), ("no object", 400),
    ):  # fmt: skip
        status, text = call(f"{url}/v1/completions", wrong)
        assert status == status_wanted
        assert json.loads(text)["error"]["message"]


def test_metrics_are_vllms(engine: tuple[subprocess.Popen[str], str]) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    url = engine[1]
    before = call(f"{url}/metrics")[1]
    call(f"{url}/v1/completions", {"prompt": [1] * 600, "max_tokens": 11})
    page = call(f"{url}/metrics")[1]
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert {family.type for name, family in families.items() if name.endswith("_seconds")} == {"histogram"}

    def value(text: str, name: str) -> float:
        family = next(f for f in text_string_to_metric_families(text) if any(s.name == name for s in f.samples))
        return sum(s.value for s in family.samples if s.name == name)

    for name, grows_by in (
        ("vllm:prompt_tokens_total", 600), ("vllm:generation_tokens_total", 11), ("vllm:time_to_first_token_seconds_count", 1),
        ("vllm:inter_token_latency_seconds_count", 10), ("vllm:request_success_total", 1),
    ):  # fmt: skip
        assert value(page, name) - value(before, name) == grows_by, name
    bounds = [s.labels["le"] for s in families["vllm:inter_token_latency_seconds"].samples if s.name.endswith("_bucket")]
    assert bounds[:4] == ["0.01", "0.025", "0.05", "0.075"]
    assert bounds[-1] == "+Inf"
    for sample in families["vllm:num_requests_running"].samples:
        assert sample.labels == {"engine": "0", "model_name": "llama"}
    gap_s = value(page, "vllm:inter_token_latency_seconds_sum") / value(page, "vllm:inter_token_latency_seconds_count")
    table = MODEL.table[2, 1980]
    assert gap_s == pytest.approx(table.iteration_s(0, 1), rel=0.001), "simulated seconds, whatever the machine does"


def test_sigterm_lets_requests_finish_and_takes_no_more(engine: tuple[subprocess.Popen[str], str]) -> None:
    process, url = engine

    async def body() -> None:
        async with aiohttp.ClientSession() as session:
            running = [asyncio.create_task(ask(session, url, 300, 10, stream)) for stream in (True, False)]
            while 'vllm:num_requests_running{engine="0",model_name="llama"} 2.0' not in call(f"{url}/metrics")[1]:
                await asyncio.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            while (await ask(session, url, 5, 5, False)).status != 503:
                await asyncio.sleep(0.01)
            assert call(f"{url}/health")[0] == 200, "as a real vLLM while it drains"
            assert [(a.complete, a.tokens) for a in await asyncio.gather(*running)] == [(True, 300), (True, 300)]

    asyncio.run(body())
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tp", "3"], "has no table for TP 3"),
        (["--gpus", "0,1", "--tp", "4"], "TP 4 needs as many GPUs, 2 are named"),
        (["--gpus", "7"], "no GPU '7'"),
        (["--model", "gpt"], "there is no engine model 'gpt'"),
        (["--fault", "sulks"], "unknown fault 'sulks'"),
    ],
)
def test_what_cannot_be_is_said(node: nodes.SimNode, words: list[str], message: str) -> None:
    done = subprocess.run([*COMMAND, *words], env={**os.environ, **node.env()}, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_engine_that_is_asked_to_die_does(node: nodes.SimNode) -> None:
    words = [*COMMAND, "--gpus", "2,3", "--tp", "2", "--fault", "die:30", "--fault", "garbage-metrics"]

    async def body(url: str) -> None:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{url}/metrics") as page:
                assert "vllm:num_requests_running{ nan" in (await page.read()).decode(errors="replace")
            with pytest.raises(aiohttp.ClientError):
                await ask(session, url, 100, 10, stream=True)

    with subprocess.Popen(words, env={**os.environ, **node.env()}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        asyncio.run(body(json.loads(process.stdout.readline())["url"]))
        assert process.wait(20) == -signal.SIGKILL
    assert node.view(2).processes == 0, "its GPUs are free at once"


def test_a_fleet_of_processes_survives_kill_minus_nine(node: nodes.SimNode) -> None:
    async def body() -> None:
        launcher = CommandLauncher(["0", "1", "2", "3"], MODEL.name, SIMULATED, env=node.env(), drain_s=100)
        async with Front(MODEL) as front, aiohttp.ClientSession() as session:
            fleet = Reconfigurer(launcher, front, times=Times(start_s=30, drain_s=30, stop_s=20, probe_s=0.05, retry_s=0.1))
            try:
                report = await fleet.apply(plan(("all", 2), ("all", 2)))
                assert report.ok, report.reason
                assert sorted(r.handle.gpus for r in fleet.replicas.values()) == [("0", "1"), ("2", "3")]
                asked = [asyncio.create_task(ask(session, front.url, 400, 10, stream=n % 2 == 0)) for n in range(8)]
                while sum(front.in_flight(id_) for id_ in fleet.replicas) < 8:
                    await asyncio.sleep(0.02)
                await asyncio.sleep(0.5)  # some have tokens by then, and none has all: only the killed engine could tell
                victim = next(iter(fleet.replicas.values()))
                streams = front.in_flight(victim.id)
                assert victim.handle.pid is not None
                os.kill(victim.handle.pid, signal.SIGKILL)
                answers = await asyncio.gather(*asked)
                broken = [a for a in answers if not a.complete]
                assert all(0 < a.tokens < 400 and "the engine failed in mid-answer" in a.error for a in broken)
                assert front.tally.outcomes == {"answered": 8 - len(broken), "failed": len(broken)}
                assert front.tally.retried + len(broken) == streams
                assert 0 < len(broken) < 8
                while len(fleet.replicas) < 2 or victim.id in fleet.replicas:
                    await asyncio.sleep(0.05)
                assert (await ask(session, front.url, 5, 5, True)).complete
            finally:
                await fleet.close()
        assert launcher.free() == 4

    asyncio.run(body())
