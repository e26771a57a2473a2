"""The clock that uses the least energy within an allowed slowdown, and the Pareto front of time and energy.

House rules: pure; the reference is the highest clock measured, which is what a GPU runs at when nobody sets it; below the knee
of the voltage curve energy is nearly flat, so that what is scored is the energy, never the distance between two clocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Point:
    """Time in seconds and energy in joules that the same work takes at one SM clock in MHz."""

    clock_mhz: int
    time_s: float
    energy_j: float

    def __post_init__(self) -> None:
        if self.clock_mhz <= 0 or not (self.time_s > 0 and self.energy_j > 0):
            raise ValueError(f"clock, time and energy of a point are above zero: {self}")
        if not (math.isfinite(self.time_s) and math.isfinite(self.energy_j)):
            raise ValueError(f"time and energy of a point are finite: {self}")


@dataclass(frozen=True, slots=True)
class Choice:
    """The best point within one allowed slowdown, against the reference at the highest clock."""

    slowdown_allowed: float  # 0.05 is 5 %
    point: Point
    slowdown: float  # may be below zero when a lower clock happens to be faster
    saving: float  # share of the reference's energy


def reference(points: Iterable[Point]) -> Point:
    """The point of the highest clock; ValueError when there is none."""
    try:
        return max(points, key=lambda p: p.clock_mhz)
    except ValueError:
        raise ValueError("no point was measured") from None


def pareto(points: Iterable[Point]) -> tuple[Point, ...]:
    """Points that no other beats in both time and energy, fastest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.time_s, p.energy_j, p.clock_mhz)):
        if not front or point.energy_j < front[-1].energy_j:
            front.append(point)
    return tuple(front)


def choose(points: Iterable[Point], slowdown_allowed: float) -> Choice:
    """The point of least energy whose time is within ``1 + slowdown_allowed`` of the reference's; never worse than it."""
    if not 0 <= slowdown_allowed < math.inf:
        raise ValueError(f"an allowed slowdown is 0 or more, not {slowdown_allowed}")
    known = tuple(points)
    base = reference(known)
    limit_s = base.time_s * (1 + slowdown_allowed)
    best = min((p for p in known if p.time_s <= limit_s), key=lambda p: (p.energy_j, p.time_s, -p.clock_mhz))
    return Choice(slowdown_allowed, best, best.time_s / base.time_s - 1, 1 - best.energy_j / base.energy_j)
