"""The router's core: classes, where requests go, and seeing them through replicas that die. Scripted replicas, no Ray."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from powerd_integrations.fleet import settings as configured
from powerd_integrations.fleet.observed import Waited
from powerd_integrations.fleet.published import Group, PublishedPlan, Serving
from powerd_integrations.fleet.sizes import OutputSizes, prompt_tokens
from powerd_integrations.fleet.steering import REFUSALS, BrokenOffError, NobodyServesError, Steering
from powerd_policies.dynamollm import models
from powerd_policies.dynamollm.classes import NAMES, Classes
from powerd_policies.dynamollm.router import PromptTooLongError
from tests.fleet.test_settings import GOOD, MODEL
from tests.replicas.answering import body_of, recorded

A, B = Group("SS", 2), Group("LL", 8)
PATH = "/v1/completions"


class Source:
    """A plan that a test sets."""

    def __init__(self, plan: PublishedPlan | None) -> None:
        self.now = plan

    def plan(self) -> PublishedPlan | None:
        return self.now


class Counter:
    """What would be reported."""

    def __init__(self) -> None:
        self.counted: list[tuple[str, int, int]] = []
        self.called: list[tuple[str, str]] = []
        self.waiting: Callable[[], Mapping[str, Waited]] = dict

    def called_back(self, instance: str, call: str) -> None:
        self.called.append((instance, call))

    def count(self, request_class: str, prompt: int, output: int) -> None:
        self.counted.append((request_class, prompt, output))


class Replicas:
    """Engines that answer ``word`` per token; the group of ``dies`` breaks off after so many, once each."""

    def __init__(self, **dies: int) -> None:
        self.dies = {Group(name[:2], int(name[2:])): after for name, after in dies.items()}
        self.asked: list[tuple[Group, dict[str, Any]]] = []

    async def send(self, group: Group, path: str, body: dict[str, Any], headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        self.asked.append((group, body))
        after = self.dies.pop(group, None)
        if after == 0:
            raise OSError("connection refused")
        yield b"200"
        if not body.get("stream"):
            if after is not None:
                raise OSError("reset by peer")
            yield json.dumps({"choices": [{"text": "word " * body["max_tokens"]}]}).encode()
            return
        whole = b""
        for number in range(body["max_tokens"]):
            if number == after:
                yield whole[: len(whole) // 2]  # a broken event
                raise OSError("reset by peer")
            whole += b"data: " + json.dumps({"choices": [{"text": "word "}]}).encode() + b"\n\n"
            if number % 3 == 2:  # chunks end where they like
                yield whole[:-5]
                whole = whole[-5:]
        yield whole + b"data: [DONE]\n\n"


def plan(*groups: Group) -> PublishedPlan:
    serving = tuple(Serving(f"{group}-{n}", group) for group in groups for n in range(2))
    return PublishedPlan(1, 0.0, time.time(), routes={name: (A, B) if name == "SS" else (B,) for name in NAMES}, serving=serving)


def steering(replicas: Replicas, source: Source, counter: Counter | None = None, **service: Any) -> Steering:
    text = GOOD + "[service]\n" + "".join(f"{key} = {value}\n" for key, value in service.items())
    settings = configured.parse(text)
    return Steering(settings, models.load(MODEL), source, counter or Counter(), replicas.send)  # type: ignore[arg-type]


async def all_of(steer: Steering, body: dict[str, Any], **headers: str) -> bytes:
    parts = [part async for part in steer.answer(steer.admit(PATH, body, headers))]
    assert parts[0] == b"200"
    assert [part for part in parts[1:] if part.isdigit()] == []
    return b"".join(parts[1:])


def ask(tokens: int = 20, characters: int = 400, **more: Any) -> dict[str, Any]:
    return {"prompt": "x" * characters, "max_tokens": tokens, "stream": True, **more}


def test_requests_go_where_the_plan_routes_their_class() -> None:
    replicas, counter = Replicas(), Counter()
    steer = steering(replicas, Source(plan(A, B)), counter)
    asyncio.run(all_of(steer, ask()))
    asyncio.run(all_of(steer, ask(characters=8000)))
    assert [group for group, _ in replicas.asked] == [A, B]
    assert counter.counted == [("SS", 100, 20), ("LS", 2000, 20)]


def test_a_pool_with_nobody_left_is_passed_over() -> None:
    replicas = Replicas()
    asyncio.run(all_of(steering(replicas, Source(plan(B))), ask()))
    assert replicas.asked[0][0] == B


@pytest.mark.parametrize("after", [0, 1, 7, 19])
def test_a_replica_that_dies_costs_no_token_and_repeats_none(after: int) -> None:
    replicas = Replicas(SS2=after)
    steer = steering(replicas, Source(plan(A)))
    answer = asyncio.run(all_of(steer, ask(tokens=20)))
    assert answer.count(b"word ") == 20
    assert answer.endswith(b"data: [DONE]\n\n")
    (_, first), (_, second) = replicas.asked
    sent = 20 - second["max_tokens"]
    assert second["prompt"] == first["prompt"] + "word " * sent
    assert steer.retries == 1


def test_an_answer_at_once_is_asked_for_again() -> None:
    replicas = Replicas(SS2=3)
    answer = asyncio.run(all_of(steering(replicas, Source(plan(A))), ask(stream=False)))
    assert answer.count(b"word ") == 20
    assert len(replicas.asked) == 2


def test_a_chat_that_was_begun_cannot_go_on_elsewhere_and_fails_aloud() -> None:
    replicas = Replicas(SS2=9)
    body = {"messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 20, "stream": True}
    with pytest.raises(BrokenOffError):
        asyncio.run(all_of(steering(replicas, Source(plan(A))), body))


def test_attempts_end() -> None:
    class Dead(Replicas):
        async def send(self, group: Group, path: str, body: dict[str, Any], headers: Mapping[str, str]) -> AsyncIterator[bytes]:
            self.asked.append((group, body))
            raise OSError("no route")
            yield b""

    replicas = Dead()
    with pytest.raises(BrokenOffError, match="no route"):
        asyncio.run(all_of(steering(replicas, Source(plan(A)), attempts=3), ask()))
    assert len(replicas.asked) == 3


def test_a_request_waits_for_somebody_to_serve_and_not_for_ever() -> None:
    source, replicas = Source(None), Replicas()
    steer = steering(replicas, source, queue_timeout_s=0.2)
    with pytest.raises(NobodyServesError, match="class SS"):
        asyncio.run(all_of(steer, ask()))

    async def late() -> bytes:
        answer = asyncio.create_task(all_of(steering(replicas, source, queue_timeout_s=30), ask()))
        await asyncio.sleep(0)
        source.now = plan(A)
        return await answer

    assert asyncio.run(late()).count(b"word ") == 20


def test_a_prompt_beyond_the_context_limit_is_refused() -> None:
    with pytest.raises(PromptTooLongError, match="a prompt of 10000 tokens; the longest is 8192"):
        steering(Replicas(), Source(plan(A))).admit(PATH, ask(characters=40000), {})


def test_what_was_counted_at_an_instance_is_given_back_whatever_happens() -> None:
    replicas = Replicas(SS2=5)
    steer = steering(replicas, Source(plan(A)))
    asyncio.run(all_of(steer, ask()))

    async def hang_up() -> None:
        answer = steer.answer(steer.admit(PATH, ask(), {}))
        await anext(answer)
        await anext(answer)
        await answer.aclose()  # type: ignore[attr-defined]

    asyncio.run(hang_up())
    assert set(steer.router.outstanding().values()) == {(0, 0)}


@pytest.mark.parametrize(
    ("body", "headers", "tokens"),
    [
        ({"prompt": "x" * 100}, {}, 25),
        ({"prompt": [1, 2, 3]}, {}, 3),
        ({"prompt": ["ab" * 50]}, {}, 25),
        ({"prompt": "x"}, {"x-prompt-tokens": "77"}, 77),
        ({"messages": [{"content": "x" * 40}, {"content": [{"type": "text", "text": "y" * 60}]}]}, {}, 25),
        ({"messages": "?"}, {}, 1),
        ({}, {"x-prompt-tokens": "-3"}, 1),
    ],
)
def test_the_length_of_a_prompt(body: dict[str, Any], headers: dict[str, str], tokens: int) -> None:
    assert prompt_tokens(body, headers, 0.25) == tokens


def test_answers_are_predicted_from_what_was_seen_and_capped_by_what_is_asked_for() -> None:
    sizes = OutputSizes(Classes())
    assert sizes.predict(0, 50) == 50
    for answer in (200, 300):
        sizes.learn(100, answer)
    assert (sizes.predict(0, None), sizes.predict(0, 1000), sizes.predict(0, 60)) == (250, 250, 60)
    assert sizes.predict(1, 400) == 400, "another size of prompt"


@pytest.mark.parametrize("priorities", [True, False])
def test_a_request_carries_its_deadline_where_engines_go_by_priority_and_only_there(priorities: bool) -> None:
    replicas = Replicas()
    engine = f"[engine]\npriorities = {str(priorities).lower()}\n"
    steer = Steering(configured.parse(GOOD + engine), models.load(MODEL), Source(plan(A, B)), Counter(), replicas.send)  # type: ignore[arg-type]
    begun_s = time.time()
    asyncio.run(all_of(steer, ask()))
    asyncio.run(all_of(steer, ask(characters=8000)))
    bodies = [body for _, body in replicas.asked]
    assert ["priority" in body for body in bodies] == [priorities] * 2
    if priorities:
        short, long = (body["priority"] / 1000 - begun_s for body in bodies)
        assert 0.499 <= short < 1.5, "this file promises SS half a second"
        assert 2.0 <= long < 3.0


class Slow(Replicas):
    """Replicas that hold a request for a third of a second before its first token."""

    async def send(self, group: Group, path: str, body: dict[str, Any], headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        yield f"@{group}-{len(self.asked)}".encode()
        async for part in super().send(group, path, body, headers):
            yield part
            await asyncio.sleep(0.3 if part == b"200" else 0.0)


@pytest.mark.parametrize(("age_s", "refused"), [(0.0, True), (100.0, False)])
def test_a_planner_that_is_away_has_nobody_rejected(age_s: float, refused: bool) -> None:
    counter, wants = Counter(), replace(plan(A), published_unix_s=time.time() - age_s, shed_after_s={"SS-tp2-0": 0.1})
    steer = steering(Slow(), Source(wants), counter)
    if refused:
        with pytest.raises(NobodyServesError, match=r"overload: it waited 0\.\d+ s at SS-tp2-0 "):
            asyncio.run(all_of(steer, ask()))
    else:
        assert asyncio.run(all_of(steer, ask())).count(b"word ") == 20
    assert counter.called == [("SS-tp2-0", "shed")] * refused
    assert set(steer.router.outstanding().values()) == {(0, 0)}


def test_a_request_that_went_elsewhere_is_refused_by_who_is_in_trouble_and_served_if_there_is_nobody_else() -> None:
    class Stubborn(Replicas):
        """A carrier that brings every request to the same replica, which refuses those that avoid it."""

        avoided = 0

        async def send(self, group: Group, path: str, body: dict[str, Any], headers: Mapping[str, str]) -> AsyncIterator[bytes]:
            refuses = "SS-tp2-0" in headers.get("x-powerd-avoid", "").split()
            self.avoided += refuses
            yield b"@SS-tp2-0"
            if refuses:
                return
            async for part in super().send(group, path, body, headers):
                await asyncio.sleep(0.2 if part == b"200" and not self.avoided else 0.0)
                yield part

    replicas, counter = Stubborn(), Counter()
    steer = steering(replicas, Source(replace(plan(A), resteered=frozenset({"SS-tp2-0"}))), counter)

    async def late() -> bytes:
        answer = asyncio.create_task(all_of(steer, ask()))
        await asyncio.sleep(0.05)
        steer.waiting.obey({"SS-tp2-0"}, {})  # the planner decides again
        return await answer

    assert asyncio.run(late()).count(b"word ") == 20, "it is never lost"
    assert (len(replicas.asked), replicas.avoided) == (2, REFUSALS)
    assert counter.called == [("SS-tp2-0", "resteer")]
    assert steer.retries == 0, "a replica in trouble has not failed"


class Recorded(Replicas):
    """Engines that answer as a real vLLM did: these recordings, one after the other."""

    def __init__(self, *answers: str) -> None:
        super().__init__()
        self.answers = [body_of(recorded(name)) for name in answers]

    async def send(self, group: Group, path: str, body: dict[str, Any], headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        self.asked.append((group, body))
        yield b"200"
        yield self.answers.pop(0)


def test_tokens_are_counted_where_they_are_no_text() -> None:
    counter = Counter()
    steer = steering(Recorded("stream"), Source(plan(A, B)), counter)
    assert asyncio.run(all_of(steer, ask(tokens=200))) == body_of(recorded("stream"))
    steer.admit(PATH, ask(tokens=200), {})
    assert counter.counted[1][2] == 24, "what the next answer is expected to have"


def test_what_an_engine_refuses_in_a_stream_is_passed_on_and_asked_of_nobody_else() -> None:
    replicas = Recorded("out-of-vocabulary")
    assert asyncio.run(all_of(steering(replicas, Source(plan(A, B))), ask())) == body_of(recorded("out-of-vocabulary"))
    assert len(replicas.asked) == 1


def test_an_engine_that_says_that_it_died_is_followed_by_another_one_for_the_tokens_that_are_left() -> None:
    replicas = Recorded("core-killed", "stream")
    answer = asyncio.run(all_of(steering(replicas, Source(plan(A, B))), ask(tokens=2000)))
    assert b"EngineCore" not in answer
    assert [body["max_tokens"] for _, body in replicas.asked] == [2000, 1991], "nine came, four of them in one event"
    first, second = (body["prompt"] for _, body in replicas.asked)
    assert second.startswith(first)
    assert len(second) > len(first)
