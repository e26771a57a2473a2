"""Iteration-level continuous batching with chunked prefill: which requests compute what in the next iteration.

One token of each request that decodes comes first, prompts get the rest of `chunk_tokens` (vLLM's max_num_batched_tokens).

House rules: pure, no clock and no I/O: times come in and go out; first come, first served; a request never holds more KV
tokens than it has computed; who does not fit any more is preempted and computed anew, the youngest first, as vLLM does.
"""

from __future__ import annotations

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
        self.waiting.append(request)

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
            youngest = self.running.pop()
            used -= youngest.computed
            youngest.computed, youngest.preemptions = 0, youngest.preemptions + 1
            self.preemptions += 1
            self.waiting.appendleft(youngest)
            decodes = [request for request in decodes if request is not youngest]
        free, budget = self.kv_tokens - used - len(decodes), max(0, self.chunk_tokens - len(decodes))
        chunks: list[tuple[Request, int]] = []
        for request in self.running:
            if budget and not request.decoding and (tokens := min(budget, request.context - request.computed, free)) > 0:
                chunks.append((request, tokens))
                budget, free = budget - tokens, free - tokens
        promised = sum(r.context - r.computed for r in self.running if not r.decoding)
        free = self.kv_tokens - used - len(decodes) - promised
        while budget and self.waiting and len(self.running) < self.max_running:
            request = self.waiting[0]
            if request.arrived_s > now_s or request.context > free:
                break
            self.waiting.popleft()
            self.running.append(request)
            free -= request.context
            tokens = min(budget, request.context)
            budget -= tokens
            chunks.append((request, tokens))
            if request.scheduled_s is None:
                request.scheduled_s = now_s
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
