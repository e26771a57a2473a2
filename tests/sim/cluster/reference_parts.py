"""What the plain cluster simulator (``reference.py``) is made of: requests, engines, KV caches on their way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from powerd_policies.dynamollm.fleet import Role


def ns(seconds: float) -> int:
    return int(seconds * 1e9 + 0.5)


@dataclass
class Request:
    number: int
    arrival: int
    prompt: int
    output: int
    klass: int
    left: int  # prompt tokens not computed
    first: int | None = None
    finish: int | None = None
    last: int = 0  # when its last token came
    gaps: list[int] = field(default_factory=list)
    joules: float = 0.0
    rejected: bool = False
    instance: int = -1
    sequence: int = 0  # when it came to its engine


@dataclass
class Engine:
    id: str
    serial: int
    pool: str
    tp: int
    clock: int
    phase: str
    ready: int
    at: int  # not in flight: when the next iteration may begin
    role: Role = "both"
    queue: list[Request] = field(default_factory=list)
    prefilling: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    held: list[Request] = field(default_factory=list)  # with a first token, to decode elsewhere
    coming: list[Request] = field(default_factory=list)  # whose KV cache is on its way
    flight: tuple[int, list[tuple[Request, int]], float, float] | None = None  # duration, chunks, prompt and decode joules
    idle_since: int | None = None
    free: int = 0
    charged: int = 0
    stall: int = 0
    by_deadline: bool = False

    @property
    def everyone(self) -> list[Request]:
        return [*self.queue, *self.prefilling, *self.running, *self.held, *self.coming]

    def needs(self, request: Request) -> int:
        return request.prompt + (0 if self.role == "prefill" else request.output)

    @property
    def reserved(self) -> int:
        arrived = self.queue if self.role == "decode" else []
        return sum(self.needs(r) for r in [*arrived, *self.prefilling, *self.running, *self.held, *self.coming])


@dataclass
class Move:
    request: Request
    source: Engine
    to: Engine | None = None
    end: int = 0


def p99_s(gaps: list[int]) -> float:
    """By nearest rank: the shortest gap that at least 99 of 100 do not exceed."""
    if not gaps:
        return math.nan
    return sorted(gaps)[math.ceil(99 * len(gaps) / 100) - 1] / 1e9
