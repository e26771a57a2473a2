"""The front before engines that answer as a real vLLM did: bytes stay bytes, a bad request is nobody's fault but its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest

from powerd_integrations.fleet import sse
from powerd_integrations.fleet.front import Front, FrontOptions
from powerd_integrations.fleet.launcher import CommandLauncher
from powerd_policies.dynamollm.fleet import InstanceState
from tests.integrations.fleet.rig import MODEL, plan
from tests.replicas.answering import Answering, body_of, recorded

Asked = tuple[int, str, bytes]


def run(body: Callable[[Front, list[Answering], Ask], Awaitable[None]], *answers: str) -> None:
    """A front before two engines that give these answers, one after the other."""

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            engines = [await stack.enter_async_context(Answering(*answers)) for _ in range(2)]
            front = await stack.enter_async_context(Front(MODEL, FrontOptions(queue_timeout_s=5.0, probe_s=0.05)))
            session = await stack.enter_async_context(aiohttp.ClientSession())
            names = [f"r{number}" for number in range(len(engines))]
            states = [InstanceState(name, "all", 2, 1980, "serving") for name in names]
            front.update(plan(("all", 2), ("all", 2)), states, dict(zip(names, (e.url for e in engines), strict=True)))
            async with asyncio.timeout(20):
                await body(front, engines, Ask(front, session))

    asyncio.run(main())


class Ask:
    """A client of the front."""

    def __init__(self, front: Front, session: aiohttp.ClientSession) -> None:
        self._front, self._session = front, session
        self.begun = asyncio.Event()

    async def __call__(self) -> Asked:
        body = {"model": "tiny", "prompt": [65], "max_tokens": 24, "stream": True}
        async with self._session.post(f"{self._front.url}/v1/completions", json=body) as answer:
            first = await answer.content.readany()
            self.begun.set()
            return answer.status, answer.headers["Content-Type"], first + await answer.read()

    async def get(self, path: str) -> tuple[int, bytes]:
        async with self._session.get(f"{self._front.url}{path}") as answer:
            return answer.status, await answer.read()


@pytest.mark.parametrize(
    ("name", "status", "outcome"),
    [
        ("stream", 200, "answered"),
        ("plain", 200, "answered"),
        ("out-of-vocabulary", 200, "rejected"),
        ("too-long", 400, "rejected"),
        ("no-such-model", 404, "rejected"),
    ],
)
def test_an_answer_is_passed_on_byte_by_byte_and_a_refusal_is_no_fault_of_the_engine(
    name: str, status: int, outcome: str
) -> None:
    async def body(front: Front, engines: list[Answering], ask: Ask) -> None:
        for _ in range(3):
            assert await ask() == (status, _kind(name), body_of(recorded(name)))
        assert (await ask.get("/health"))[0] == 200
        assert front.tally.outcomes == {outcome: 3}
        assert front.tally.retried == 0
        assert sum(len(engine.asked) for engine in engines) == 3, "nobody else was asked"

    run(body, name)


def _kind(name: str) -> str:
    head = recorded(name).partition(b"\r\n\r\n")[0].decode().lower()
    return next(line.partition(": ")[2] for line in head.split("\r\n") if line.startswith("content-type"))


def test_an_engine_that_dies_in_mid_answer_and_says_so_has_failed() -> None:
    async def body(front: Front, engines: list[Answering], ask: Ask) -> None:
        for engine in engines:
            engine.gate.clear()
        asking = asyncio.create_task(ask())
        await ask.begun.wait()
        for engine in engines:
            engine.gate.set()
        assert await asking == (200, _kind("core-killed"), body_of(recorded("core-killed")))
        assert front.tally.outcomes == {"failed": 1}
        dead = next(number for number, engine in enumerate(engines) if engine.asked)
        engines[1 - dead].answers = [recorded("stream")]
        assert (await ask())[2] == body_of(recorded("stream")), "the other one is asked"

    run(body, "core-killed")


def test_an_engine_that_dies_before_anything_was_passed_on_costs_nothing() -> None:
    async def body(front: Front, engines: list[Answering], ask: Ask) -> None:
        engines[1].answers = [recorded("stream")]
        for _ in range(2):
            assert (await ask())[2] == body_of(recorded("stream"))
        assert front.tally.outcomes == {"answered": 2}

    run(body, "core-killed")


def test_the_front_names_the_model_that_its_engines_know() -> None:
    async def body(front: Front, engines: list[Answering], ask: Ask) -> None:
        assert await ask.get("/v1/models") == (200, body_of(recorded("models")))
        front.update(plan(), [], {})
        status, text = await ask.get("/v1/models")
        assert (status, json.loads(text)["data"][0]["id"]) == (200, MODEL.name), "while there are none"

    run(body, "stream")


def test_a_failure_before_the_first_event_is_told_however_it_is_cut() -> None:
    whole = b': alive\n\ndata: {"error": {"message": "EngineCore is gone", "code": 500}}\n\ndata: [DONE]\n\n'
    for at in range(len(whole)):
        watch = sse.Watch()
        watch.take(whole[:at])
        watch.take(whole[at:])
        assert (watch.events, watch.done, watch.error) == (2, True, sse.EngineError("EngineCore is gone", 500))


WITH_A_WORKER = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
if sys.argv[1] == "hangs":
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["hangs", "ends"])
def test_an_engine_that_ended_leaves_no_worker_behind(how: str, tmp_path: Path) -> None:
    """vLLM's workers outlive it when it or its core is killed, and go on holding the GPUs' memory."""

    async def body() -> None:
        launcher = CommandLauncher(["0"], "tiny", [sys.executable, "-c", WITH_A_WORKER, how], logs=tmp_path)
        handle = await launcher.start("e", 1)
        assert handle.pid is not None
        while not (told := (tmp_path / "e.log").read_text()).endswith("\n"):
            await asyncio.sleep(0.01)
        if how == "hangs":
            os.kill(handle.pid, signal.SIGKILL)
        assert await launcher.ended(handle) == ("was ended by signal 9" if how == "hangs" else "ended with code 0")
        assert launcher.free() == 1
        async with asyncio.timeout(20):
            while _alive(int(told)):
                await asyncio.sleep(0.01)

    asyncio.run(body())


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
