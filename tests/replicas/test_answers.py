"""The load of `powerctl dynamollm profile` reads what a real vLLM answered: tokens without text, several at once, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiohttp
import pytest

from powerd.cli.endpointload import Asked, Load, ask, connector, served, token_ids
from powerd.errors import RequestError
from tests.replicas.answering import Answering
from tests.replicas.record_answers import ASKED

T = TypeVar("T")


def at(body: Callable[[aiohttp.ClientSession, Answering], Awaitable[T]], *answers: str) -> T:
    """Do something at a server that gives these answers."""

    async def main() -> T:
        async with Answering(*answers) as server, aiohttp.ClientSession(**connector()) as session:
            async with asyncio.timeout(20):
                return await body(session, server)

    return asyncio.run(main())


def asked(name: str, tokens: int) -> Asked:
    return at(lambda session, server: ask(session, server.url, "tiny", [65], tokens), name)


def test_every_token_counts_whether_it_is_text_or_not() -> None:
    got = asked("stream", 24)
    assert (got.tokens, len(got.gaps_s), got.error) == (24, 23, "")
    assert got.ttft_s is not None


def test_without_the_engines_count_an_event_is_a_token() -> None:
    got = asked("plain", 11)  # its 24 tokens came in 11 events: nothing tells that
    assert (got.tokens, len(got.gaps_s), got.error) == (11, 10, "")


def test_tokens_that_came_together_have_no_gap_between_them_and_a_dead_engine_is_an_error() -> None:
    got = asked("core-killed", 2000)
    assert (got.tokens, len(got.gaps_s)) == (9, 8)
    assert sum(gap == 0.0 for gap in got.gaps_s) >= 3, "four tokens in the last event"
    assert got.error.startswith("EngineCore encountered an issue")


@pytest.mark.parametrize(
    ("name", "tokens", "error"),
    [
        ("cut-short", 100, "8 of 100 tokens were answered"),
        ("out-of-vocabulary", 24, "Token id 2000 is out of vocabulary"),
        ("too-long", 24, "400: "),
        ("no-such-model", 24, "404: "),
    ],
)
def test_an_answer_that_is_not_as_long_as_was_asked_for_is_an_error(name: str, tokens: int, error: str) -> None:
    assert asked(name, tokens).error.startswith(error)


def test_the_endpoint_says_its_name_and_its_context() -> None:
    found = at(lambda session, server: served(session, server.url), "stream")
    assert (found.model, found.context_tokens) == ("tiny", 2048)


def test_ids_are_those_that_the_endpoint_takes() -> None:
    async def body(session: aiohttp.ClientSession, server: Answering) -> tuple[range, list[dict[str, Any]]]:
        return await token_ids(session, server.url, "tiny"), server.asked

    ids, bodies = at(body, "out-of-vocabulary", "stream")
    assert ids == range(32, 127)
    assert [one["prompt"] for one in bodies] == [[1000, 29999], [32, 126]]
    with pytest.raises(RequestError, match=r"does not answer a request of two tokens: 404: .*`other` does not exist"):
        at(body, "no-such-model")


def test_two_loads_have_the_same_lengths_and_other_prompts() -> None:
    async def body(session: aiohttp.ClientSession, server: Answering) -> list[Asked]:
        told: list[Asked] = []
        for _ in range(2):
            async with Load(session, server.url, "tiny", range(32, 127), [(5, 24), (40, 24), (77, 24)], 400.0, 1) as load:
                load.begin(0.05)
                told += await load.end(10.0)
        prompts = [tuple(one["prompt"]) for one in server.asked]
        assert len(set(prompts)) == len(prompts) > 10, "a prefix cache would know them from the first load"
        half = len(prompts) // 2
        assert sorted(map(len, prompts[:half])) == sorted(map(len, prompts[half:]))
        return told

    assert not any(one.error for one in at(body, "stream")), "every request has a connection of its own"


def test_what_is_sent_is_what_was_recorded() -> None:
    async def body(session: aiohttp.ClientSession, server: Answering) -> dict[str, Any]:
        await ask(session, server.url, "tiny", [65], 24)
        return server.asked[0]

    sent, recorded = at(body, "stream"), ASKED["stream"]
    assert recorded is not None
    assert set(sent) == set(recorded) - {"seed"}
    assert sent["stream_options"] == recorded["stream_options"]
