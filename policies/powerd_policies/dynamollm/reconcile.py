"""From the fleet as it is and the shapes as they shall be to a plan: who stays, who changes pool, who starts, who drains.

House rules: start before stop: nothing that serves is drained for a newcomer that does not serve yet, unless its GPUs are what
the newcomer needs; never more GPUs than there are; the same state and shapes give the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from powerd_policies.dynamollm.fleet import InstanceState
from powerd_policies.dynamollm.pool import Shape


@dataclass(frozen=True, slots=True)
class Member:
    """One instance of the plan; ``id`` None: a new one. ``spare``: it stays only until its successor serves."""

    id: str | None
    pool: str
    tp: int
    spare: bool = False


def reconcile(
    instances: Sequence[InstanceState], shapes: Mapping[str, Sequence[Shape]], gpus: int, at_a_time: int = 4
) -> list[Member]:
    """Return the members of the fleet that lead to ``shapes``; who serves now and is not among them drains.

    ``at_a_time`` instances at most make room for newcomers in one go.
    """
    alive = [i for i in instances if i.phase != "draining"]
    alive.sort(key=lambda i: (i.phase != "serving", i.ready_s or 0.0, _number(i.id)))
    wanted = {(pool, shape.tp): shape.count for pool, own in shapes.items() for shape in own if shape.count > 0}
    members, spare = [], []
    for i in alive:
        key = (i.pool, i.tp)
        if wanted.get(key, 0) > 0:
            wanted[key] -= 1
            members.append(Member(i.id, i.pool, i.tp))
        else:
            spare.append(i)
    left: list[InstanceState] = []
    for i in spare:  # to another pool, as it is
        pool = next((pool for (pool, tp), count in wanted.items() if tp == i.tp and count > 0), None)
        if pool is None:
            left.append(i)
        else:
            wanted[pool, i.tp] -= 1
            members.append(Member(i.id, pool, i.tp))
    missing = [(pool, tp) for (pool, tp), count in wanted.items() for _ in range(count)]
    starting = any(i.phase == "starting" for i in alive) or bool(missing)
    used = sum(i.tp for i in instances)
    if not starting:
        return members
    left = [i for i in left if i.phase == "serving"]
    free = gpus - used
    blocked = []
    for pool, tp in missing:
        if tp <= free:
            free -= tp
            members.append(Member(None, pool, tp))
        else:
            blocked.append((pool, tp))
    victims = max(0, at_a_time - sum(i.phase == "draining" for i in instances))
    for pool, tp in blocked:  # re-shards: GPUs change hands in one plan, so that those that hold the weights keep them
        while free < tp and victims > 0 and left:
            free += left.pop().tp
            victims -= 1
        if free >= tp:
            free -= tp
            members.append(Member(None, pool, tp))
    names = list(shapes)
    members += [Member(i.id, i.pool if i.pool in names else names[-1], i.tp, spare=True) for i in left]
    return members


def _number(name: str) -> tuple[int, str]:
    digits = "".join(letter for letter in name if letter.isdigit())
    return (int(digits) if digits else 0, name)
