"""The order in which ranks really ran their instructions: compared with the derived one, with each other, and checked for sense.

House rules: pure; needs no third party; whoever disagrees is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from powerd_integrations.pipeline.place import Place

#: (stage, kind, microbatch): an instruction as ranks tell it each other.
Key = tuple[int, str, int]
RankOrder = tuple[Key, ...]

FORWARD, BACKWARD, INPUT, WEIGHT = "forward", "backward", "input", "weight"


class OrderError(ValueError):
    """An order that cannot be planned for; the message names the rank."""


def keys(order: Sequence[Any]) -> RankOrder:
    """One rank's order from tuples, lists or objects with ``stage``, ``kind`` and ``microbatch``."""
    return tuple(
        (int(i[0]), str(i[1]), int(i[2])) if isinstance(i, (tuple, list)) else (int(i.stage), str(i.kind), int(i.microbatch))
        for i in order
    )


def text(key: Key) -> str:
    """An instruction for people."""
    return f"{key[1]} of microbatch {key[2]} on stage {key[0]}"


def agree(told: Sequence[tuple[Place, RankOrder]]) -> tuple[tuple[RankOrder, ...], ...]:
    """The order of every rank of every pipeline; OrderError when ranks disagree or it cannot be run.

    Tensor-parallel peers run the same. Pipelines may have different numbers of microbatches (elastic training), but those with
    the same work do it in the same sequence, and all have the same stages.
    """
    pipelines: dict[int, dict[int, tuple[Place, RankOrder]]] = {}
    for place, order in told:
        ranks = pipelines.setdefault(place.pipeline, {})
        same = [ranks[place.rank]] if place.rank in ranks else []
        same += [other[place.rank] for other in pipelines.values() if place.rank in other]
        for known_place, known in same:
            if known != order and (known_place.pipeline == place.pipeline or set(known) == set(order)):
                raise OrderError(f"{place} ran another order than {known_place}: {difference(order, known)}")
        ranks.setdefault(place.rank, (place, order))
    found = []
    for number in sorted(pipelines):
        ranks = pipelines[number]
        count = next(iter(ranks.values()))[0].ranks
        if missing := sorted(set(range(count)) - set(ranks)):
            raise OrderError(f"rank {missing[0]} of pipeline {number} told no order")
        found.append(tuple(ranks[rank][1] for rank in range(count)))
        try:
            check(found[-1])
        except OrderError as error:
            raise OrderError(f"pipeline {number}: {error}") from None
        work = {key[:2] for rank in found[-1] for key in rank}
        if work != {key[:2] for rank in found[0] for key in rank}:
            raise OrderError(f"pipeline {number} has other stages or instructions than pipeline 0")
    return tuple(found)


def difference(mine: RankOrder, other: RankOrder) -> str:
    """Where two orders part, in words."""
    for n, (a, b) in enumerate(zip(mine, other, strict=False)):
        if a != b:
            return f"instruction {n} is {text(a)}, not {text(b)}"
    return f"{len(mine)} instructions, not {len(other)}"


def check(order: Sequence[RankOrder]) -> None:
    """Run the order in thought; OrderError names the rank that waits for ever, repeats itself or leaves work undone."""
    last = max((key[0] for rank in order for key in rank), default=-1)
    at: dict[Key, int] = {}
    for rank, instructions in enumerate(order):
        if not instructions:
            raise OrderError(f"rank {rank} ran nothing")
        for key in instructions:
            if key in at:
                raise OrderError(f"rank {rank} ran {text(key)} a second time (first: rank {at[key]})")
            at[key] = rank
    for key, rank in at.items():
        stage, kind, microbatch = key
        wanted = FORWARD if kind in (BACKWARD, INPUT) else INPUT if kind == WEIGHT else None
        if wanted and (stage, wanted, microbatch) not in at:
            raise OrderError(f"rank {rank} ran {text(key)} without {text((stage, wanted, microbatch))}")
        if kind == FORWARD and (stage, BACKWARD, microbatch) not in at and (stage, INPUT, microbatch) not in at:
            raise OrderError(f"rank {rank} left out the backward of microbatch {microbatch} on stage {stage}")
    done: set[Key] = set()
    position = [0] * len(order)
    moved = True
    while moved:
        moved = False
        for rank, instructions in enumerate(order):
            while position[rank] < len(instructions) and all(
                n in done or n not in at for n in _needs(instructions[position[rank]], last)
            ):
                done.add(instructions[position[rank]])
                position[rank] += 1
                moved = True
    for rank, instructions in enumerate(order):
        if position[rank] < len(instructions):
            raise OrderError(f"the order is cyclic: rank {rank} waits for ever at {text(instructions[position[rank]])}")


def _needs(key: Key, last: int) -> tuple[Key, ...]:
    stage, kind, microbatch = key
    if kind == FORWARD:
        return ((stage - 1, FORWARD, microbatch),)
    if kind in (BACKWARD, INPUT):
        after = ((stage, FORWARD, microbatch),)
        return after if stage == last else (*after, (stage + 1, BACKWARD, microbatch), (stage + 1, INPUT, microbatch))
    return ((stage, INPUT, microbatch),) if kind == WEIGHT else ()


def is_training(ran: Sequence[Key]) -> bool:
    """Whether a step had a backward; an evaluation pass has none and does not count as a step."""
    return any(key[1] in (BACKWARD, INPUT, WEIGHT) for key in ran)
