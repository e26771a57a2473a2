"""A fleet in one process: real HTTP, simulated engines on a node in scaled time, engines that can be killed or be ill."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from powerd import clock as time_of
from powerd.sim import enginemodels
from powerd.sim.engine import Engine, Options, SimulatedGpus
from powerd.sim.engine.server import Fault, Server
from powerd.sim.node import SimNode
from powerd_integrations.fleet.clocks import Clocks
from powerd_integrations.fleet.front import Front, FrontOptions
from powerd_integrations.fleet.launcher import Handle, NoGpusError
from powerd_integrations.fleet.reconfigure import Reconfigurer, Times
from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.fleet import FleetPlan, InstanceWant

MODEL = enginemodels.load("llama2-70b_h100")


@dataclass
class Running:
    engine: Engine
    server: Server


@dataclass
class Local:
    """A Launcher whose engines live in this process; ``ills`` are taken one after the other by those that start."""

    node: SimNode
    ills: list[str] = field(default_factory=list)
    by_priority: bool = False
    running: dict[str, Running] = field(default_factory=dict)
    futures: dict[str, asyncio.Future[str]] = field(default_factory=dict)  # how it ended
    started: list[str] = field(default_factory=list)
    stopped: list[tuple[str, int]] = field(default_factory=list)  # and how many requests it still had

    def free(self) -> int:
        return self.node.gpus - sum(r.engine.options.tp for r in self.running.values())

    async def start(self, id_: str, tp: int) -> Handle:
        used = {g for r in self.running.values() for g in r.engine.hardware.gpus}  # type: ignore[attr-defined]
        gpus = [g for g in range(self.node.gpus) if g not in used][:tp]
        if len(gpus) < tp:
            raise NoGpusError(f"{tp} GPUs are needed, {len(gpus)} are free")
        ill = self.ills.pop(0) if self.ills else ""
        self.started.append(id_)
        engine = Engine(Options(MODEL, tp, by_priority=self.by_priority), SimulatedGpus(self.node, gpus))
        faults = (Fault(ill, 20),) if ill in ("unhealthy", "hang") else ()
        server = Server(engine, faults=faults)
        await engine.__aenter__()
        await server.__aenter__()
        self.running[id_] = Running(engine, server)
        self.futures[id_] = asyncio.get_running_loop().create_future()
        if ill == "start-fails":
            await self.kill(id_, "ended with code 1")
        return Handle(id_, server.url, tuple(map(str, gpus)))

    async def kill(self, id_: str, how: str = "was ended by signal 9") -> None:
        """End it as the kernel does: every connection at once."""
        running = self.running.pop(id_)
        runner = running.server._runner
        assert runner is not None
        assert runner.server is not None
        for site in list(runner.sites):
            await site.stop()
        for connection in runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await running.engine.close()
        await running.server.__aexit__(None, None, None)
        self.futures[id_].set_result(how)

    async def ended(self, handle: Handle) -> str:
        return await self.futures[handle.id]

    async def stop(self, handle: Handle, timeout_s: float) -> None:
        running = self.running.get(handle.id)
        if running is None:
            return
        self.stopped.append((handle.id, running.engine.in_flight))
        await running.engine.drain(timeout_s)
        await self.kill(handle.id, "ended with code 0")


@dataclass
class Rig:
    """Front, launcher and reconfigurer, and a client that says what became of its requests."""

    launcher: Local
    front: Front
    fleet: Reconfigurer
    session: aiohttp.ClientSession
    tasks: list[asyncio.Task[Answer]] = field(default_factory=list)

    def ask(self, tokens: int = 40, prompt: int = 100, stream: bool = True) -> asyncio.Task[Answer]:
        task = asyncio.create_task(ask(self.session, self.front.url, tokens, prompt, stream))
        self.tasks.append(task)
        return task

    async def load(self, seconds: float, every_s: float = 0.5, **more: Any) -> None:
        """Requests at a steady pace for so many simulated seconds."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + seconds
        while loop.time() < until_s:
            self.ask(**more)
            await asyncio.sleep(every_s)

    async def answers(self) -> list[Answer]:
        return await asyncio.gather(*self.tasks)


@dataclass
class Answer:
    status: int
    tokens: int
    complete: bool
    error: str = ""
    retry_after: str = ""


async def ask(session: aiohttp.ClientSession, url: str, tokens: int, prompt: int, stream: bool) -> Answer:
    body = {"prompt": [1] * prompt, "max_tokens": tokens, "stream": stream}
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            message = (await answer.json())["error"]["message"]
            return Answer(answer.status, 0, False, message, answer.headers.get("Retry-After", ""))
        if not stream:
            whole = await answer.json()
            return Answer(200, whole["usage"]["completion_tokens"], True)
        got, complete, error = 0, False, ""
        async for line in answer.content:
            text = line.decode().strip().removeprefix("data: ")
            if text == "[DONE]":
                complete = True
            elif text:
                event = json.loads(text)
                error = event.get("error", {}).get("message", error)
                got += sum(choice["text"].count("tok") for choice in event.get("choices", []))
        return Answer(200, got, complete, error)


def plan(*instances: tuple[str, int], clock_mhz: int = 1980, pools: tuple[str, ...] = ()) -> FleetPlan:
    """A fleet of (pool, TP); every class goes to all pools in this order."""
    names = pools or tuple(dict.fromkeys(pool for pool, _ in instances))
    return FleetPlan(tuple(InstanceWant(None, pool, tp, clock_mhz) for pool, tp in instances), dict.fromkeys(NAMES, names))


def run(
    node: SimNode, body: Callable[[Rig], Awaitable[None]], start_s: float = 100.0, clocks: Clocks | None = None, **options: Any
) -> None:
    """Run a test's body on a loop of the node's clock."""
    node.load()

    async def main() -> None:
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
            front = await stack.enter_async_context(Front(MODEL, FrontOptions(**{"queue_timeout_s": 300.0, **options})))
            launcher = Local(node)
            fleet = Reconfigurer(
                launcher, front, clocks=clocks, times=Times(start_s=start_s, drain_s=120, stop_s=30, probe_s=0.2, retry_s=0.5)
            )
            try:
                await body(Rig(launcher, front, fleet, session))
            finally:
                await fleet.close()
            tally = front.tally
            assert tally.in_flight == 0
            assert not launcher.running
            assert tally.received == sum(tally.outcomes.values())

    time_of.run(time_of.SimClock(node.library), main())
