"""The engine on a stepped node: it is as fast, and draws as much, as its table says at the clock that the GPU really has."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from powerd import clock as clocks
from powerd.sim import enginemodels
from powerd.sim.engine import DrainingError, Engine, EngineDiedError, Options, SimulatedGpus, TooLongError
from powerd.sim.engine.speed import Speed
from powerd.sim.node import SimNode

MODEL = enginemodels.load("llama2-70b_h100")
TOP, LOW = 1980, 1380
MakeNode = Callable[..., SimNode]


def drive(node: SimNode, body: Callable[[Engine], Awaitable[Any]], tp: int = 2, **more: Any) -> Any:
    node.load()
    clock = clocks.SimClock(node.library)

    async def main() -> Any:
        async with Engine(Options(MODEL, tp, **more), SimulatedGpus(node, range(tp))) as engine:
            return await body(engine)

    return clocks.run(clock, main())


def lock(node: SimNode, mhz: int) -> None:
    for gpu in range(node.gpus):
        node.fault("foreign-lock", gpu, value=mhz)


@pytest.mark.parametrize("clock_mhz", [TOP, LOW, 1403, 600])
def test_time_and_energy_are_the_tables_at_the_gpus_clock(make_node: MakeNode, clock_mhz: int) -> None:
    node = make_node("h100-sxm")
    if clock_mhz != TOP:
        lock(node, clock_mhz)

    async def body(engine: Engine) -> tuple[Any, float, float]:
        await asyncio.sleep(1)
        begin_mj = sum(node.true_energy_mj(gpu) for gpu in range(2))
        request = await engine.submit(prompt_tokens=700, max_tokens=101).whole()
        return request, sum(node.true_energy_mj(gpu) for gpu in range(2)) / 1e3 - begin_mj / 1e3, engine.energy_j

    request, true_j, declared_j = drive(node, body)
    runs_at_mhz = node.view(0).clock_mhz
    assert abs(runs_at_mhz - clock_mhz) < 15  # a lock is snapped to the table
    now = Speed(MODEL, 2).at(runs_at_mhz)
    chunks_s = now.iteration_s(512, 0) + now.iteration_s(188, 0)
    assert request.first_s - request.arrived_s == pytest.approx(chunks_s, rel=1e-6)
    assert request.last_s - request.first_s == pytest.approx(100 * now.iteration_s(0, 1), rel=1e-6)
    joules = 2 * (now.iteration_j(512, 0) + now.iteration_j(188, 0) + 100 * now.iteration_j(0, 1))
    assert declared_j == pytest.approx(joules, rel=1e-9)
    assert true_j == pytest.approx(joules, rel=0.01)  # the driver adds what heat does to leakage


def test_a_clock_that_changes_in_mid_answer_changes_its_pace(make_node: MakeNode) -> None:
    node = make_node("h100-sxm")

    async def body(engine: Engine) -> tuple[float, float]:
        stream = engine.submit(prompt_tokens=10, max_tokens=400)
        loop = asyncio.get_running_loop()
        moments = []
        async for _ in stream:
            moments.append(loop.time())
            if len(moments) == 200:
                lock(node, LOW)
        return (moments[190] - moments[90]) / 100, (moments[390] - moments[290]) / 100

    before_s, after_s = drive(node, body)
    speed = Speed(MODEL, 2)
    assert before_s == pytest.approx(speed.at(TOP).iteration_s(0, 1), rel=1e-6)
    assert after_s == pytest.approx(speed.at(LOW).iteration_s(0, 1), rel=1e-6)
    assert after_s > 1.05 * before_s


def test_a_power_limit_slows_it_down(make_node: MakeNode) -> None:
    node = make_node("h100-sxm")

    async def body(engine: Engine) -> tuple[float, float]:
        streams = [engine.submit(prompt_tokens=512, max_tokens=1) for _ in range(60)]
        await asyncio.sleep(1)
        free_w = node.view(0).power_w
        for gpu in range(2):
            node.fault("foreign-limit", gpu, value=400_000)
        await asyncio.sleep(2)
        energies = [node.true_energy_mj(0)]
        await asyncio.sleep(1)
        energies.append(node.true_energy_mj(0))
        assert engine.in_flight
        for stream in streams:
            stream.cancel()
        return free_w, (energies[1] - energies[0]) / 1000

    free_w, capped_w = drive(node, body)
    assert free_w > 500
    assert capped_w == pytest.approx(0.955 * 400, rel=0.05)
    assert node.view(0).clock_mhz < 0.9 * TOP


def test_draining_loses_nobody_and_takes_nobody(make_node: MakeNode) -> None:
    node = make_node("h100-sxm")

    async def body(engine: Engine) -> list[int]:
        streams = [engine.submit(100 + n, 50 + n) for n in range(20)]
        drain = asyncio.create_task(engine.drain())
        await asyncio.sleep(0.1)
        with pytest.raises(DrainingError):
            engine.submit(1, 1)
        assert await drain == 0
        return [(await stream.whole()).generated for stream in streams]

    assert drive(node, body) == [50 + n for n in range(20)]


def test_an_ended_engine_says_so_to_everybody(make_node: MakeNode) -> None:
    node = make_node("h100-sxm")

    async def body(engine: Engine) -> None:
        with pytest.raises(TooLongError, match="longer than the context of 4000"):
            engine.submit(3990, 11)
        streams = [engine.submit(10, 1000) for _ in range(3)]
        assert await engine.drain(timeout_s=1.0) == 3
        for stream in streams:
            with pytest.raises(EngineDiedError):
                await stream.whole()

    drive(node, body, max_context=4000)
    assert node.view(0).processes == 0, "the GPUs are given back"


def test_a_lost_gpu_kills_the_engine_and_not_the_loop(make_node: MakeNode) -> None:
    node = make_node("h100-sxm")

    async def body(engine: Engine) -> None:
        stream = engine.submit(10, 1000)
        await asyncio.sleep(1)
        node.fault("lost", 1)
        with pytest.raises(EngineDiedError, match="lost"):
            await stream.whole()
        with pytest.raises(EngineDiedError, match="lost"):
            engine.submit(10, 10)
        node.clear_faults()

    drive(node, body)
