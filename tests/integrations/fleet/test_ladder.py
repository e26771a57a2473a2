"""What the emergency ladder wants of waiting requests is done by the local service's front: real HTTP, simulated engines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from powerd.sim import node as nodes
from powerd_integrations.fleet.tally import Passed
from powerd_policies.dynamollm.classes import NAMES, Classes, Slo
from powerd_policies.dynamollm.fleet import FleetPlan
from tests.integrations.fleet.rig import Answer, Rig, plan, run

LONG = 8000  # tokens: two seconds of an engine at TP2


@pytest.fixture
def node() -> Iterator[nodes.SimNode]:
    made = nodes.create("h100-sxm", 8, "x20", latency=0.0, first_open_s=0.0)
    yield made
    made.close()


def named(rig: Rig) -> FleetPlan:
    """The plan that wants the replicas that there are."""
    ids = list(rig.fleet.replicas)
    wanted = plan(*(("all", 2) for _ in ids))
    return replace(wanted, instances=tuple(replace(want, id=id_) for want, id_ in zip(wanted.instances, ids, strict=True)))


def emergencies(rig: Rig) -> list[tuple[str, str]]:
    return [(event.subject, event.detail) for event in rig.fleet.events if event.kind == "emergency"]


async def clogged(rig: Rig, count: int) -> tuple[str, str, list[asyncio.Task[Answer]]]:
    """One replica with more than it can do, one beside it with nothing, and the requests."""
    await rig.fleet.apply(plan(("all", 2)))
    (full,) = rig.fleet.replicas
    asked = [rig.ask(tokens=5, prompt=LONG) for _ in range(count)]
    while rig.front.in_flight(full) < count:
        await asyncio.sleep(0.05)
    assert (await rig.fleet.apply(plan(("all", 2), ("all", 2)))).ok
    (other,) = set(rig.fleet.replicas) - {full}
    return full, other, asked


def test_requests_without_a_token_leave_an_instance_in_trouble_once_and_its_engine_is_free(node: nodes.SimNode) -> None:
    async def body(rig: Rig) -> None:
        full, other, asked = await clogged(rig, 12)
        clog = rig.launcher.running[full].engine
        await rig.fleet.follow(replace(named(rig), resteered=frozenset({full, other})))
        await asyncio.sleep(0.2)
        assert rig.front.tally.called_back == {}, "who would find nothing better keeps its turn"
        await rig.fleet.follow(replace(named(rig), resteered=frozenset({full})))
        while clog.in_flight or rig.front.in_flight(full):
            await asyncio.sleep(0.02)
        moved = rig.front.tally.called_back["resteer"]
        assert moved > 0
        while rig.launcher.running[other].engine.arrived < moved:
            await asyncio.sleep(0.02)
        assert any(not task.done() for task in asked), "the engine that was clogged has nothing left before all are answered"
        await rig.fleet.follow(replace(named(rig), resteered=frozenset({other})))
        answers = await asyncio.gather(*asked)
        assert all(answer.complete and answer.tokens == 5 for answer in answers), answers
        assert rig.front.tally.outcomes == {"answered": 12}
        assert rig.front.tally.called_back == {"resteer": moved}, "nobody is sent back"
        assert emergencies(rig) == [(full, f"{moved} waiting requests were sent elsewhere, 0 were rejected")]
        assert f'powerd_front_called_back_total{{step="resteer"}} {moved}' in rig.front.tally.page()

    run(node, body)


def test_who_waits_too_long_is_told_so_when_it_has_and_who_has_a_token_is_left_alone(node: nodes.SimNode) -> None:
    async def body(rig: Rig) -> None:
        await rig.fleet.apply(plan(("all", 2)))
        (full,) = rig.fleet.replicas
        ended: list[Passed] = []
        rig.front.each = ended.append
        began = [rig.ask(tokens=200, prompt=100) for _ in range(2)]
        while rig.front.load(full).running < 2:
            await asyncio.sleep(0.02)
        await rig.fleet.follow(replace(named(rig), shed={full: 2.0}))
        # They come after the plan, and no other plan comes.
        asked = [rig.ask(tokens=5, prompt=LONG) for _ in range(16)]
        whole = rig.ask(tokens=5, prompt=LONG, stream=False)
        answers = await asyncio.gather(*asked)
        shed = [answer for answer in answers if answer.status == 503]
        assert shed
        assert all("overload: it waited " in answer.error and answer.retry_after == "1" for answer in shed), shed
        assert all(answer.complete for answer in answers if answer.status != 503)
        assert all(answer.complete and answer.tokens == 200 for answer in await asyncio.gather(*began))
        assert (await whole).complete, "nobody knows whether an answer that comes whole has begun"
        assert min(p.ended_s - p.received_s for p in ended if p.outcome == "rejected" and p.ended_s is not None) >= 2.0
        assert rig.launcher.running[full].engine.in_flight == 0
        assert rig.front.tally.outcomes == {"answered": 19 - len(shed), "rejected": len(shed)}
        await rig.fleet.follow(named(rig))
        assert emergencies(rig) == [(full, f"0 waiting requests were sent elsewhere, {len(shed)} were rejected")]

    run(node, body)


def test_a_plan_that_nobody_renews_rejects_nobody(node: nodes.SimNode) -> None:
    async def body(rig: Rig) -> None:
        await rig.fleet.apply(plan(("all", 2)))
        await rig.fleet.follow(replace(named(rig), shed=dict.fromkeys(rig.fleet.replicas, 2.0)))
        answers = await asyncio.gather(*(rig.ask(tokens=5, prompt=LONG) for _ in range(6)))
        assert all(answer.complete for answer in answers)

    run(node, body, rescue_s=1.0)


@pytest.mark.parametrize("priorities", [True, False])
def test_an_engine_that_goes_by_priority_serves_the_earliest_deadline_first(node: nodes.SimNode, priorities: bool) -> None:
    async def body(rig: Rig) -> None:
        rig.launcher.by_priority = priorities  # one that does not refuses any priority
        await rig.fleet.apply(plan(("all", 2)))
        (only,) = rig.fleet.replicas
        began: list[Passed] = []
        rig.front.each = began.append
        # Long prompts are promised their first token in so long a time that a busy machine does not change the order.
        rig.front.router.classes = Classes(slos={name: Slo(1000.0 if name[0] == "L" else 0.25, 0.1) for name in NAMES})
        asked = [rig.ask(tokens=5, prompt=LONG) for _ in range(12)]
        while rig.front.in_flight(only) < 12:
            await asyncio.sleep(0.02)
        asked.append(rig.ask(tokens=5, prompt=100))
        assert all(answer.complete for answer in await asyncio.gather(*asked))
        order = [passed.prompt_tokens for passed in sorted(began, key=lambda passed: passed.first_s or 0.0)]
        assert (order.index(100) < 10) is priorities, order

    run(node, body, priorities=priorities)


def test_what_waits_is_known_without_an_engines_metrics(node: nodes.SimNode) -> None:
    async def body(rig: Rig) -> None:
        await rig.fleet.apply(plan(("all", 2)))
        (full,) = rig.fleet.replicas
        asked = [rig.ask(tokens=200, prompt=LONG) for _ in range(6)]
        while not (rig.front.in_flight(full) == 6 and rig.front.load(full).running):
            await asyncio.sleep(0.02)
        (state,) = rig.fleet.states()
        assert 0 < state.load.queued < 6
        assert state.load.queued_prompt_tokens == LONG * state.load.queued
        assert state.load.running == 6 - state.load.queued
        assert state.load.oldest_wait_s is not None
        assert state.load.oldest_wait_s > 0.0
        await asyncio.gather(*asked)
        assert rig.front.load(full).queued == 0

    run(node, body)
