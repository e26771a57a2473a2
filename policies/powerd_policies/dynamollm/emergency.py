"""What is done for an instance that runs late, step by step and back again (DynamoLLM section 4.4; ours: the hysteresis).

House rules: the ladder is a table, an event that is not in it is an error and changes nothing; every step up or down is a
``FleetEvent``; a step's measures hold on while later ones are tried, and are taken back one at a time once there is slack again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import Final

from powerd_policies.dynamollm.classes import Slo
from powerd_policies.dynamollm.engine_model import Coefficients
from powerd_policies.dynamollm.fleet import FleetEvent, InstanceLoad


class Rung(IntEnum):
    """How far an instance has climbed; the measures of all lower rungs are in force as well."""

    CALM = 0
    REORDER = 1  # its queue goes by deadline
    MAX_CLOCK = 2
    RESTEER = 3  # requests that wait there go elsewhere
    REJECT = 4  # requests whose deadline has passed are refused, and their senders told
    RESHARD = 5  # the pool's controller is asked to decide now


class Event(StrEnum):
    """What can happen to an instance on the ladder."""

    LATE = "late"  # the slack is negative, and was for as long as a rung is given to help
    SLACK = "slack"  # there has been slack for long enough
    RESHARDED = "resharded"  # the pool's controller has decided
    GONE = "gone"  # the instance drains or has stopped


#: (rung, event) -> next rung. Who is late at the top stays there: the controller has been asked.
LADDER: Final[Mapping[tuple[Rung, Event], Rung]] = MappingProxyType(
    {(rung, Event.LATE): Rung(min(rung + 1, Rung.RESHARD)) for rung in Rung}
    | {(rung, Event.SLACK): Rung(rung - 1) for rung in Rung if rung > Rung.CALM}
    | {(Rung.RESHARD, Event.RESHARDED): Rung.REJECT}
    | {(rung, Event.GONE): Rung.CALM for rung in Rung}
)

_SAYS: Final[Mapping[Rung, str]] = {
    Rung.CALM: "in time again",
    Rung.REORDER: "queue by deadline",
    Rung.MAX_CLOCK: "highest clock",
    Rung.RESTEER: "waiting requests go elsewhere",
    Rung.REJECT: "expired requests are rejected",
    Rung.RESHARD: "early re-shard wanted",
}


class EmergencyError(ValueError):
    """An event that the ladder does not have at this rung: the caller's mistake; nothing changed."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a rung is given before the next, and how much slack for how long leads down one."""

    up_s: float = 5.0  # the instance controller's period
    down_s: float = 30.0
    down_slack_share: float = 0.3  # of the TTFT that was promised

    @classmethod
    def of(cls, period_s: float) -> Patience:
        """A rung for every look that a controller takes; six of them with slack lead down."""
        return cls(period_s, 6 * period_s)


@dataclass(frozen=True, slots=True)
class Ladder:
    """Where one instance stands, since when, and since when it has had slack (None: it has none)."""

    instance: str
    rung: Rung = Rung.CALM
    since_s: float = 0.0
    slack_since_s: float | None = None


def advance(ladder: Ladder, event: Event, now_s: float, detail: str = "") -> tuple[Ladder, tuple[FleetEvent, ...]]:
    """Return the ladder after an event and what to log; raises ``EmergencyError`` for an event that is not in the table."""
    following = LADDER.get((ladder.rung, event))
    if following is None:
        raise EmergencyError(f"instance {ladder.instance} is at {ladder.rung.name}: {event} cannot happen there")
    if following == ladder.rung:
        return ladder, ()
    said = f"{ladder.rung.name} -> {following.name}: {_SAYS[following]}" + (f" ({detail})" if detail else "")
    return replace(ladder, rung=following, since_s=now_s, slack_since_s=None), (
        FleetEvent(now_s, "emergency", ladder.instance, said),
    )


def judge(ladder: Ladder, now_s: float, slack_s: float | None, ttft_s: float, patience: Patience) -> tuple[Ladder, Event | None]:
    """Return what a slack means for an instance: the first lateness acts at once, later ones when a rung had its time.

    ``slack_s`` None (not known) means nothing: neither late nor calm.
    """
    if slack_s is None:
        return ladder, None
    if slack_s < 0.0:
        ladder = replace(ladder, slack_since_s=None)
        had_its_time = ladder.rung == Rung.CALM or now_s - ladder.since_s >= patience.up_s
        return ladder, Event.LATE if had_its_time and ladder.rung != Rung.RESHARD else None
    if ladder.rung == Rung.CALM or slack_s < patience.down_slack_share * ttft_s:
        return replace(ladder, slack_since_s=None), None
    if ladder.slack_since_s is None:
        return replace(ladder, slack_since_s=now_s), None
    return ladder, Event.SLACK if now_s - ladder.slack_since_s >= patience.down_s else None


def slack_of(load: InstanceLoad, at: Coefficients, slo: Slo) -> float | None:
    """Return the seconds that the worst placed waiting request of an instance has left; None: the engine does not say.

    The oldest has waited and has its own iteration to come; the newest has all queued prompts before it.
    """
    if load.queued == 0:
        return slo.ttft_s
    if load.queued_prompt_tokens is None or load.oldest_wait_s is None:
        return None
    rest_s = max(at.prefill_fixed_s, at.decode_fixed_s if load.running else 0.0) + at.prefill_token_s * load.queued_prompt_tokens
    oldest_s = load.oldest_wait_s + rest_s / load.queued
    return slo.ttft_s - max(oldest_s, rest_s)


@dataclass(frozen=True, slots=True)
class Measures:
    """What the ladders of all instances ask for, in the terms of a ``FleetPlan``; ``reshard`` are instances, for their pools."""

    reordered: frozenset[str] = frozenset()
    max_clock: frozenset[str] = frozenset()
    resteered: frozenset[str] = frozenset()
    shed: Mapping[str, float] = field(default_factory=dict)
    reshard: frozenset[str] = frozenset()
    events: tuple[FleetEvent, ...] = ()


class Emergencies:
    """The ladders of a fleet's instances."""

    def __init__(self, patience: Patience | None = None) -> None:
        self._patience = patience or Patience()
        self._ladders: dict[str, Ladder] = {}

    def update(self, now_s: float, slacks_s: Mapping[str, tuple[float | None, float]]) -> Measures:
        """Judge every serving instance by its (slack, TTFT promised) and return what is to be done; who is not named is gone."""
        events: list[FleetEvent] = []
        for gone in [name for name in self._ladders if name not in slacks_s]:
            events += advance(self._ladders.pop(gone), Event.GONE, now_s, "it no longer serves")[1]
        for name, (slack_s, ttft_s) in slacks_s.items():
            ladder, event = judge(self._ladders.get(name, Ladder(name)), now_s, slack_s, ttft_s, self._patience)
            if event is not None:
                ladder, said = advance(ladder, event, now_s, f"slack {slack_s:.3f} s of {ttft_s:g} s")
                events += said
            self._ladders[name] = ladder
        return Measures(
            reordered=self._from(Rung.REORDER),
            max_clock=self._from(Rung.MAX_CLOCK),
            resteered=self._from(Rung.RESTEER),
            shed={name: slacks_s[name][1] for name in self._from(Rung.REJECT)},
            reshard=self._from(Rung.RESHARD),
            events=tuple(events),
        )

    def resharded(self, now_s: float, instances: Iterable[str]) -> tuple[FleetEvent, ...]:
        """Note that the pools of these instances have been decided anew; those that never asked are left as they are."""
        events: list[FleetEvent] = []
        for name in instances:
            ladder = self._ladders.get(name)
            if ladder is not None and ladder.rung == Rung.RESHARD:
                self._ladders[name], said = advance(ladder, Event.RESHARDED, now_s, "the pool has decided")
                events += said
        return tuple(events)

    def rung(self, instance: str) -> Rung:
        """Return where an instance stands."""
        return self._ladders.get(instance, Ladder(instance)).rung

    def _from(self, rung: Rung) -> frozenset[str]:
        return frozenset(name for name, ladder in self._ladders.items() if ladder.rung >= rung)
