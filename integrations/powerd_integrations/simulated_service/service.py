"""One policy serves one trace: front, replicas, controller and powerd together, from the first start to the last answer.

House rules: the controller is told what a real one could know, and nothing of the trace to come; energy is powerd's, measured
by windows around the replay; every sample is of one moment.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any

from powerd.client import Client
from powerd_integrations.fleet.clocks import Clocks, LeaseClocks, ReplicaClocks
from powerd_integrations.fleet.front import Front, FrontOptions
from powerd_integrations.fleet.reconfigure import Reconfigurer, Times
from powerd_integrations.simulated_service.replicas import InProcess
from powerd_integrations.simulated_service.requests import Planned, Seen, replay
from powerd_policies.dynamollm.classes import Classes, Slo
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import FleetController, FleetState
from powerd_policies.dynamollm.router import Router

Say = Callable[..., None]
SAMPLE_S = 5.0


@dataclass(frozen=True)
class Setting:
    """What all policies share."""

    model: EngineModel
    classes: Classes
    requests: Sequence[Planned]
    predict: Callable[[int, int], int]  # output tokens of a prompt
    start_s: float


@dataclass(frozen=True)
class Served:
    """What became of a trace under one policy."""

    policy: str
    seconds: float
    energy_j: float | None
    energy_low_j: float | None
    energy_high_j: float | None
    outcomes: dict[str, int]
    retried: int
    events: list[dict[str, Any]]
    seen: list[Seen]


async def serve(
    controller: FleetController, setting: Setting, launcher: InProcess, client: Client, say: Say, *, hold: str
) -> Served:
    """Serve the whole trace; ``hold``: plan (leases), daemon (its instance manager) or nothing sets clocks.

    daemon-strictest: the instance manager again, told that all prompts are promised the shortest ones' TTFT.
    """
    import aiohttp

    loop = asyncio.get_running_loop()
    clocks = _clocks(hold, client, setting)
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        front = await stack.enter_async_context(_front(setting))
        times = Times(start_s=10 * setting.start_s + 10, drain_s=600, stop_s=60, probe_s=0.5)
        fleet = Reconfigurer(launcher, front, clocks=clocks, times=times, load=launcher.load)
        fleet.now_s = lambda: 0.0
        stack.push_async_callback(fleet.close)
        # The first fleet stands before the first request, whoever plans it.
        state = FleetState(0.0, 0.0, (), {}, launcher.node.gpus)
        first = await fleet.apply(controller.decide(state))
        if not first.ok:
            raise RuntimeError(f"{controller.name}: the first fleet cannot be started: {first.reason}")
        window = client.energy(controller.name, "all")
        await asyncio.to_thread(window.begin)
        begin_s = loop.time()
        fleet.now_s = lambda: loop.time() - begin_s
        done = 0

        def count(finished: int) -> None:
            nonlocal done
            done = finished

        driver = loop.create_task(_drive(controller, fleet, front, client, say, begin_s, lambda: done, launcher.node.gpus))
        try:
            seen = await replay(session, front.url, setting.requests, setting.classes, count)
            seconds = loop.time() - begin_s
            await asyncio.to_thread(window.end)
        finally:
            driver.cancel()
            failed = (await asyncio.gather(driver, return_exceptions=True))[0]
        if isinstance(failed, Exception):
            raise failed
        events = [asdict(event) for event in fleet.events]
        tally = front.tally
    view = window.view
    low, high = (None, None) if view is None else (_sum(f.low_j for f in view.figures), _sum(f.high_j for f in view.figures))
    return Served(controller.name, seconds, window.energy_j, low, high, dict(tally.outcomes), tally.retried, events, seen)


def _front(setting: Setting) -> Front:
    """Routes by the SLOs that are promised here, to engines that serve the earliest deadline first, under every policy."""
    router = Router(setting.model, setting.classes)
    return Front(setting.model, FrontOptions(priorities=True), router=router, predict=setting.predict)


def _sum(values: Any) -> float | None:
    found = list(values)
    return None if not found or None in found else float(sum(found))


def _clocks(hold: str, client: Client, setting: Setting) -> Clocks | None:
    if hold == "plan":
        return LeaseClocks(client)
    slo, classes = setting.classes.by_prompt()
    if hold == "daemon":
        return ReplicaClocks(client, setting.model.name, {}, slo, classes)
    if hold == "daemon-strictest":
        strictest_s = min(each.ttft_s for each in setting.classes.slos.values())
        return ReplicaClocks(client, setting.model.name, {}, Slo(strictest_s, slo.tbt_s))
    return None


async def _drive(
    controller: FleetController, fleet: Reconfigurer, front: Front, client: Client, say: Say, begin_s: float,
    done: Callable[[], int], gpus: int,
) -> None:  # fmt: skip
    """Let the controller decide in its own rhythm, and tell how things are."""
    loop = asyncio.get_running_loop()
    period_s = min(SAMPLE_S, controller.period_s)
    decided_s = begin_s
    front.tally.take_arrivals()
    indices = {gpu.gpu.uuid: gpu.gpu.index for gpu in (await asyncio.to_thread(client.node)).gpus}
    while True:
        await asyncio.sleep(period_s)
        now_s = loop.time()
        if now_s - decided_s >= controller.period_s - 1e-6:
            window_s, decided_s = now_s - decided_s, now_s
            state = FleetState(now_s - begin_s, window_s, fleet.states(), front.tally.take_arrivals(), gpus)
            await fleet.follow(controller.decide(state))
        snapshot = await asyncio.to_thread(client.snapshot)
        watts = [reading.power_mw for reading in snapshot.readings if reading.power_mw is not None]
        clocks = {indices.get(reading.uuid): reading.sm_clock_mhz for reading in snapshot.readings}
        serving = [state for state in fleet.states() if state.phase != "starting"]
        used = [clocks.get(int(gpu)) for replica in fleet.replicas.values() for gpu in replica.handle.gpus]
        held = [clock for clock in used if clock is not None]
        say(
            policy=controller.name, at_s=round(now_s - begin_s, 3), answered=done(), in_flight=front.tally.in_flight,
            fleet={str(tp): count for tp, count in sorted(Counter(state.tp for state in serving).items())},
            clock_mhz=sum(held) / len(held) if held else None, power_w=sum(watts) / 1000 if watts else None,
        )  # fmt: skip
