"""Searches with the simulator: the largest load that a fleet keeps, and the cheapest fixed fleet that keeps a load.

House rules: every trial runs the whole trace; whether a fleet keeps a load is decided by the same rule as in reports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

KEPT: Final = 0.99


def largest_load(keeps: Callable[[float], bool], start: float = 1.0, tolerance: float = 0.01) -> float:
    """Return the largest factor that ``keeps`` accepts, to a relative ``tolerance``: doubling or halving, then bisection.

    ValueError when not even a 64th of ``start`` is kept.
    """
    low, high = (start, 2 * start) if keeps(start) else (start / 2, start)
    if high > start:
        while keeps(high):
            low, high = high, 2 * high
    else:
        while not keeps(low):
            low, high = low / 2, low
            if low < start / 64:
                raise ValueError(f"not even {low:g} times the load is kept")
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class Fixed:
    """``count`` instances of one tensor parallelism at one clock."""

    tp: int
    count: int
    clock_mhz: int

    def __str__(self) -> str:
        return f"{self.count} x TP{self.tp} at {self.clock_mhz} MHz"


@dataclass(frozen=True, slots=True)
class Tried:
    """A fixed fleet and what it came to: the share of requests in SLO, and kWh."""

    fleet: Fixed
    kept: float
    energy_kwh: float

    @property
    def feasible(self) -> bool:
        """Whether it keeps the promises."""
        return self.kept >= KEPT


Judge = Callable[[Fixed], Tried]


def cheapest(judge: Judge, kinds: Sequence[tuple[int, int, int]], gpus: int) -> tuple[Tried | None, list[Tried]]:
    """Return the cheapest fixed fleet that keeps the promises, and all that were tried.

    ``kinds`` are (tensor parallelism, clock, a first guess of instances), the most promising first. Of each kind the fewest
    instances are searched, as more of the same only use more. A kind is left as soon as a fleet of it that is still too small
    uses more than the best found.
    """
    best: Tried | None = None
    tried: list[Tried] = []
    for tp, clock_mhz, guess in kinds:
        seen: dict[int, Tried] = {}
        low, high = 0, gpus // tp + 1  # too few, enough (or one more than there are GPUs for)
        count = min(max(guess, 1), high - 1)
        while high - low > 1:
            seen[count] = made = judge(Fixed(tp, count, clock_mhz))
            tried.append(made)
            if made.feasible:
                high = count
            elif best is not None and made.energy_kwh >= best.energy_kwh:
                break
            else:
                low = count
            count = _next(count, low, high, made.kept)
        if (found := seen.get(high)) is not None and (best is None or found.energy_kwh < best.energy_kwh):
            best = found
    return best, tried


def _next(count: int, low: int, high: int, kept: float) -> int:
    """The neighbour first, since guesses are good; bisection where they are not."""
    if high == count:
        return count - 1 if count - 1 > low else (low + high) // 2
    far = kept < 0.9
    return (low + high + 1) // 2 if far and high - low > 2 else min(count + 1, high - 1)
