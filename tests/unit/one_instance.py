"""One instance, iteration by iteration: what the steady state must agree with. Continuous batching, chunked prefill, first come
first served, Poisson arrivals.

House rule: it shares nothing with the closed forms but ``Coefficients``' own iteration time and energy.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from powerd_policies.dynamollm.engine_model import Coefficients


@dataclass
class Request:
    """One request on its way."""

    at_s: float
    prompt: int
    output: int
    left: int = 0  # of the prompt
    made: int = 0
    last_s: float = 0.0
    ttft_s: float = 0.0
    gaps: list[float] = field(default_factory=list)


@dataclass
class Seen:
    """What was measured."""

    batch: float
    busy: float
    power_w: float
    ttft_p50_s: float
    ttft_p99_s: float
    own_tbt_p99_s: float  # that 99 of 100 requests keep
    done: int


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the values do not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def run(c: Coefficients, rps: float, lengths: Sequence[tuple[int, int]], chunk: int, requests: int = 4000, seed: int = 1) -> Seen:
    """Serve ``requests`` requests whose (prompt, output) are drawn from ``lengths``."""
    rng = random.Random(seed)
    at, coming = 0.0, deque[Request]()
    for _ in range(requests):
        at += rng.expovariate(rps)
        prompt, output = rng.choice(lengths)
        coming.append(Request(at, prompt, output, prompt))
    begin, end = coming[requests // 10].at_s, coming[-requests // 10].at_s  # neither filling nor draining
    now = joules = busy = weighted = watched = 0.0
    waiting, running, done = deque[Request](), list[Request](), list[Request]()
    while coming or waiting or running:
        if not waiting and not running:
            if begin <= now < end:
                joules += c.idle_w * (coming[0].at_s - now)
                watched += coming[0].at_s - now
            now = coming[0].at_s
        while coming and coming[0].at_s <= now:
            waiting.append(coming.popleft())
        room, finished, tokens = chunk, list[Request](), 0
        for request in waiting:
            part = min(room, request.left)
            request.left -= part
            room, tokens = room - part, tokens + part
            if request.left == 0:
                finished.append(request)
            if room == 0:
                break
        seconds = c.iteration_s(tokens, len(running))
        if begin <= now < end:
            joules += c.iteration_j(tokens, len(running))
            weighted += seconds * len(running)
            busy += seconds
            watched += seconds
        now += seconds
        for request in running:
            request.made += 1
            request.gaps.append(now - request.last_s)
            request.last_s = now
        for request in finished:
            waiting.popleft()
            request.made, request.last_s, request.ttft_s = 1, now, now - request.at_s
            running.append(request)
        done += [r for r in running if r.made >= r.output]
        running = [r for r in running if r.made < r.output]
    kept = sorted(done, key=lambda r: r.at_s)[requests // 10 : -requests // 10]
    own = [quantile(r.gaps, 0.99) for r in kept if r.gaps]
    ttft = [r.ttft_s for r in kept]
    return Seen(
        weighted / watched,
        busy / watched,
        joules / watched,
        quantile(ttft, 0.5),
        quantile(ttft, 0.99),
        quantile(own, 0.99),
        len(done),
    )
