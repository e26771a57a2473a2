"""The emergency ladder over production's own parts: planner, plan over HTTP, router's core, replicas, simulated engines.

Real HTTP everywhere but between router and replicas, where Ray Serve would choose: here replicas take turns.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest

from powerd import clock as time_of
from powerd.sim import node as nodes
from powerd_integrations.fleet import settings as configured
from powerd_integrations.fleet.planner import LivePlanner
from powerd_integrations.fleet.published import Group, PlanMirror
from powerd_integrations.fleet.reporter import ArrivalCounter, PlannerLink
from powerd_integrations.fleet.server import PlannerServer
from powerd_integrations.fleet.settings import EngineSection
from powerd_integrations.fleet.steering import NobodyServesError, Steering
from powerd_integrations.ray_serve.engine import EngineReplica
from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.fleet import FleetPlan, FleetState, InstanceState, InstanceWant
from tests.integrations.fleet.rig import MODEL, Local

LONG = 2000  # tokens: half a second of an engine at TP2
FLEET = """\
[planner]
gpus = 4
tick_s = 0.05
[[groups]]
pool = "LL"
tp = 2
max_replicas = 2
[service]
planner = "http://127.0.0.1:1"
powerd = false
"""


class Told:
    """A controller that wants of queues what a test says."""

    name, period_s = "told", 0.1

    def __init__(self) -> None:
        self.resteered: frozenset[str] = frozenset()
        self.shed: dict[str, float] = {}
        self.shown: tuple[InstanceState, ...] = ()

    def decide(self, state: FleetState) -> FleetPlan:
        self.shown = state.instances
        wants = (InstanceWant(None, "LL", 2, 1980),) * 2
        return FleetPlan(wants, dict.fromkeys(NAMES, ("LL",)), resteered=self.resteered, shed=self.shed)


class Replica(EngineReplica):
    """One that a test ends by ``close``; Serve awaits ``__del__``, which Python itself would not."""

    close = EngineReplica.__del__

    def __del__(self) -> None:  # type: ignore[override]
        pass


@dataclass
class Rig:
    """Two replicas, a planner and a router; ``only`` gets all requests while it is set."""

    controller: Told
    planner: LivePlanner
    url: str
    engines: Local
    replicas: dict[str, Replica]
    router: Steering | None = None
    only: str = ""

    def __post_init__(self) -> None:
        self._turns = itertools.cycle(self.replicas)

    async def send(self, group: Group, path: str, body: dict[str, Any], headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        async for part in self.replicas[self.only or next(self._turns)].generate(path, body, headers):
            yield part

    async def ask(self, tokens: int = 5, stream: bool = True) -> int:
        """Tokens of a whole answer; NobodyServesError as the router raises it."""
        assert self.router is not None
        body = {"prompt": [1] * LONG, "max_tokens": tokens, "stream": stream}
        parts = [part async for part in self.router.answer(self.router.admit("/v1/completions", body, {}))]
        assert parts[0] == b"200"
        answer = b"".join(parts[1:])
        assert not stream or answer.endswith(b"[DONE]\n\n")
        return answer.count(b"tok ")

    async def until(self, so: Callable[[], object]) -> None:
        async with asyncio.timeout(200):
            while not so():
                await asyncio.sleep(0.05)

    async def get(self, path: str) -> str:
        def read() -> str:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                return str(answer.read().decode())

        return await asyncio.to_thread(read)


@pytest.fixture
def node() -> Iterator[nodes.SimNode]:
    made = nodes.create("h100-sxm", 4, "x4", latency=0.0, first_open_s=0.0)
    yield made
    made.close()


def run(node: nodes.SimNode, body: Callable[[Rig], Awaitable[None]]) -> None:
    node.load()
    settings, controller, stop = configured.parse(FLEET), Told(), threading.Event()
    planner = LivePlanner(controller, settings.options, groups=settings.bounds)

    async def main() -> None:
        engines, replicas = Local(node), dict[str, Replica]()
        async with AsyncExitStack() as stack:
            server = stack.enter_context(PlannerServer(("127.0.0.1", 0), planner))
            url = f"http://127.0.0.1:{server.server_address[1]}"
            service = replace(settings.service, planner=url)
            for loop in (server.serve_forever, lambda: planner.run(stop)):
                threading.Thread(target=loop, daemon=True).start()
            stack.callback(server.shutdown)
            stack.callback(stop.set)
            for name in "ab":
                handle = await engines.start(name, 2)
                stack.push_async_callback(engines.stop, handle, 60.0)
                own = replace(settings, service=service, engine=EngineSection(url=handle.url))
                replica = await asyncio.to_thread(Replica, own, settings.groups[0])
                stack.push_async_callback(replica.close)
                replicas[replica.id] = replica
            rig = Rig(controller, planner, url, engines, replicas)
            mirror, counter = PlanMirror(url, 0.05), ArrivalCounter(PlannerLink(url), period_s=0.05)
            stack.callback(mirror.close)
            stack.push_async_callback(asyncio.to_thread, counter.close)
            rig.router = Steering(replace(settings, service=service), MODEL, mirror, counter, rig.send)
            await rig.until(lambda: (plan := mirror.plan()) and len(plan.serving) == 2 and not plan.held)
            await body(rig)

    time_of.run(time_of.SimClock(node.library), main())


def test_a_clogged_replica_is_emptied_and_nobody_is_lost(node: nodes.SimNode) -> None:
    async def body(rig: Rig) -> None:
        clogged, other = rig.replicas
        at = dict(zip(rig.replicas, rig.engines.running.values(), strict=True))
        rig.only = clogged
        asked = [asyncio.create_task(rig.ask()) for _ in range(20)]
        await rig.until(lambda: at[clogged].engine.in_flight == 20)
        await rig.until(lambda: any(i.id == clogged and (i.load.oldest_wait_s or 0.0) > 0.0 for i in rig.controller.shown))
        rig.only = ""
        rig.controller.resteered = frozenset({clogged})
        await rig.until(lambda: at[clogged].engine.in_flight == 0)
        assert not all(task.done() for task in asked), "it is free before its requests are answered"
        rig.controller.resteered = frozenset({other})
        assert await asyncio.gather(*asked) == [5] * 20
        moved = at[other].engine.arrived
        assert moved > 0
        assert at[clogged].engine.arrived == 20, "nobody who was called back came there again"
        await rig.until(lambda: rig.planner.figures().resteered == moved)
        await rig.until(lambda: [event.subject for event in rig.planner.events() if event.kind == "emergency"])
        events = json.loads(await rig.get("/v1/events"))["events"]
        said = [int(event["detail"].split()[0]) for event in events if event["subject"] == clogged]
        assert sum(said) == moved
        assert f"powerd_fleet_resteered_total {float(moved)}" in await rig.get("/metrics")

    run(node, body)


def test_who_waits_too_long_is_refused_and_who_has_begun_finishes(node: nodes.SimNode) -> None:
    async def body(rig: Rig) -> None:
        clogged, _ = rig.replicas
        rig.only = clogged
        engine = next(iter(rig.engines.running.values())).engine
        began = asyncio.create_task(rig.ask(tokens=150))
        await rig.until(lambda: engine.tokens > 0)
        whole = asyncio.create_task(rig.ask(stream=False))
        rig.controller.shed = {clogged: 1.0}
        await rig.until(lambda: (plan := rig.planner.plan()).shed_after_s and plan.version)
        answers = await asyncio.gather(*(rig.ask() for _ in range(12)), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, NobodyServesError)]
        assert refused
        assert all(str(error).startswith("overload: it waited ") for error in refused)
        assert [answer for answer in answers if answer != 5 and answer not in refused] == []
        assert (await began, await whole) == (150, 5)
        assert engine.in_flight == 0
        await rig.until(lambda: rig.planner.figures().rejected == len(refused))
        assert f"powerd_fleet_rejected_total {float(len(refused))}" in await rig.get("/metrics")

    run(node, body)
