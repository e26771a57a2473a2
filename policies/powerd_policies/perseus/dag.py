"""From the order of each rank to the graph of one iteration: what must have ended before what may start.

House rules: a derived and a recorded order are checked alike, and an error names the rank and the instruction; an edge that the
serial order of a rank implies already is left out; numbering is topological and the same for the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np

from powerd.errors import RequestError
from powerd_policies.perseus.problem import Dag, Instruction, Kind, Option, Order, Problem, Profile

Key = tuple[int, str, int]
_KNOWN = frozenset(str(kind) for kind in Kind)


def build(order: Order) -> Dag:
    """The graph of an order, derived or recorded: each rank's list runs in sequence, and

    ``F(s,m) -> F(s+1,m)``, ``B|I(s,m) -> B|I(s-1,m)``, ``F(last,m) -> B|I(last,m)``, ``I(s,m) -> W(s,m)``, recomputation before
    its backward. Kinds that are not in ``Kind`` only keep their place in their rank's list. RequestError, naming rank and
    instruction, when one is missing or there twice, when ranks disagree on the microbatches, or when the order goes in a circle.
    """
    where = _places(order)
    _complete(order, where)
    before = _needs(order, where)
    return _numbered(order, before)


def problem(dag: Dag, profile: Profile, blocking_power_w: float) -> Problem:
    """What is to be planned: every node of ``dag`` with its options; RequestError when the profile lacks an instruction.

    ``blocking_power_w`` is what one rank draws while it waits for another; it must be the one that ``profile`` was filtered with.
    """
    if not (blocking_power_w >= 0 and np.isfinite(blocking_power_w)):
        raise RequestError(f"blocking_power_w is 0 or more, not {blocking_power_w}", code="bad_value")
    index: dict[tuple[int, str], int] = {}
    table = np.empty(len(dag.nodes), dtype=np.int64)
    for number, node in enumerate(dag.nodes):
        key = (node.stage, node.kind)
        found = index.get(key)
        if found is None:
            if not profile.get(key):
                raise RequestError(
                    f"the profile has no rows for {node.kind} of stage {node.stage}",
                    hint="every instruction of the schedule needs at least one", code="bad_value",
                )  # fmt: skip
            found = index[key] = len(index)
        table[number] = found
    measured: Mapping[tuple[int, str], tuple[Option, ...]] = getattr(profile, "measured", profile)
    return Problem(
        dag, tuple(profile[key] for key in index), table, blocking_power_w, tuple(measured[key] for key in index)
    )  # fmt: skip


def _places(order: Order) -> dict[Key, tuple[int, int]]:
    """(stage, kind, microbatch) -> (rank, position in its list)."""
    where: dict[Key, tuple[int, int]] = {}
    home: dict[int, int] = {}
    if not order:
        raise RequestError("an order has at least one rank", code="bad_value")
    for rank, steps in enumerate(order):
        if not steps:
            raise RequestError(f"rank {rank} has no instructions", code="bad_value")
        for position, step in enumerate(steps):
            key = (step.stage, str(step.kind), step.microbatch)
            if step.stage < 0 or step.microbatch < 0:
                raise RequestError(f"rank {rank}: {step} has a number below zero", code="bad_value")
            other = where.setdefault(key, (rank, position))
            if other != (rank, position):
                again = "twice" if other[0] == rank else f"too, and so does rank {other[0]}"
                raise RequestError(f"rank {rank} runs {step} {again}", code="bad_value")
            if home.setdefault(step.stage, rank) != rank:
                raise RequestError(
                    f"rank {rank} runs {step}, but stage {step.stage} is on rank {home[step.stage]}", code="bad_value"
                )
    missing = next((stage for stage in range(max(home)) if stage not in home), None)
    if missing is not None:
        raise RequestError(f"no rank runs stage {missing}", code="bad_value")
    return where


def _complete(order: Order, where: Mapping[Key, tuple[int, int]]) -> None:
    """Every stage runs every microbatch forward and backward, once."""
    counts = [max(step.microbatch for step in steps) + 1 for steps in order]
    wanted = max(set(counts), key=lambda count: (counts.count(count), count))
    for rank, count in enumerate(counts):
        if count != wanted:
            agreeing = [r for r, c in enumerate(counts) if c == wanted]
            raise RequestError(
                f"rank {rank} runs {count} microbatches, rank {agreeing[0]} runs {wanted}",
                hint="all ranks of a pipeline run the same", code="bad_value",
            )  # fmt: skip
    for rank, steps in enumerate(order):
        for stage in sorted({step.stage for step in steps}):
            for microbatch in range(wanted):
                has = {kind for kind in _KNOWN if (stage, kind, microbatch) in where}
                lacks = None
                if Kind.FORWARD not in has:
                    lacks = Kind.FORWARD
                elif Kind.BACKWARD in has and (extra := has & {Kind.INPUT, Kind.WEIGHT}):
                    step = Instruction(stage, min(extra), microbatch)
                    raise RequestError(f"rank {rank} runs {step} and the whole backward of it, too", code="bad_value")
                elif Kind.BACKWARD not in has and Kind.INPUT not in has:
                    lacks = Kind.INPUT if Kind.WEIGHT in has else Kind.BACKWARD
                elif Kind.INPUT in has and Kind.WEIGHT not in has:
                    lacks = Kind.WEIGHT
                if lacks is not None:
                    raise RequestError(f"rank {rank} does not run {Instruction(stage, lacks, microbatch)}", code="bad_value")


def _needs(order: Order, where: Mapping[Key, tuple[int, int]]) -> list[list[list[tuple[int, int]]]]:
    """Of every instruction, by rank and position: what must end before it, apart from its predecessor on its rank."""
    last = max(stage for stage, _, _ in where)
    F, B, I, W, R = (str(k) for k in (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT, Kind.RECOMPUTE))  # noqa: N806, E741
    needs: list[list[list[tuple[int, int]]]] = []
    for rank, steps in enumerate(order):
        rows: list[list[tuple[int, int]]] = []
        for position, step in enumerate(steps):
            kind, s, m = str(step.kind), step.stage, step.microbatch
            keys: tuple[Key, ...] = ()
            if kind == F:
                keys = ((s - 1, F, m),)
            elif kind in (B, I):
                keys = ((s, F, m), (s, R, m)) if s == last else ((s + 1, B, m), (s + 1, I, m), (s, F, m), (s, R, m))
            elif kind == W:
                keys = ((s, I, m),)
            elif kind == R:
                keys = ((s, F, m),)
            row = []
            for key in keys:
                place = where.get(key)
                # What comes earlier on the same rank has ended anyway; what comes later there makes a cycle, which must be found.
                if place is not None and (place[0] != rank or place[1] > position):
                    row.append(place)
            rows.append(row)
        needs.append(rows)
    return needs


def _numbered(order: Order, needs: list[list[list[tuple[int, int]]]]) -> Dag:
    """Topological numbers: the ranks advance by turns, each as far as it can."""
    waiting: dict[tuple[int, int], list[int]] = {}  # what a rank's head waits for -> those ranks
    number: list[list[int]] = [[] for _ in order]
    nodes: list[Instruction] = []
    ranks: list[int] = []
    before: list[int] = []
    after: list[int] = []
    ready = deque(range(len(order)))
    while ready:
        rank = ready.popleft()
        steps, done = order[rank], number[rank]
        while len(done) < len(steps):
            position = len(done)
            blocked = next((p for p in needs[rank][position] if p[1] >= len(number[p[0]])), None)
            if blocked is not None:
                waiting.setdefault(blocked, []).append(rank)
                break
            this = len(nodes)
            sources = {number[r][p] for r, p in needs[rank][position]}
            if position:
                sources.add(done[-1])
            for source in sorted(sources):
                before.append(source)
                after.append(this)
            done.append(this)
            nodes.append(steps[position])
            ranks.append(rank)
            ready.extend(waiting.pop((rank, position), ()))
    if len(nodes) < sum(len(steps) for steps in order):
        raise RequestError(_cycle(order, needs, number), hint="no rank can go on: check the recorded order", code="bad_value")
    edges = np.array([before, after], dtype=np.int64).T.reshape(-1, 2)
    return Dag(tuple(nodes), np.array(ranks, dtype=np.int64), edges, len(order))


def _cycle(order: Order, needs: list[list[list[tuple[int, int]]]], number: list[list[int]]) -> str:
    """Who waits for whom, in words: follow the heads of the ranks until one is met again."""
    rank = next(r for r, steps in enumerate(order) if len(number[r]) < len(steps))
    seen: list[int] = []
    told: list[str] = []
    while rank not in seen:
        seen.append(rank)
        head = len(number[rank])
        other, position = next(p for p in needs[rank][head] if p[1] >= len(number[p[0]]))
        told.append(f"rank {rank} waits at {order[rank][head]} for {order[other][position]}, which rank {other} runs later")
        rank = other
    return "the order goes in a circle: " + "; ".join(told[seen.index(rank) :])
