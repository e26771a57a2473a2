"""A fleet is changed under load and nobody is lost; a step that fails leaves it as it was."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from powerd.sim import node as nodes
from powerd_integrations.fleet.launcher import Handle
from powerd_integrations.fleet.steps import TABLE, Event, IllegalStepError, Phase, Present, after, difference
from powerd_policies.dynamollm.fleet import FleetPlan, InstanceWant
from tests.integrations.fleet.rig import Rig, plan, run


@pytest.fixture
def node() -> Iterator[nodes.SimNode]:
    made = nodes.create("h100-sxm", 8, "x20", latency=0.0, first_open_s=0.0)
    yield made
    made.close()


def kinds(rig: Rig) -> list[str]:
    return [event.kind for event in rig.fleet.events]


async def all_answered(rig: Rig, tokens: int = 40) -> None:
    answers = await rig.answers()
    assert [a for a in answers if not (a.complete and a.tokens == tokens)] == []
    assert rig.front.tally.outcomes == {"answered": len(answers)}
    assert rig.front.tally.lost == 0


def shape(rig: Rig) -> list[tuple[str, int, str]]:
    return sorted((s.pool, s.tp, s.phase) for s in rig.fleet.states())


def test_a_change_of_tensor_parallelism_under_load_loses_nobody(node: nodes.SimNode) -> None:
    async def body(rig: Rig) -> None:
        assert (await rig.fleet.apply(plan(("all", 4)))).ok
        load = asyncio.create_task(rig.load(20))
        await asyncio.sleep(5)
        report = await rig.fleet.apply(plan(("all", 2), ("all", 2)))
        assert report.ok, report.reason
        assert (len(report.started), len(report.stopped)) == (2, 1)
        assert shape(rig) == [("all", 2, "serving"), ("all", 2, "serving")]
        assert [left for _, left in rig.launcher.stopped] == [0], "it was empty when it was told to end"
        await load
        await all_answered(rig)
        again = await rig.fleet.apply(plan(("all", 2), ("all", 2)))
        assert (again.ok, again.started, again.stopped) == (True, (), ()), "a plan can be applied twice"

    run(node, body)


def test_without_spare_gpus_the_old_one_leaves_first_and_requests_wait(node: nodes.SimNode) -> None:
    async def body(rig: Rig) -> None:
        await rig.fleet.apply(plan(("all", 8)))
        load = asyncio.create_task(rig.load(10))
        await asyncio.sleep(3)
        report = await rig.fleet.apply(plan(("all", 4), ("all", 4)))
        assert report.ok, report.reason
        await load
        await all_answered(rig)

    run(node, body)


@pytest.mark.parametrize("ill", ["start-fails", "unhealthy"])
def test_a_start_that_fails_leaves_the_fleet_as_it_was(node: nodes.SimNode, ill: str) -> None:
    async def body(rig: Rig) -> None:
        await rig.fleet.apply(plan(("all", 4)))
        load = asyncio.create_task(rig.load(8))
        rig.launcher.ills = ["", ill]
        report = await rig.fleet.apply(plan(("short", 2), ("long", 2)))
        assert not report.ok
        assert ("did not start: ended with code 1" if ill == "start-fails" else "was not healthy within 10 s") in report.reason
        assert shape(rig) == [("all", 4, "serving")]
        assert kinds(rig).count("rollback") == 1
        await load
        await all_answered(rig)
        assert len(rig.launcher.running) == 1

    run(node, body, start_s=10.0)


def test_a_rollback_starts_again_what_had_to_make_room(node: nodes.SimNode) -> None:
    async def body(rig: Rig) -> None:
        await rig.fleet.apply(plan(("all", 8)))
        load = asyncio.create_task(rig.load(8))
        rig.launcher.ills = ["start-fails"]
        report = await rig.fleet.apply(plan(("all", 4), ("all", 4)))
        assert not report.ok
        assert shape(rig) == [("all", 8, "serving")]
        await load
        await all_answered(rig)

    run(node, body)


def test_a_successor_that_dies_while_the_old_one_drains_brings_it_back(node: nodes.SimNode) -> None:
    async def body(rig: Rig) -> None:
        await rig.fleet.apply(plan(("all", 4)))
        (old,) = rig.fleet.replicas
        long = [rig.ask(tokens=300) for _ in range(3)]
        await asyncio.sleep(1)
        change = asyncio.create_task(rig.fleet.apply(plan(("all", 2))))
        while rig.fleet.replicas[old].phase is not Phase.LEAVING:
            await asyncio.sleep(0.1)
        await rig.launcher.kill(next(id_ for id_ in rig.launcher.running if id_ != old))
        report = await change
        assert not report.ok
        assert "died while its predecessors drained: was ended by signal 9" in report.reason
        assert [(id_, r.phase) for id_, r in rig.fleet.replicas.items()] == [(old, Phase.SERVING)]
        assert [(await task).tokens for task in long] == [300] * 3
        assert (await rig.ask()).complete

    run(node, body)


def test_an_engine_that_dies_in_mid_drain_fails_what_had_tokens_and_nothing_else(node: nodes.SimNode) -> None:
    async def body(rig: Rig) -> None:
        await rig.fleet.apply(plan(("all", 4)))
        (old,) = rig.fleet.replicas
        streams = [rig.ask(tokens=300) for _ in range(3)]
        wholes = [rig.ask(tokens=300, stream=False) for _ in range(2)]
        await asyncio.sleep(2)
        change = asyncio.create_task(rig.fleet.apply(plan(("all", 2))))
        while rig.fleet.replicas[old].phase is not Phase.LEAVING:
            await asyncio.sleep(0.1)
        await rig.launcher.kill(old)
        assert (await change).ok, "what it was to become is there"
        for task in streams:
            answer = await task
            assert not answer.complete
            assert 0 < answer.tokens < 300
            assert "the engine failed in mid-answer" in answer.error
        assert [(await task).tokens for task in wholes] == [300, 300], "nobody had seen a token of these: asked for elsewhere"
        assert rig.front.tally.outcomes == {"failed": 3, "answered": 2}
        assert rig.front.tally.retried == 2

    run(node, body)


def test_a_replica_that_is_killed_is_started_anew(node: nodes.SimNode) -> None:
    async def body(rig: Rig) -> None:
        await rig.fleet.apply(plan(("all", 2), ("all", 2)))
        load = asyncio.create_task(rig.load(15, stream=False))
        await asyncio.sleep(3)
        victim = next(iter(rig.fleet.replicas))
        await rig.launcher.kill(victim)
        while (
            victim in rig.fleet.replicas or len(rig.fleet.replicas) < 2 or any(s.phase != "serving" for s in rig.fleet.states())
        ):
            await asyncio.sleep(0.2)
        await load
        await all_answered(rig)
        assert rig.fleet.died == 1

    run(node, body)


def test_nobody_to_serve_is_said_in_time_and_too_long_at_once(node: nodes.SimNode) -> None:
    async def body(rig: Rig) -> None:
        answer = await rig.ask()
        assert answer.status == 503
        assert "nobody served class SS within 2 s" in answer.error
        answer = await rig.ask(prompt=9000)
        assert answer.status == 400
        assert "the longest is 8192" in answer.error
        report = await rig.fleet.apply(plan(("all", 3)))
        assert not report.ok
        assert "no figures for TP3, only for TP (2, 4, 8)" in report.reason
        report = await rig.fleet.apply(plan(("all", 8), ("all", 8)))
        assert "needs 8 GPUs, 0 can be had" in report.reason
        assert not rig.fleet.replicas, "rolled back to nothing"
        assert rig.front.tally.outcomes == {"rejected": 2}

    run(node, body, queue_timeout_s=2.0)


def test_an_engine_that_falls_silent_is_left_alone(node: nodes.SimNode) -> None:
    async def body(rig: Rig) -> None:
        rig.launcher.ills = ["hang"]
        await rig.fleet.apply(plan(("all", 2), ("all", 2)))
        answer = await rig.ask()
        assert not answer.complete
        assert 10 < answer.tokens < 40
        answers = [await rig.ask(tokens=5) for _ in range(3)]
        assert all(a.complete for a in answers), "until it is healthy again for longer and longer, others get the requests"
        assert rig.front.tally.outcomes == {"failed": 1, "answered": 3}

    run(node, body, silence_s=3.0, probe_s=60.0)


class Book:
    """Clocks that are written down; ``lost`` ones are not in force any more."""

    def __init__(self) -> None:
        self.held: list[tuple[str, int]] = []
        self.lost: set[str] = set()
        self.away = False

    async def hold(self, handle: Handle, want: InstanceWant) -> None:
        if self.away:
            raise OSError("no powerd")
        self.held.append((handle.id, want.clock_mhz))
        self.lost.discard(handle.id)

    def holds(self, handle: Handle) -> bool:
        return handle.id not in self.lost and any(id_ == handle.id for id_, _ in self.held)

    async def release(self, handle: Handle) -> None:
        self.held.append((handle.id, 0))


def test_clocks_follow_the_plan_and_come_back_when_they_were_lost(node: nodes.SimNode) -> None:
    book = Book()

    async def body(rig: Rig) -> None:
        book.away = True
        await rig.fleet.apply(plan(("all", 2)))
        (id_,) = rig.fleet.replicas
        assert kinds(rig).count("clock") == 1, "without powerd it serves all the same, and that is said"
        assert (await rig.ask()).complete
        book.away = False

        def at(clock_mhz: int) -> FleetPlan:
            wanted = plan(("all", 2), clock_mhz=clock_mhz)
            return replace(wanted, instances=tuple(replace(want, id=id_) for want in wanted.instances))

        for clock_mhz in (1980, 1980, 1500, 1500):
            await rig.fleet.follow(at(clock_mhz))
        assert book.held == [(id_, 1980), (id_, 1500)], "as soon as it can be, and nothing twice"
        book.lost.add(id_)
        await rig.fleet.follow(at(1500))
        assert book.held[2:] == [(id_, 1500)]
        assert [s.clock_mhz for s in rig.fleet.states()] == [1500]
        await rig.fleet.close()
        assert book.held[3:] == [(id_, 0)]

    run(node, body, clocks=book)


def test_arrivals_are_counted_by_class_with_their_tokens(node: nodes.SimNode) -> None:
    async def body(rig: Rig) -> None:
        await rig.fleet.apply(plan(("all", 4)))
        await asyncio.gather(rig.ask(tokens=5, prompt=50), rig.ask(tokens=120, prompt=300), rig.ask(tokens=7, prompt=60))
        arrivals = rig.front.tally.take_arrivals()
        assert {name: (n.requests, n.prompt_tokens, n.output_tokens) for name, n in arrivals.items()} == {
            "SS": (2, 110, 12), "MM": (1, 300, 120),
        }  # fmt: skip
        assert rig.front.tally.take_arrivals() == {}
        async with rig.session.get(f"{rig.front.url}/metrics") as page:
            text = await page.text()
        assert 'powerd_front_requests_total{outcome="answered"} 3' in text
        assert 'powerd_front_arrivals_total{class="SS"} 2' in text

    run(node, body)


def test_an_illegal_event_is_an_error() -> None:
    for phase in Phase:
        for event in Event:
            if (phase, event) not in TABLE:
                with pytest.raises(IllegalStepError, match=f"{phase} cannot {event}"):
                    after(phase, event)
    assert not any(phase is Phase.GONE for phase, _ in TABLE), "nothing happens to what is gone"


def test_wants_are_matched_by_id_then_pool_then_shape() -> None:
    here = [Present("a", "short", 2), Present("b", "long", 2), Present("c", "long", 4), Present("d", "short", 4)]
    wants = (
        InstanceWant("d", "all", 4, 1980), InstanceWant(None, "long", 2, 1500), InstanceWant("x", "new", 2, 1980),
        InstanceWant(None, "new", 8, 1980), InstanceWant("c", "long", 2, 1980),
    )  # fmt: skip
    change = difference(FleetPlan(wants, {}), here)
    assert change.keep == (("d", wants[0]), ("b", wants[1]), ("a", wants[2]))
    assert change.start == (wants[3], wants[4]), "c has another tensor parallelism now: it is started anew"
    assert change.stop == ("c",)
