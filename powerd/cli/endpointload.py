"""An open-loop load on an OpenAI-compatible endpoint, and what its clients waited for.

House rules: requests come at their moments whatever became of those before (a closed loop would hide a queue); prompts are
random token ids, so that no prefix cache helps; a request that failed is counted, never left out; times are of the node's
clock.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from powerd.errors import RequestError, UnavailableError

if TYPE_CHECKING:
    import aiohttp

VOCABULARY = (1000, 30000)  # ids that every tokenizer in use has, and none of them special
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


async def model_of(session: aiohttp.ClientSession, endpoint: str) -> str:
    """The model that an endpoint serves; UnavailableError when it does not answer, RequestError when it is none."""
    import aiohttp

    try:
        async with session.get(f"{endpoint}/v1/models") as answer:
            body = await answer.json(content_type=None)
            return str(body["data"][0]["id"])
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise UnavailableError(f"{endpoint} does not answer: {str(error) or type(error).__name__}") from None
    except (KeyError, IndexError, TypeError, ValueError):
        raise RequestError(f"{endpoint}/v1/models names no model", hint="give an OpenAI-compatible endpoint") from None


async def ask(session: aiohttp.ClientSession, endpoint: str, model: str, prompt_tokens: int, tokens: int, seed: int) -> Asked:
    """One streamed completion of exactly so many tokens."""
    import aiohttp

    loop = asyncio.get_running_loop()
    dice = _dice(seed)
    prompt = [dice.randrange(*VOCABULARY) for _ in range(prompt_tokens)]
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 0.0,
            "stream_options": {"include_usage": True}}  # fmt: skip
    sent_s = loop.time()
    moments: list[float] = []
    made, error = 0, ""
    try:
        async with session.post(f"{endpoint}/v1/completions", json=body) as answer:
            if answer.status != 200:
                return Asked(sent_s, prompt_tokens, 0, None, (), f"{answer.status}: {(await answer.text())[:200]}")
            async for line in answer.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                now_s, event = loop.time(), json.loads(line[6:])
                error = str(event["error"])[:200] if "error" in event else error
                if usage := event.get("usage"):
                    made = int(usage["completion_tokens"])
                if any(choice.get("text") for choice in event.get("choices", ())):
                    moments.append(now_s)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError) as problem:
        error = str(problem) or type(problem).__name__
    gaps = tuple(b - a for a, b in itertools.pairwise(moments))
    return Asked(sent_s, prompt_tokens, made or len(moments), moments[0] - sent_s if moments else None, gaps, error)


class Load:
    """Requests at ``rate`` per second with lengths drawn from ``lengths``, from ``begin`` until ``end``."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoint: str,
        model: str,
        lengths: Sequence[tuple[int, int]],
        rate: float,
        seed: int,
    ) -> None:
        self._session, self._endpoint, self._model = session, endpoint, model
        self._lengths, self._rate, self._seed = lengths, rate, seed
        self._tasks: list[asyncio.Task[Asked]] = []
        self._sender: asyncio.Task[None] | None = None

    def begin(self, seconds: float) -> None:
        """Send for so many seconds, in the background."""
        self._sender = asyncio.get_running_loop().create_task(self._send(seconds))

    async def _send(self, seconds: float) -> None:
        loop, dice = asyncio.get_running_loop(), _dice(self._seed)
        begin_s = loop.time()
        for number, at_s in enumerate(poisson(self._rate, seconds, self._seed)):
            prompt, tokens = dice.choice(self._lengths)
            if (wait_s := begin_s + at_s - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            one = ask(self._session, self._endpoint, self._model, prompt, tokens, self._seed * 1_000_003 + number)
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
    """A session's options: as many connections as there are requests, no time limit but that of silence."""
    import aiohttp

    return {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout(total=None, sock_read=SILENCE_S)}
