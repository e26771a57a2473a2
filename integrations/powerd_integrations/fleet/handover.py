"""Start, wait healthy, leave the routes, drain, stop: how replica counts follow a plan without a gap (design: reconfiguration).

House rules: a pure function of (state, what is wanted, what serves, now); growing is never delayed, shrinking always waits until
those that take over serve; replicas that do not come up in time are given up and the old ones stay; GPUs are never overdrawn.

The published count of a group walks ``serving -> leaving (out of the routes) -> gone``. It falls only

1. when every group that takes its requests over serves as many replicas as are wanted of it, or nothing has room to wait for it,
2. and, for the last replica of a group, ``settle_s`` after the routes no longer name the group, when no reader sends any more.

Room is judged step by step: as long as one newcomer fits beside what there is, it is started first; the last old replica goes
before its successors only when none fits, and leaves the routes first when somebody else of its pool serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from powerd_integrations.fleet.published import Group
from powerd_policies.dynamollm.fleet import FleetEvent

Counts = Mapping[Group, int]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a controller wants, by group."""

    replicas: Counts
    routes: Mapping[str, tuple[str, ...]]  # class: pools, nearest first


@dataclass(frozen=True, slots=True)
class Limits:
    """``gpus`` that may be used at most; patience with replicas that start; the time until every reader has new routes."""

    gpus: int
    start_timeout_s: float = 900.0
    retry_s: float = 1800.0
    settle_s: float = 2.0
    wave_ratio: float = 0.25  # of the old replicas end at a time where new ones have no room beside them


@dataclass(frozen=True, slots=True)
class Handover:
    """Where the hand-over stands: published counts, and since when groups start, leave, or are given up."""

    desired: Counts = field(default_factory=dict)
    routes: Mapping[str, tuple[Group, ...]] = field(default_factory=dict)
    starting_s: Mapping[Group, float] = field(default_factory=dict)  # waits for replicas since then
    leaving_s: Mapping[Group, float] = field(default_factory=dict)  # out of the routes since then
    given_up_s: Mapping[Group, float] = field(default_factory=dict)  # did not come up; not tried again for a while
    gave_way: frozenset[Group] = frozenset()  # ended before their successors began; started again when these do not come up


def step(
    state: Handover, wanted: Wanted, serving: Counts, now_s: float, limits: Limits, *, frozen: bool = False
) -> tuple[Handover, tuple[FleetEvent, ...]]:
    """Return the next state and what happened; ``frozen``: the input is stale, nothing may shrink."""
    events: list[FleetEvent] = []
    targets, state = _without_given_up(state, wanted.replicas, serving, now_s, limits, events)
    desired = dict(state.desired)
    for group, count in targets.items():
        desired[group] = max(desired.get(group, 0), count)
    shrinking = {group: targets.get(group, 0) for group in sorted(desired) if desired[group] > targets.get(group, 0)}
    yields = set() if frozen else _yielding(state.desired, desired, shrinking, serving, limits)
    ended = {group for group, count in serving.items() if count and not state.desired.get(group, 0) and not targets.get(group, 0)}
    routes = _routes(wanted.routes, targets, serving, state.routes, yields, ended)
    routed = {group for groups in routes.values() for group in groups}
    leaving = {group: state.leaving_s.get(group, now_s) for group in shrinking if group not in routed}
    if not frozen:
        for group, count in shrinking.items():
            waits = not _taken_over(group, state.routes, wanted, targets, serving)
            last = count == 0 and now_s - leaving.get(group, now_s) < limits.settle_s and serving.get(group, 0) > 0
            if not waits and not last:
                desired[group] = count
    pools = {group.pool for group, count in targets.items() if serving.get(group, 0) < count}
    gave_way = {group for group in state.gave_way if group.pool in pools}
    for group in sorted(yields & _yielding(state.desired, desired, shrinking, serving, limits)):  # others may have made room
        if group in routed:
            gave_way.add(group)
            events.append(FleetEvent(now_s, "gate", str(group), "no room to start the new replicas before the last old one ends"))
        if group in routed or now_s - leaving[group] >= limits.settle_s:
            desired[group] = 0
    _fit(desired, state.desired, shrinking, serving, limits, frozen)
    late = {group: state.starting_s.get(group, now_s) for group, n in desired.items() if serving.get(group, 0) < n}
    leaving = {group: since_s for group, since_s in leaving.items() if desired[group]}
    return Handover(desired, routes, late, leaving, state.given_up_s, frozenset(gave_way)), tuple(events)


def _without_given_up(
    state: Handover, wanted: Counts, serving: Counts, now_s: float, limits: Limits, events: list[FleetEvent]
) -> tuple[dict[Group, int], Handover]:
    """Roll back what does not come up: such a group counts as what serves of it, and its pool keeps what it had."""
    given_up = {g: s for g, s in state.given_up_s.items() if now_s - s < limits.retry_s and g in wanted}
    for group, since_s in state.starting_s.items():
        short = wanted.get(group, 0) > serving.get(group, 0)
        if short and group not in given_up and now_s - since_s >= limits.start_timeout_s:
            given_up[group] = now_s
            detail = (
                f"{serving.get(group, 0)} of {wanted[group]} replicas serve after {limits.start_timeout_s:g} s; the old ones stay"
            )
            events.append(FleetEvent(now_s, "rollback", str(group), detail))
    targets = dict(wanted)
    desired = dict(state.desired)
    for group in given_up:
        targets[group] = desired[group] = min(serving.get(group, 0), wanted[group])
        for other in state.desired:  # what it should have replaced
            if other.pool == group.pool and other != group and other not in given_up:
                kept = 1 if other in state.gave_way else min(state.desired[other], max(1, serving.get(other, 0)))
                targets[other] = max(targets.get(other, 0), kept)
    return targets, replace(state, given_up_s=given_up, desired=desired)


def _taken_over(
    group: Group, old_routes: Mapping[str, tuple[Group, ...]], wanted: Wanted, targets: Counts, serving: Counts
) -> bool:
    """Whether whoever takes this group's requests serves already in full."""
    classes = [name for name, groups in old_routes.items() if group in groups]
    pools = {group.pool} | {pool for name in classes for pool in wanted.routes.get(name, ())[:1]}
    return all(serving.get(other, 0) >= n for other, n in targets.items() if other.pool in pools and other != group)


def _routes(
    wanted: Mapping[str, tuple[str, ...]], targets: Counts, serving: Counts, old: Mapping[str, tuple[Group, ...]],
    yields: Set[Group], ended: Set[Group],
) -> dict[str, tuple[Group, ...]]:  # fmt: skip
    """For each class the groups that serve: of each pool those that are wanted, else whatever of it serves still.

    A group that ends gets nothing more, even when nobody else serves: who waits there would keep it from ending.
    """
    routes = {}
    for name, pools in wanted.items():
        groups: list[Group] = []
        for pool in pools:
            alive = sorted(g for g, n in serving.items() if g.pool == pool and n > 0 and g not in ended)
            alive = [g for g in alive if g not in yields] or alive
            ready = [g for g in alive if targets.get(g, 0) > 0]
            full = ready and all(serving.get(g, 0) >= n for g, n in targets.items() if g.pool == pool)
            groups += ready if full else alive
        before = [g for g in old.get(name, ()) if serving.get(g, 0) > 0 and g not in ended and g not in groups]
        routes[name] = tuple(groups or before)
    return routes


def _yielding(now: Counts, desired: Counts, shrinking: Counts, serving: Counts, room: Limits) -> set[Group]:
    """The last replicas of their groups that give way because nothing else makes room for any newcomer."""
    merged = dict(desired)
    if _waves(merged, now, shrinking, serving, room) or _trim(merged, now, room) or _wave_runs(desired, now, serving):
        return set()
    if sum(group.tp * count for group, count in desired.items()) <= room.gpus:
        return set()
    last = [group for group, count in shrinking.items() if count == 0 and desired[group] == 1]
    return set(last[: _wave(shrinking, desired, room)])


def _fit(desired: dict[Group, int], before: Counts, shrinking: Counts, serving: Counts, room: Limits, frozen: bool) -> None:
    """Old and new together may not use more GPUs than there are: the old give way in waves, and the new start where they were."""
    if not frozen:
        _waves(desired, before, shrinking, serving, room)
    _trim(desired, before, room)


def _waves(desired: dict[Group, int], before: Counts, shrinking: Counts, serving: Counts, room: Limits) -> bool:
    """Take a wave of old replicas away, of no group the last one; whether any was taken."""
    if _wave_runs(desired, before, serving):
        return False
    wave = most = _wave(shrinking, desired, room)
    for group, count in shrinking.items():
        while wave > 0 and _over(desired, room) > 0 and desired[group] > max(count, 1):
            desired[group] -= 1
            wave -= 1
    return wave < most


def _trim(desired: dict[Group, int], before: Counts, room: Limits) -> bool:
    """Start only what fits; whether anything is started."""
    growing = [group for group in sorted(desired) if desired[group] > before.get(group, 0)]
    for group in reversed(growing):
        while _over(desired, room) > 0 and desired[group] > before.get(group, 0):
            desired[group] -= 1
    return any(desired[group] > before.get(group, 0) for group in growing)


def _wave(shrinking: Counts, desired: Counts, room: Limits) -> int:
    return max(1, int(sum(desired[group] for group in shrinking) * room.wave_ratio))


def _wave_runs(desired: Counts, before: Counts, serving: Counts) -> bool:
    """Whether newcomers that the last wave made room for still start."""
    return any(count > before.get(group, 0) > serving.get(group, 0) for group, count in desired.items())


def _over(desired: Counts, room: Limits) -> int:
    return sum(group.tp * count for group, count in desired.items()) - room.gpus
