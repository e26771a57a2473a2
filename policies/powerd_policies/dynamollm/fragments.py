"""Pools of request classes, and whole instances out of fractions of them (DynamoLLM section 4.3).

House rules: load is moved, never lost; a request is only ever moved to a pool that was made for prompts and answers no shorter
than its own; what is left over is provided once, in the largest pool.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from powerd_policies.dynamollm.classes import NAMES, SIZES, dominates

Partition = Mapping[str, tuple[str, ...]]  # pool: its classes; a pool is named after its largest class

#: The partitions that are worth a look, coarsest first: one pool, by prompt, by answer, and one pool for each class.
PARTITIONS: Final[Mapping[str, Partition]] = {
    "one": {"LL": NAMES},
    "prompt": {f"{size}L": tuple(name for name in NAMES if name[0] == size) for size in SIZES},
    "output": {f"L{size}": tuple(name for name in NAMES if name[1] == size) for size in SIZES},
    "nine": {name: (name,) for name in NAMES},
}


@dataclass(frozen=True, slots=True)
class Allocation:
    """Whole instances by pool, and of each pool's own load the share that each pool serves: shares of a pool add up to 1."""

    counts: Mapping[str, int]
    shares: Mapping[str, Mapping[str, float]]  # pool whose load it is: pool that serves it: share


def upward(pool: str, pools: Mapping[str, object]) -> tuple[str, ...]:
    """Return the other pools that dominate ``pool``, nearest first: the fewest sizes larger, in answers before prompts."""
    above = [name for name in pools if name != pool and dominates(name, pool)]
    return tuple(sorted(above, key=lambda name: (_steps(pool, name), SIZES.index(name[0]))))


def _steps(smaller: str, larger: str) -> int:
    return sum(SIZES.index(b) - SIZES.index(a) for a, b in zip(smaller, larger, strict=True))


def allocate(needs: Mapping[str, float], most: int | None = None) -> Allocation:
    """Return whole instances for ``needs`` (by pool, in fractions): floor, the rest to the next larger pool, the last one up.

    A pool that is left without an instance is merged upward: all its load goes on. With ``most`` instances at most, ``needs`` are
    thinned in proportion first, so that the whole fits. Raises ValueError for a need below zero or without end.
    """
    if bad := [name for name, need in needs.items() if not 0 <= need < math.inf]:
        raise ValueError(f"pool {bad[0]} cannot need {needs[bad[0]]} instances")
    if most is not None and sum(needs.values()) > most:
        thinned = most / sum(needs.values())
        needs = {name: need * thinned for name, need in needs.items()}
    order = sorted(needs, key=lambda name: (sum(SIZES.index(size) for size in name), SIZES.index(name[0])))
    load: dict[str, dict[str, float]] = {name: {name: needs[name]} if needs[name] > 0 else {} for name in order}
    counts: dict[str, int] = {}
    for name in order:
        held = load[name]
        total = math.fsum(held.values())
        above = upward(name, needs)
        if not above:  # the last pool, or one that nothing larger would take
            counts[name] = math.ceil(total - 1e-9)
            continue
        counts[name] = math.floor(total + 1e-9)
        rest = max(0.0, total - counts[name])
        if total > 0 and rest > 1e-9:
            for owner, part in held.items():
                moved = part * rest / total
                load[above[0]][owner] = load[above[0]].get(owner, 0.0) + moved
                held[owner] = part - moved
    shares = {
        owner: {
            name: part / needs[owner] for name in order if (part := load[name].get(owner, 0.0)) > 1e-12 * max(needs[owner], 1e-12)
        }
        for owner in order
        if needs[owner] > 0
    }
    return Allocation(counts, shares)


def routes(partition: Partition, counts: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Return for each class the pools with instances that may take it, nearest first; its own pool first if it has any.

    A class that no dominating pool serves goes to whatever there is, the largest pool first.
    """
    alive = [pool for pool in partition if counts.get(pool, 0) > 0]
    found = {}
    for pool, names in partition.items():
        own = (pool,) if pool in alive else ()
        way = own + tuple(name for name in upward(pool, dict.fromkeys(alive)))
        rest = tuple(
            sorted((name for name in alive if name not in way), key=lambda name: -sum(SIZES.index(size) for size in name))
        )
        for name in names:
            found[name] = way or rest
    return found
