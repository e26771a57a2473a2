"""Start, wait healthy, leave the routes, drain, stop: how replica counts follow a plan without a gap (design: reconfiguration).

House rules: a pure function of (state, what is wanted, what serves, now); growing is never delayed, shrinking always waits until
those that take over serve; replicas that do not come up in time are given up and the old ones stay; GPUs are never overdrawn.

The published count of a group walks ``serving -> leaving (out of the routes) -> gone``. It falls only

1. when every group that takes its requests over serves as many replicas as are wanted of it, or nothing has room to wait for it,
2. and, for the last replica of a group, ``settle_s`` after the routes no longer name the group, when no reader sends any more.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    routes = _routes(wanted.routes, targets, serving, state.routes)
    routed = {group for groups in routes.values() for group in groups}
    leaving = {group: state.leaving_s.get(group, now_s) for group in shrinking if group not in routed}
    if not frozen:
        for group, count in shrinking.items():
            waits = not _taken_over(group, state.routes, wanted, targets, serving)
            last = count == 0 and now_s - leaving.get(group, now_s) < limits.settle_s and serving.get(group, 0) > 0
            if not waits and not last:
                desired[group] = count
    _fit(desired, state.desired, shrinking, serving, limits, frozen, now_s, events)
    late = {group: state.starting_s.get(group, now_s) for group, n in desired.items() if serving.get(group, 0) < n}
    return Handover(desired, routes, late, {g: s for g, s in leaving.items() if desired[g]}, state.given_up_s), tuple(events)


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
                targets[other] = max(targets.get(other, 0), min(state.desired[other], max(1, serving.get(other, 0))))
    return targets, replace(state, given_up_s=given_up, desired=desired)


def _taken_over(
    group: Group, old_routes: Mapping[str, tuple[Group, ...]], wanted: Wanted, targets: Counts, serving: Counts
) -> bool:
    """Whether whoever takes this group's requests serves already in full."""
    classes = [name for name, groups in old_routes.items() if group in groups]
    pools = {group.pool} | {pool for name in classes for pool in wanted.routes.get(name, ())[:1]}
    return all(serving.get(other, 0) >= n for other, n in targets.items() if other.pool in pools and other != group)


def _routes(
    wanted: Mapping[str, tuple[str, ...]], targets: Counts, serving: Counts, old: Mapping[str, tuple[Group, ...]]
) -> dict[str, tuple[Group, ...]]:
    """For each class the groups that serve: of each pool those that are wanted, else whatever of it serves still."""
    routes = {}
    for name, pools in wanted.items():
        groups: list[Group] = []
        for pool in pools:
            alive = sorted(g for g, n in serving.items() if g.pool == pool and n > 0)
            ready = [g for g in alive if targets.get(g, 0) > 0]
            full = ready and all(serving.get(g, 0) >= n for g, n in targets.items() if g.pool == pool)
            groups += ready if full else alive
        before = [g for g in old.get(name, ()) if serving.get(g, 0) > 0 and g not in groups]
        routes[name] = tuple(groups or before)
    return routes


def _fit(
    desired: dict[Group, int], before: Counts, shrinking: Counts, serving: Counts, room: Limits, frozen: bool, now_s: float,
    events: list[FleetEvent],
) -> None:  # fmt: skip
    """Old and new together may not use more GPUs than there are: the old give way in waves, and the new start where they were."""

    def over() -> int:
        return sum(group.tp * count for group, count in desired.items()) - room.gpus

    growing = [group for group in sorted(desired) if desired[group] > before.get(group, 0)]
    wave_runs = any(serving.get(group, 0) < before.get(group, 0) for group in growing)
    if over() > 0 and shrinking and not frozen and not wave_runs:
        alive = sum(desired[group] for group in shrinking)
        wave = max(1, int(alive * room.wave_ratio))
        for keep in (1, 0):  # the last of a pool only where nothing else makes room
            for group, count in shrinking.items():
                while wave > 0 and over() > 0 and desired[group] > max(count, keep):
                    desired[group] -= 1
                    wave -= 1
                    if keep == 0:
                        detail = "no room to start the new replicas before the last old one ends"
                        events.append(FleetEvent(now_s, "gate", str(group), detail))
            if wave < max(1, int(alive * room.wave_ratio)):
                break
    for group in reversed(growing):
        while over() > 0 and desired[group] > before.get(group, 0):
            desired[group] -= 1
