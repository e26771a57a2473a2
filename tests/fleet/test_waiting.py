"""A waiting request on its leash: called back before its first token or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import pytest

from powerd_integrations.fleet.waiting import CalledBackError, Leash, Waiting
from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.fleet import FleetPlan, InstanceState
from powerd_policies.dynamollm.router import Router
from tests.policies.dynamollm.engines import engine


def waiting(done: list[tuple[str, str]]) -> Waiting:
    router = Router(engine())
    states = [InstanceState(name, "one", 8, 1980) for name in "ab"]
    router.update(FleetPlan((), dict.fromkeys(NAMES, ("one",))), states)
    return Waiting(router, lambda instance, call: done.append((instance, call)))


def hold(here: Waiting, instance: str = "a", age_s: float = 0.0) -> Leash:
    return here.hold(instance, asyncio.get_running_loop().time() - age_s, 100, 1)


async def says(words: Iterable[str], before_each: asyncio.Event | None = None) -> AsyncIterator[str]:
    for word in words:
        if before_each is not None:
            await before_each.wait()
        yield word


def test_a_token_that_came_before_the_call_is_kept_and_nothing_is_counted() -> None:
    done: list[tuple[str, str]] = []

    async def main() -> list[str]:
        here, go = waiting(done), asyncio.Event()
        leash = hold(here)
        heard = []
        reader = leash.guard(says(["head", "token", "more"], go))
        first = asyncio.ensure_future(anext(reader))
        await asyncio.sleep(0)
        go.set()
        await asyncio.sleep(0)
        here.obey({"a"}, {})  # the word is there, and nobody has read it
        heard.append(await first)
        here.let_go(leash)  # it was the first token: its client is told
        heard += [word async for word in reader]
        return heard

    assert asyncio.run(main()) == ["head", "token", "more"]
    assert done == []


def test_what_is_no_token_does_not_save_it_and_the_engine_is_let_go() -> None:
    done: list[tuple[str, str]] = []
    closed = []

    async def head_only() -> AsyncIterator[str]:
        try:
            yield "head"
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    async def main() -> None:
        here = waiting(done)
        reader = hold(here).guard(head_only())
        assert await anext(reader) == "head"
        here.obey({"a"}, {})
        with pytest.raises(CalledBackError, match="at a for its first token"):
            await anext(reader)
        assert here.empty
        reader = hold(here).guard(head_only())
        assert await anext(reader) == "head"
        task = asyncio.ensure_future(anext(reader))
        await asyncio.sleep(0)
        closed.clear()
        here.obey({"a"}, {})
        with pytest.raises(CalledBackError):
            await task
        assert closed == [True]

    asyncio.run(main())
    assert done == [("a", "resteer")] * 2


def test_a_client_that_goes_ends_the_work() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def main() -> None:
        task = asyncio.ensure_future(hold(waiting([])).first(work()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert ended == [True]


def test_who_was_thought_elsewhere_waits_where_it_is() -> None:
    done: list[tuple[str, str]] = []

    async def main() -> None:
        here = waiting(done)
        moved, stays = hold(here, age_s=5.0), hold(here, age_s=3.0)
        here.move(moved, "b")
        assert {name: (w.requests, w.prompt_tokens, int(w.oldest_s)) for name, w in here.everywhere().items()} == {
            "a": (1, 100, 3), "b": (1, 100, 5),
        }  # fmt: skip
        here.obey((), {"b": 4.0})
        with pytest.raises(CalledBackError):
            await moved.first(asyncio.Event().wait())
        assert not stays.called.done()
        here.let_go(stays)
        assert here.empty

    asyncio.run(main())
    assert done == [("b", "shed")]
