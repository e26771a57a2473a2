"""Iteration-level continuous batching with chunked prefill: which requests compute what in the next iteration.

One token of each request that decodes comes first, prompts get the rest of `chunk_tokens` (vLLM's max_num_batched_tokens).

House rules: pure, no clock and no I/O: times come in and go out; first come, first served, or by priority where that is asked
for; a request never holds more KV tokens than it has computed; who does not fit any more is preempted and computed anew, the
youngest first, or the one of the last priority, as vLLM does.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Request:
    """One request and how far it is; times are of the engine's own clock."""

    id: int
    prompt_tokens: int
    output_tokens: int  # that it will make
    arrived_s: float
    max_tokens: int = 0
    priority: int = 0  # lower goes first, where the batch goes by it
    computed: int = 0  # tokens of `context` in the KV cache
    generated: int = 0
    scheduled_s: float | None = None  # first chunk began
    first_s: float | None = None  # first token
    last_s: float | None = None  # latest token
    preemptions: int = 0

    @property
    def context(self) -> int:
        """Tokens that have to be computed before the next one can be made."""
        return self.prompt_tokens + self.generated

    @property
    def turn(self) -> tuple[int, float, int]:
        """Its place in a queue by priority; of one priority who came first."""
        return self.priority, self.arrived_s, self.id

    @property
    def decoding(self) -> bool:
        """Whether the next iteration makes one token of it."""
        return self.generated > 0 and self.computed >= self.context - 1


@dataclass(frozen=True, slots=True)
class Iteration:
    """What is computed together: whole decodes and chunks of prompts."""

    decodes: tuple[Request, ...]
    chunks: tuple[tuple[Request, int], ...]

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all chunks."""
        return sum(tokens for _, tokens in self.chunks)


@dataclass(slots=True)
class Batch:
    """The queue and the running requests of one engine."""

    kv_tokens: int
    chunk_tokens: int = 512
    max_running: int = 256
    by_priority: bool = False  # vLLM's --scheduling-policy priority
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    preemptions: int = 0

    @property
    def kv_used(self) -> int:
        """Tokens in the KV cache."""
        return sum(request.computed for request in self.running)

    @property
    def queued_prompt_tokens(self) -> int:
        """Prompt tokens not yet computed, of all requests."""
        rest = sum(r.context - r.computed for r in self.running if not r.decoding)
        return rest + sum(r.context for r in self.waiting)

    def add(self, request: Request) -> None:
        """Queue a request; ValueError when it could never fit."""
        if request.prompt_tokens + request.output_tokens > self.kv_tokens:
            raise ValueError(f"{request.prompt_tokens} + {request.output_tokens} tokens, the KV cache holds {self.kv_tokens}")
        self._queue(request, last=True)

    def _queue(self, request: Request, *, last: bool) -> None:
        if self.by_priority:
            insort(self.waiting, request, key=lambda queued: queued.turn)
        elif last:
            self.waiting.append(request)
        else:
            self.waiting.appendleft(request)

    def remove(self, request: Request) -> None:
        """Forget a request whose client has gone; harmless when it has ended."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def next(self, now_s: float) -> Iteration | None:
        """The iteration that begins at ``now_s``, of requests that have arrived by then; None when there is nothing to do."""
        decodes = [request for request in self.running if request.decoding]
        used = self.kv_used
        while used + len(decodes) > self.kv_tokens:
            loser = max(self.running, key=lambda request: request.turn) if self.by_priority else self.running[-1]
            self.running.remove(loser)
            used -= loser.computed
            loser.computed, loser.preemptions = 0, loser.preemptions + 1
            self.preemptions += 1
            self._queue(loser, last=False)
            decodes = [request for request in decodes if request is not loser]
        free, budget = self.kv_tokens - used - len(decodes), max(0, self.chunk_tokens - len(decodes))
        chunks: list[tuple[Request, int]] = []
        for request in self.running:
            if budget and not request.decoding and (tokens := min(budget, request.context - request.computed, free)) > 0:
                chunks.append((request, tokens))
                budget, free = budget - tokens, free - tokens
        promised = sum(r.context - r.computed for r in self.running if not r.decoding)
        free = self.kv_tokens - used - len(decodes) - promised
        while budget and len(self.running) < self.max_running:
            head = next((queued for queued in self.waiting if queued.arrived_s <= now_s), None)
            if head is None or head.context > free:
                break
            self.waiting.remove(head)
            self.running.append(head)
            free -= head.context
            tokens = min(budget, head.context)
            budget -= tokens
            chunks.append((head, tokens))
            if head.scheduled_s is None:
                head.scheduled_s = now_s
        return Iteration(tuple(decodes), tuple(chunks)) if decodes or chunks else None

    def finish(self, iteration: Iteration, end_s: float) -> list[Request]:
        """Account for an iteration that ended at ``end_s``; the requests that got a token in it."""
        served = []
        for request, tokens in iteration.chunks:
            request.computed += tokens
            if request.computed >= request.context:
                served.append(request)
        for request in iteration.decodes:
            request.computed += 1
            served.append(request)
        for request in served:
            request.generated += 1
            if request.first_s is None:
                request.first_s = end_s
            request.last_s = end_s
        over = {id(request) for request in served if request.generated >= request.output_tokens}
        if over:
            self.running = [request for request in self.running if id(request) not in over]
        return served
