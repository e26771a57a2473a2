"""Changing tensor parallelism without loading again: which GPU becomes which rank, who copies what (DynamoLLM section 4.5).

House rules: every GPU keeps as much as can be kept (a maximum-weight matching of the GPUs' old shards with the new ranks), and no
other placement moves fewer bytes; rank r of n holds the bytes from r/n to (r+1)/n of the weights; instances that nothing changes
are left alone; the rest is done a few instances at a time, and who sends still holds at that time what it sends.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Layout = tuple[tuple[str, ...], ...]  # by instance its GPUs, in the order of their ranks


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes that ``target`` copies from ``source``."""

    source: str
    target: str
    bytes: int


#: The old instances serve until the new ones do; or they drain first; or they stop and the new ones load from outside.
How = Literal["overlap", "drain", "reload"]


@dataclass(frozen=True, slots=True)
class Step:
    """Instances (by their place in the layouts) that change together."""

    stop: tuple[int, ...]
    start: tuple[int, ...]
    transfers: tuple[Transfer, ...]
    busiest_bytes: int
    how: How


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """How a layout becomes another; ``kept`` are pairs of an old and the new instance that it simply remains."""

    layout: Layout
    kept: tuple[tuple[int, int], ...]
    steps: tuple[Step, ...]
    kept_bytes: int
    moved_bytes: int
    naive_bytes: int  # what would move if GPUs took the new ranks in their own order
    loaded_bytes: int  # what would be loaded if nothing were kept
    weights_bytes: int

    @property
    def busiest_bytes(self) -> int:
        """What the busiest GPU of any step takes in or gives out: it decides how long that step copies."""
        return max((step.busiest_bytes for step in self.steps), default=0)

    @property
    def t_units(self) -> float:
        """Time to copy, step after step, in T: the time to move an eighth of the model (some 50 ms over NVLink)."""
        return sum(step.busiest_bytes for step in self.steps) / (self.weights_bytes / 8)

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """All copies, in the order of their steps."""
        return tuple(transfer for step in self.steps for transfer in step.transfers)


def shard(rank: int, tp: int, weights_bytes: int) -> tuple[int, int]:
    """Return the first byte that a rank holds and the first that it no longer holds."""
    return weights_bytes * rank // tp, weights_bytes * (rank + 1) // tp


def plan_reshard(
    old: Layout,
    new_tps: Sequence[int],
    *,
    weights_bytes: int,
    spare: Sequence[str] = (),
    memory_bytes: int | None = None,
    kv_bytes: int = 0,
    at_a_time: int = 1,
) -> ReshardPlan:
    """Return how the GPUs of ``old`` and ``spare`` ones become instances of ``new_tps`` with the fewest bytes moved.

    ``memory_bytes`` of one GPU and ``kv_bytes`` in use on it decide for each step whether the old instances serve on while new
    weights come in beside theirs, drain first, or have to stop and load; None: they drain. ``at_a_time`` groups of instances that
    share GPUs change together in one step. Raises ``ValueError`` when there are too few GPUs, or no weights to begin with.
    """
    held = {gpu: shard(rank, len(gpus), weights_bytes) for gpus in old for rank, gpu in enumerate(gpus)}
    gpus = [*held, *(gpu for gpu in spare if gpu not in held)]
    slots = [(number, rank, shard(rank, tp, weights_bytes)) for number, tp in enumerate(new_tps) for rank in range(tp)]
    if not held:
        raise ValueError("no instance holds weights: that is a start, not a re-shard")
    if min(new_tps, default=0) < 1:
        raise ValueError(f"tensor parallelisms {tuple(new_tps)}: at least one, each at least 1")
    if len(slots) > len(gpus):
        raise ValueError(f"instances of {'+'.join(map(str, new_tps))} GPUs need {len(slots)}; there are {len(gpus)}")
    chosen = _match(old, new_tps, gpus, held, slots)
    takes = {gpu: slot for slot, gpu in zip(slots, chosen, strict=True)}
    layout = tuple(
        tuple(gpu for gpu, slot in zip(chosen, slots, strict=True) if slot[0] == number) for number in range(len(new_tps))
    )
    kept_bytes = sum(_overlap(held.get(gpu), slot[2]) for gpu, slot in takes.items())
    loaded = sum(end - begin for _, _, (begin, end) in slots)
    naive_kept = sum(_overlap(held.get(gpu), slot[2]) for gpu, slot in zip(gpus, slots, strict=False))
    kept = tuple((old.index(gpus), number) for number, gpus in enumerate(layout) if gpus in old)
    steps = _steps(old, layout, kept, held, {gpu: slot[2] for gpu, slot in takes.items()}, memory_bytes, kv_bytes, at_a_time)
    return ReshardPlan(layout, kept, steps, kept_bytes, loaded - kept_bytes, loaded - naive_kept, loaded, weights_bytes)


def _steps(
    old: Layout,
    layout: Layout,
    kept: Sequence[tuple[int, int]],
    held: dict[str, tuple[int, int]],
    wanted: dict[str, tuple[int, int]],
    memory_bytes: int | None,
    kv_bytes: int,
    at_a_time: int,
) -> tuple[Step, ...]:
    """Return the steps, those that nobody notices first; what a step has overwritten no later step copies."""
    ways = ("overlap", "drain", "reload")

    def how(news: Iterable[int]) -> How:
        if memory_bytes is None:
            return "drain"
        mine = [gpu for number in news for gpu in layout[number]]
        most = max(
            (_length(held.get(gpu)) + _length(wanted[gpu]) - _overlap(held.get(gpu), wanted[gpu]) for gpu in mine), default=0
        )
        return "overlap" if most + kv_bytes <= memory_bytes else "drain" if most <= memory_bytes else "reload"

    groups = [(how(news), olds, news) for olds, news in _groups(old, layout, kept)]
    groups.sort(key=lambda group: (not group[2], ways.index(group[0])))  # those that only stop come last: others may need them
    now, steps = dict(held), []
    for some in (groups[n : n + at_a_time] for n in range(0, len(groups), at_a_time)):
        stop = tuple(sorted(n for _, olds, _ in some for n in olds))
        start = tuple(sorted(n for _, _, news in some for n in news))
        mine = {gpu: wanted[gpu] for number in start for gpu in layout[number]}
        transfers = tuple(_copies(mine, now))
        for gpu in (gpu for number in stop for gpu in old[number]):
            del now[gpu]
        now.update(mine)
        steps.append(Step(stop, start, transfers, _busiest(transfers), max((way for way, _, _ in some), key=ways.index)))
    return tuple(steps)


def _length(interval: tuple[int, int] | None) -> int:
    return 0 if interval is None else interval[1] - interval[0]


def _overlap(one: tuple[int, int] | None, other: tuple[int, int]) -> int:
    return 0 if one is None else max(0, min(one[1], other[1]) - max(one[0], other[0]))


def _match(
    old: Layout,
    new_tps: Sequence[int],
    gpus: Sequence[str],
    held: dict[str, tuple[int, int]],
    slots: Sequence[tuple[int, int, tuple[int, int]]],
) -> list[str]:
    """Return for each slot the GPU that takes it; among placements that keep as much, one that entangles few instances."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    home = _homes(old, new_tps)
    where = {gpu: number for number, members in enumerate(old) for gpu in members}
    bonus = 0.5 / len(slots)  # all of them together are less than a byte
    weights = np.array(
        [
            [_overlap(held.get(gpu), part) + bonus * (gpu in where and where[gpu] == home[number]) for gpu in gpus]
            for number, _, part in slots
        ]
    )
    rows, columns = linear_sum_assignment(weights, maximize=True)
    return [gpus[column] for _, column in sorted(zip(rows, columns, strict=True))]


def _homes(old: Layout, new_tps: Sequence[int]) -> list[int | None]:
    """Return for each new instance the old one of whose GPUs it would best be made: of those with room, the tightest."""
    free = [len(gpus) for gpus in old]
    homes: list[int | None] = [None] * len(new_tps)
    for number, tp in sorted(enumerate(new_tps), key=lambda pair: -pair[1]):
        fitting = [n for n, left in enumerate(free) if left >= tp]
        if fitting:
            homes[number] = min(fitting, key=lambda n: free[n] - tp)
            free[homes[number] or 0] -= tp
    return homes


def _copies(wanted: dict[str, tuple[int, int]], held: dict[str, tuple[int, int]]) -> list[Transfer]:
    """Return who copies what from whom; what several hold is given by the one that gives least so far."""
    cuts = sorted({edge for part in itertools.chain(wanted.values(), held.values()) for edge in part})
    pieces = [
        (end - begin, begin, gpu)
        for gpu, (first, last) in wanted.items()
        for begin, end in itertools.pairwise(cuts)
        if first <= begin and end <= last and not _overlap(held.get(gpu), (begin, end))
    ]
    gives = dict.fromkeys(held, 0)
    between: dict[tuple[str, str], int] = {}
    for length, begin, gpu in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        source = min((other for other, part in held.items() if part[0] <= begin < part[1]), key=lambda other: gives[other])
        gives[source] += length
        between[source, gpu] = between.get((source, gpu), 0) + length
    return [Transfer(source, target, length) for (source, target), length in between.items()]


def _busiest(transfers: Iterable[Transfer]) -> int:
    takes: dict[str, int] = {}
    gives: dict[str, int] = {}
    for each in transfers:
        takes[each.target] = takes.get(each.target, 0) + each.bytes
        gives[each.source] = gives.get(each.source, 0) + each.bytes
    return max(itertools.chain(takes.values(), gives.values()), default=0)


def _groups(old: Layout, new: Layout, kept: Sequence[tuple[int, int]]) -> list[tuple[set[int], set[int]]]:
    """Return the old and new instances that hang together by GPUs, small groups first; those that are kept are in none."""
    same_old, same_new = {one for one, _ in kept}, {other for _, other in kept}
    groups: list[tuple[set[int], set[int], set[str]]] = []
    members = [(n, None, gpus) for n, gpus in enumerate(old) if n not in same_old]
    for old_n, new_n, gpus in [*members, *((None, n, gpus) for n, gpus in enumerate(new) if n not in same_new)]:
        touching = [group for group in groups if group[2] & set(gpus)]
        olds = {n for group in touching for n in group[0]} | ({old_n} if old_n is not None else set())
        news = {n for group in touching for n in group[1]} | ({new_n} if new_n is not None else set())
        groups = [group for group in groups if group not in touching]
        groups.append((olds, news, set(gpus).union(*(group[2] for group in touching))))
    return [(olds, news) for olds, news, _ in sorted(groups, key=lambda group: len(group[2]))]
