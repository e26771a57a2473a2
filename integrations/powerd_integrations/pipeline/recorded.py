"""The order in which ranks really ran their instructions: compared with the derived one, with each other, and checked for sense.

House rules: pure; needs no third party; whoever disagrees is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from powerd_integrations.pipeline.place import Place

#: (stage, kind, microbatch): an instruction as ranks tell it each other.
Key = tuple[int, str, int]
RankOrder = tuple[Key, ...]

FORWARD, BACKWARD, INPUT, WEIGHT = "forward", "backward", "input", "weight"


class OrderError(ValueError):
    """An order that cannot be planned for; the message names the rank."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """What every rank of a pipeline runs; ``derived`` tells whether that is what its schedule promised."""

    order: tuple[RankOrder, ...]
    derived: bool
    note: str = ""


def keys(order: Sequence[Any]) -> RankOrder:
    """One rank's order from tuples, lists or objects with ``stage``, ``kind`` and ``microbatch``."""
    return tuple(
        (int(i[0]), str(i[1]), int(i[2])) if isinstance(i, (tuple, list)) else (int(i.stage), str(i.kind), int(i.microbatch))
        for i in order
    )


def text(key: Key) -> str:
    """An instruction for people."""
    return f"{key[1]} of microbatch {key[2]} on stage {key[0]}"


def agree(told: Sequence[tuple[Place, RankOrder]], derived: Sequence[RankOrder] | None) -> Agreed:
    """The one order that all pipelines and tensor-parallel peers ran; OrderError when ranks disagree or it cannot be run."""
    ranks = told[0][0].ranks
    first: dict[int, tuple[Place, RankOrder]] = {}
    for place, order in told:
        known = first.setdefault(place.rank, (place, order))
        if known[1] != order:
            raise OrderError(f"{place} ran another order than {known[0]}: {_difference(order, known[1])}")
    missing = sorted(set(range(ranks)) - set(first))
    if missing:
        raise OrderError(f"no rank {missing[0]} of any pipeline told its order")
    recorded = tuple(first[rank][1] for rank in range(ranks))
    check(recorded)
    if derived is None:
        return Agreed(recorded, False, "the schedule is not known, so the recorded order counts")
    for rank, (mine, promised) in enumerate(zip(recorded, derived, strict=False)):
        if mine != promised:
            note = (
                f"rank {rank} does not run what its schedule promises ({_difference(mine, promised)}): the recorded order counts"
            )
            return Agreed(recorded, False, note)
    if len(derived) != ranks:
        return Agreed(
            recorded, False, f"the schedule is of {len(derived)} ranks, the pipeline of {ranks}: the recorded order counts"
        )
    return Agreed(recorded, True)


def _difference(mine: RankOrder, other: RankOrder) -> str:
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
