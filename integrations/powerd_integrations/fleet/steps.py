"""The life of a replica while a fleet is changed, as a table; and what is wanted against what is there.

House rules: pure; an event that a phase does not allow is an error and changes nothing; a plan is matched by what replicas
are, so that applying it twice changes nothing the second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from powerd_policies.dynamollm.fleet import FleetPlan, InstanceWant, Role


class Phase(StrEnum):
    """Where a replica is; only a serving one gets requests."""

    STARTING = "starting"  # a process, not healthy yet
    READY = "ready"  # healthy, not in the router
    SERVING = "serving"
    LEAVING = "leaving"  # out of the router, its requests finish
    STOPPING = "stopping"  # told to end
    GONE = "gone"


class Event(StrEnum):
    """What happens to a replica."""

    HEALTHY = "healthy"
    ADMIT = "admit"
    WITHDRAW = "withdraw"
    READMIT = "readmit"  # a failed change is undone before the engine was told
    DRAINED = "drained"
    GIVE_UP = "give up"
    STOPPED = "stopped"
    DIED = "died"


TABLE: Final[Mapping[tuple[Phase, Event], Phase]] = {
    (Phase.STARTING, Event.HEALTHY): Phase.READY,
    (Phase.STARTING, Event.GIVE_UP): Phase.STOPPING,
    (Phase.READY, Event.ADMIT): Phase.SERVING,
    (Phase.READY, Event.GIVE_UP): Phase.STOPPING,
    (Phase.SERVING, Event.WITHDRAW): Phase.LEAVING,
    (Phase.LEAVING, Event.READMIT): Phase.SERVING,
    (Phase.LEAVING, Event.DRAINED): Phase.STOPPING,
    (Phase.STOPPING, Event.STOPPED): Phase.GONE,
    **{(phase, Event.DIED): Phase.GONE for phase in Phase if phase is not Phase.GONE},
}


class IllegalStepError(RuntimeError):
    """An event that the phase does not allow; nothing has changed."""


def after(phase: Phase, event: Event) -> Phase:
    """The phase that follows; IllegalStepError when the table does not know it."""
    try:
        return TABLE[phase, event]
    except KeyError:
        raise IllegalStepError(f"a replica that is {phase} cannot {event}") from None


@dataclass(frozen=True, slots=True)
class Present:
    """A replica that is there, as far as matching needs it."""

    id: str
    pool: str
    tp: int
    role: Role = "both"


@dataclass(frozen=True, slots=True)
class Difference:
    """What turns the present fleet into the wanted one."""

    keep: tuple[tuple[str, InstanceWant], ...]
    start: tuple[InstanceWant, ...]
    stop: tuple[str, ...]


def difference(plan: FleetPlan, present: Sequence[Present]) -> Difference:
    """Match wants to replicas: by id, else of the same pool, else of any pool, always of the same shape.

    A replica's pool is a label of the router's; its tensor parallelism and role are not.
    """
    left = {replica.id: replica for replica in present}
    keep: list[tuple[str, InstanceWant]] = []
    rest: list[InstanceWant] = []
    for want in plan.instances:
        named = left.get(want.id or "")
        if named is not None and (named.tp, named.role) == (want.tp, want.role):
            keep.append((named.id, want))
            del left[named.id]
        else:
            rest.append(want)
    named_ids = {want.id for want in plan.instances}
    for same_pool in (True, False):
        still = []
        for want in rest:
            match = _match(want, (r for r in left.values() if r.id not in named_ids), same_pool)
            if match is None:
                still.append(want)
            else:
                keep.append((match, want))
                del left[match]
        rest = still
    return Difference(tuple(keep), tuple(rest), tuple(left))


def _match(want: InstanceWant, candidates: Iterable[Present], same_pool: bool) -> str | None:
    for replica in candidates:
        if (replica.tp, replica.role) == (want.tp, want.role) and (not same_pool or replica.pool == want.pool):
            return replica.id
    return None


def merged(new: Mapping[str, tuple[str, ...]], old: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Routes while a fleet changes: the new ones first, and what served before for as long as it is there."""
    names = dict.fromkeys((*new, *old))
    return {name: tuple(dict.fromkeys((*new.get(name, ()), *old.get(name, ())))) for name in names}
