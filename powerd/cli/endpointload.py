"""An open-loop load on an OpenAI-compatible endpoint, and what its clients waited for.

House rules: requests come at their moments whatever became of those before (a closed loop would hide a queue); prompts are
random token ids, others in every load, so that no prefix cache helps; a request that failed is counted, never left out; times
are of the node's clock.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from powerd.errors import RequestError, UnavailableError

if TYPE_CHECKING:
    import aiohttp

# Ids that every tokenizer in use has, and none of them special; else the printable bytes of one that knows bytes only.
VOCABULARIES = (range(1000, 30000), range(32, 127))
SILENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request and what came of it; seconds, None when there was no such token."""

    sent_s: float
    prompt_tokens: int
    tokens: int
    ttft_s: float | None
    gaps_s: tuple[float, ...]
    error: str = ""


def p99(values: Sequence[float]) -> float | None:
    """The value that 99 of 100 do not exceed; None of nothing."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1] if values else None


def _dice(seed: object) -> random.Random:
    return random.Random(f"{seed}")  # noqa: S311  (arrivals and prompts, no secrets)


def poisson(rate: float, seconds: float, seed: object) -> list[float]:
    """Moments of arrivals at ``rate`` per second, the same for the same seed."""
    dice, at_s, moments = _dice(seed), 0.0, []
    while (at_s := at_s + dice.expovariate(rate)) < seconds:
        moments.append(at_s)
    return moments


@dataclass(frozen=True, slots=True)
class Served:
    """The model that an endpoint serves; ``context_tokens``: of prompt and answer together, None when it does not say."""

    model: str
    context_tokens: int | None


async def served(session: aiohttp.ClientSession, endpoint: str) -> Served:
    """What an endpoint serves; UnavailableError when it does not answer, RequestError when it is none."""
    import aiohttp

    try:
        async with session.get(f"{endpoint}/v1/models") as answer:
            card = (await answer.json(content_type=None))["data"][0]
            context = card.get("max_model_len")
            return Served(str(card["id"]), int(context) if context else None)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise UnavailableError(f"{endpoint} does not answer: {str(error) or type(error).__name__}") from None
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise RequestError(f"{endpoint}/v1/models names no model", hint="give an OpenAI-compatible endpoint") from None


async def token_ids(session: aiohttp.ClientSession, endpoint: str, model: str) -> range:
    """Ids that the endpoint takes in a prompt, by trying; RequestError, with what it says, when it takes none."""
    refused = []
    for ids in VOCABULARIES:
        tried = await ask(session, endpoint, model, [ids[0], ids[-1]], 2)
        if not tried.error:
            return ids
        refused.append(tried.error)
    hint = "it has to take prompts of token ids at /v1/completions"
    raise RequestError(f"{endpoint} does not answer a request of two tokens: {refused[0]}", hint=hint)


class _Stream:
    """What has come of one answer: when, and how many tokens.

    A token need not be text (half a character is none), and an event may hold several (engines put together what a slow reader
    has not taken), so the engine's own count is taken where each event has it; else an event that may hold a token is one.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.first_s: float | None = None
        self.gaps_s: list[float] = []
        self.error = ""
        self._told: int | None = None  # the engine's own count
        self._last_s = 0.0

    def take(self, event: dict[str, Any], now_s: float) -> None:
        """Take one event."""
        if error := event.get("error"):
            self.error = str(error.get("message", error) if isinstance(error, dict) else error)[:200]
        told = (event.get("usage") or {}).get("completion_tokens")
        if choices := event.get("choices"):
            if told is not None and (self.first_s is None or self._told is not None):
                new = int(told) - self.tokens
            else:
                new = int(any(choice.get("text") or not choice.get("finish_reason") for choice in choices))
            self._came(new, now_s)
        if told is not None:
            self._told = int(told)

    def _came(self, new: int, now_s: float) -> None:
        if new < 1:
            return
        if self.first_s is None:
            self.first_s = now_s
        else:
            self.gaps_s.append(now_s - self._last_s)
        self.gaps_s += [0.0] * (new - 1)  # nobody waits for what comes with another one
        self.tokens, self._last_s = self.tokens + new, now_s

    @property
    def made(self) -> int:
        """Tokens of the answer."""
        return self.tokens if self._told is None else self._told


async def ask(session: aiohttp.ClientSession, endpoint: str, model: str, prompt: Sequence[int], tokens: int) -> Asked:
    """One streamed completion of exactly so many tokens; fewer are an error."""
    import aiohttp

    loop = asyncio.get_running_loop()
    counts = {"include_usage": True, "continuous_usage_stats": True}  # the latter of vLLM and SGLang
    body = {"model": model, "prompt": list(prompt), "max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 0.0,
            "stream_options": counts}  # fmt: skip
    seen, error, sent_s = _Stream(), "", loop.time()
    try:
        async with session.post(f"{endpoint}/v1/completions", json=body) as answer:
            if answer.status != 200:
                return Asked(sent_s, len(prompt), 0, None, (), f"{answer.status}: {(await answer.text())[:200]}")
            async for line in answer.content:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    seen.take(json.loads(line[6:]), loop.time())
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, AttributeError, TypeError) as problem:
        error = str(problem) or type(problem).__name__
    error = error or seen.error or ("" if seen.made >= tokens else f"{seen.made} of {tokens} tokens were answered")
    ttft_s = None if seen.first_s is None else seen.first_s - sent_s
    return Asked(sent_s, len(prompt), seen.made, ttft_s, tuple(seen.gaps_s), error)


class Load:
    """Requests at ``rate`` per second with lengths drawn from ``lengths``, from ``begin`` until ``end``; leaving its
    context ends what is left.

    Moments and lengths are the seed's. What the prompts say is not: an engine may still have those of an earlier load in a cache.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoint: str,
        model: str,
        ids: range,
        lengths: Sequence[tuple[int, int]],
        rate: float,
        seed: int,
    ) -> None:
        self._session, self._endpoint, self._model, self._ids = session, endpoint, model, ids
        self._lengths, self._rate, self._seed = lengths, rate, seed
        self._words = _dice(secrets.randbits(64))
        self._tasks: list[asyncio.Task[Asked]] = []
        self._sender: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, *error: object) -> None:
        left = [task for task in (self._sender, *self._tasks) if task is not None and not task.done()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def begin(self, seconds: float) -> None:
        """Send for so many seconds, in the background."""
        self._sender = asyncio.get_running_loop().create_task(self._send(seconds))

    async def _send(self, seconds: float) -> None:
        loop, dice = asyncio.get_running_loop(), _dice(self._seed)
        begin_s = loop.time()
        for at_s in poisson(self._rate, seconds, self._seed):
            length, tokens = dice.choice(self._lengths)
            prompt = self._words.choices(self._ids, k=length)
            if (wait_s := begin_s + at_s - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            one = ask(self._session, self._endpoint, self._model, prompt, tokens)
            self._tasks.append(loop.create_task(one))

    async def end(self, patience_s: float) -> list[Asked]:
        """Wait for the last answers, at most so long; those that are not there by then have failed."""
        assert self._sender is not None, "the load has not begun"
        await self._sender
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=patience_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        return [_result(task) for task in self._tasks]


def _result(task: asyncio.Task[Asked]) -> Asked:
    return Asked(0.0, 0, 0, None, (), "no answer in time") if task.cancelled() else task.result()


def connector() -> Any:
    """A session's options: a connection for each request, no time limit but that of silence."""
    import aiohttp

    return {
        "connector": aiohttp.TCPConnector(limit=0, force_close=True),
        "timeout": aiohttp.ClientTimeout(total=None, sock_read=SILENCE_S),
    }
