"""The vocabulary of a fleet: what a controller sees of it and what it wants of it. The same in simulation and in production.

House rules: a state is what was observed, never what was asked for; a plan is the whole desired state, so that it can be applied
twice; missing is ``None``; times are seconds of one clock; nothing here looks ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

Phase = Literal["starting", "serving", "draining"]
Role = Literal["both", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class ClassLoad:
    """Requests of one class that arrived in the last ``FleetState.window_s`` seconds, and their tokens (output: predicted)."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class InstanceLoad:
    """What one instance has to do, as an engine's own metrics say it; None: not known."""

    running: int = 0  # requests being decoded
    queued: int = 0  # requests waiting for their first chunk or in prefill
    queued_prompt_tokens: int | None = 0  # of them, not yet computed
    kv_used_ratio: float | None = 0.0
    oldest_wait_s: float | None = 0.0
    requests_per_s: float | None = None  # over the last few seconds
    prompt_tokens_per_s: float | None = None
    output_tokens_per_s: float | None = None
    ttft_p99_s: float | None = None
    tbt_p99_s: float | None = None
    age_s: float = 0.0  # how old this is
    prompt_bands: tuple[tuple[float, float, float], ...] | None = None  # lengths seen lately: (share, over, up to) tokens


@dataclass(frozen=True, slots=True)
class InstanceState:
    """One instance as it is."""

    id: str
    pool: str
    tp: int
    clock_mhz: int
    phase: Phase = "serving"
    role: Role = "both"
    ready_s: float | None = None  # starting: when it is expected to serve
    load: InstanceLoad = InstanceLoad()


@dataclass(frozen=True, slots=True)
class FleetState:
    """The fleet at ``now_s``; ``arrivals`` by class name over the last ``window_s`` seconds."""

    now_s: float
    window_s: float
    instances: tuple[InstanceState, ...]
    arrivals: Mapping[str, ClassLoad]
    gpus: int  # that may be used at most
    power_w: float | None = None
    carbon_g_per_kwh: float | None = None
    price_per_kwh: float | None = None


@dataclass(frozen=True, slots=True)
class InstanceWant:
    """One instance as it shall be; ``id`` None: a new one. An instance that no want names is drained and stopped."""

    id: str | None
    pool: str
    tp: int
    clock_mhz: int
    role: Role = "both"
    reason: str = ""


@dataclass(frozen=True, slots=True)
class FleetEvent:
    """Something that an operator would ask about: a ladder's step, a re-shard, a gate that said no."""

    at_s: float
    kind: str  # scale, reshard, clock, merge, emergency, infeasible, gate, misprediction, rollback, ...
    subject: str  # a pool or an instance
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """The desired fleet: its instances, and for each class the pools that take it, nearest first."""

    instances: tuple[InstanceWant, ...]
    routes: Mapping[str, tuple[str, ...]]
    events: tuple[FleetEvent, ...] = ()
    reordered: frozenset[str] = frozenset()  # instances whose queue goes by deadline
    resteered: frozenset[str] = frozenset()  # instances whose waiting requests go elsewhere
    shed: Mapping[str, float] = field(default_factory=dict)  # instance: waiting longer than these seconds is rejected


class FleetController(Protocol):
    """Decides a fleet. Called every ``period_s`` seconds, and once at the begin; the same object in simulation and production."""

    name: str
    period_s: float

    def decide(self, state: FleetState) -> FleetPlan:
        """Return the whole desired fleet from what is known at ``state.now_s``; remembers what it saw, never looks ahead."""
        ...
