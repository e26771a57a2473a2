"""BestStatic: the cheapest fixed fleet that keeps its promises, found with as few evaluations as it takes.

House rules: pure; the answer was evaluated and kept its promises, whatever the model thought; for each parallelism and clock
the model only says where to begin, and which kinds are not worth a look.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from powerd_policies.dynamollm.capacity import Capacity, Demand

SLO: Final = 0.99
CLASS_SLO: Final = 0.95
DOUBT: Final = 0.15  # of a fleet's instances (one at least) the model may have asked for too many


@dataclass(frozen=True, slots=True, order=True)
class StaticFleet:
    """``count`` instances of one parallelism at one clock, for ever."""

    tp: int
    count: int
    clock_mhz: int

    def __str__(self) -> str:
        return f"{self.count} x TP{self.tp} at {self.clock_mhz} MHz"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a fleet did: the share of requests in SLO, that of the worst class, and the energy."""

    slo: float
    class_slo: float
    energy_j: float

    @property
    def keeps(self) -> bool:
        """Whether the promises are kept."""
        return self.slo >= SLO and self.class_slo >= CLASS_SLO


@dataclass(frozen=True, slots=True)
class Found:
    """The cheapest fleet that keeps its promises (None: none of those tried), and everything that was evaluated."""

    fleet: StaticFleet | None
    evaluation: Evaluation | None
    tried: dict[StaticFleet, Evaluation]


def search(
    evaluate: Callable[[StaticFleet], Evaluation], capacity: Capacity, peak: Demand, mean: Demand, gpus: int, most: int = 120
) -> Found:
    """Return the cheapest fixed fleet of at most ``gpus`` GPUs; at most ``most`` evaluations.

    ``peak`` is the load where a fixed fleet fails first, ``mean`` the load that its energy comes from. Kinds (parallelism, clock)
    go by the energy that the model expects; of each the fewest instances that keep the promises are found by bisection.
    """
    tried: dict[StaticFleet, Evaluation] = {}

    def judge(fleet: StaticFleet) -> Evaluation:
        if fleet not in tried:
            tried[fleet] = evaluate(fleet)
        return tried[fleet]

    kinds = []
    for tp, clock in capacity.model.table:
        count = capacity.least(tp, clock, peak, gpus // tp) or gpus // tp
        if count:
            fewer = max(1, count - max(1, round(DOUBT * count)))
            kinds.append((capacity.serve(tp, clock, fewer, mean).power_w, tp, clock, count))
    best: StaticFleet | None = None
    for at_least_w, tp, clock, guess in sorted(kinds):
        if len(tried) >= most:
            break
        if best is not None and at_least_w > capacity.serve(best.tp, best.clock_mhz, best.count, mean).power_w:
            break
        fleet = _fewest(judge, tp, clock, guess, gpus // tp)
        if fleet is not None and (best is None or tried[fleet].energy_j < tried[best].energy_j):
            best = fleet
    return Found(best, tried[best] if best is not None else None, tried)


def _fewest(judge: Callable[[StaticFleet], Evaluation], tp: int, clock_mhz: int, guess: int, most: int) -> StaticFleet | None:
    """Return the smallest fleet of one kind that keeps its promises: steps of doubling width from the guess, then bisection."""
    step, low, high = 1, 0, most + 1
    at = min(most, guess)
    while low < at < high:
        if judge(StaticFleet(tp, at, clock_mhz)).keeps:
            high, at = at, max(1, at - step) if at > 1 else 0
        else:
            low, at = at, min(most, at + step) if at < most else most + 1
        step *= 2
    while high - low > 1 and high <= most:
        middle = (low + high) // 2
        low, high = (low, middle) if judge(StaticFleet(tp, middle, clock_mhz)).keeps else (middle, high)
    return StaticFleet(tp, high, clock_mhz) if high <= most else None
