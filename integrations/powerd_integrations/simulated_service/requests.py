"""A trace replayed against a service over HTTP, and what each request's client saw of it.

House rules: open loop: a request is sent when the trace says, whatever became of those before it; its class is of its true
lengths; a request is within SLO when its first token came in time and 99 of 100 of its gaps between tokens kept theirs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from powerd_policies.dynamollm.classes import Classes

if TYPE_CHECKING:
    import aiohttp

MAX_TOKENS = 4096  # what clients ask for: the model stops by itself before


@dataclass(frozen=True, slots=True)
class Planned:
    """One request of the trace."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as its client saw it; latencies in seconds, None when there was none."""

    request_class: str
    at_s: float
    tokens: int
    ttft_s: float | None
    tbt_p99_s: float | None
    complete: bool
    within_slo: bool
    error: str = ""


async def replay(
    session: aiohttp.ClientSession, url: str, requests: Sequence[Planned], classes: Classes, done: Callable[[int], None]
) -> list[Seen]:
    """Send every request at its moment; returns when the last answer is there, in the order of the trace."""
    loop = asyncio.get_running_loop()
    begin_s, tasks, finished = loop.time(), [], 0

    def count(task: asyncio.Task[Seen]) -> None:
        nonlocal finished
        finished += 1
        done(finished)

    for request in requests:
        if (wait_s := begin_s + request.at_s - loop.time()) > 0:
            await asyncio.sleep(wait_s)
        task = loop.create_task(_ask(session, url, request, classes))
        task.add_done_callback(count)
        tasks.append(task)
    return list(await asyncio.gather(*tasks))


async def _ask(session: aiohttp.ClientSession, url: str, request: Planned, classes: Classes) -> Seen:
    loop = asyncio.get_running_loop()
    sent_s = loop.time()
    body = {"prompt": "", "max_tokens": MAX_TOKENS, "stream": True, "stream_options": {"include_usage": True}}
    headers = {"X-Prompt-Tokens": str(request.prompt_tokens), "X-Stop-After": str(request.output_tokens)}
    name = classes.name(request.prompt_tokens, request.output_tokens) or "too long"
    first_s: float | None = None
    last: dict[str, Any] = {}
    complete, error = False, ""
    try:
        async with session.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
            if answer.status != 200:
                return Seen(name, request.at_s, 0, None, None, False, False, (await answer.json())["error"]["message"])
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                first_s = first_s or loop.time()
                if line.startswith(b"data: [DONE]"):
                    complete = True
                elif b'"usage"' in line or b'"error"' in line:
                    last = json.loads(line[6:])
                    error = last.get("error", {}).get("message", error)
    except OSError as problem:
        error = str(problem) or type(problem).__name__
    ttft_s = None if first_s is None else first_s - sent_s
    tokens = int(last.get("usage", {}).get("completion_tokens", 0))
    gap_ms = last.get("metrics", {}).get("inter_token_latency_p99_ms")
    tbt_s = None if gap_ms is None else gap_ms / 1000
    slo = classes.slos.get(name)
    # An answer of one token has no gaps; of a longer one whose gaps nobody told, nobody knows that they were in time.
    in_time = tokens <= 1 if tbt_s is None else slo is not None and tbt_s <= slo.tbt_s
    kept = complete and slo is not None and ttft_s is not None and ttft_s <= slo.ttft_s and in_time
    return Seen(name, request.at_s, tokens, ttft_s, tbt_s, complete, kept, error)
