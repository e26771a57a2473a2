"""Pipelines that wait for a slower one: which iteration time is worth planning for, and what a whole job then needs.

House rules: pure state, one report per iteration in, the next state out; a pipeline straggles when it is later than *its own*
plan, never because it was asked to be slow; several stragglers count as the slowest; both directions need patience.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from powerd.errors import RequestError


def optimal_time(least_energy_time_s: float, straggler_time_s: float) -> float:
    """``T_opt = min(T*, T')``: the iteration time to plan for, seconds (Perseus, section 3.2).

    Slower than ``T*``, that of the plan of least energy, saves nothing: the rest until ``T'`` is waiting either way.
    """
    return min(least_energy_time_s, straggler_time_s)


def slowest(times_s: Iterable[float]) -> float | None:
    """``T'`` of several stragglers: the slowest; None without any."""
    return max(times_s, default=None)


def job_energy(
    straggler_j: float, others_j: float, others_time_s: float, straggler_time_s: float, *,
    pipelines: int, ranks: int, blocking_power_w: float, stragglers: int = 1,
) -> float:  # fmt: skip
    """Joules of one iteration of a whole job: ``stragglers`` pipelines take ``straggler_time_s``, all others wait for them.

    ``straggler_j`` and ``others_j`` are of one pipeline within its own time; every GPU of the others (``ranks`` each, tensor
    parallel ones counted) draws ``blocking_power_w`` from ``others_time_s`` on. A straggler that is slower by a factor takes its
    energy times that factor, as in the Perseus paper's emulation: the caller multiplies. RequestError for impossible counts.
    """
    if not 0 <= stragglers <= pipelines:
        raise RequestError(f"{stragglers} stragglers among {pipelines} pipelines", code="bad_value")
    wait_s = max(0.0, straggler_time_s - others_time_s)
    return straggler_j * stragglers + (pipelines - stragglers) * (others_j + blocking_power_w * ranks * wait_s)


@dataclass(frozen=True, slots=True)
class Patience:
    """When a pipeline begins and ceases to count as a straggler."""

    rise: float = 0.03  # later than its plan by this share
    fall: float = 0.015  # and back within this one
    begin: int = 2  # iterations in a row
    end: int = 3


@dataclass(frozen=True, slots=True)
class Watched:
    """One pipeline: ``time_s`` is set while it counts as a straggler, else None."""

    time_s: float | None = None
    late: int = 0
    fine: int = 0


@dataclass(frozen=True, slots=True)
class Stragglers:
    """All pipelines of a job; ``straggler_time_s`` is T', None while nobody straggles."""

    patience: Patience = Patience()
    pipelines: Mapping[int, Watched] = field(default_factory=dict)

    @property
    def straggler_time_s(self) -> float | None:
        """T' in seconds: the slowest straggler's iteration time; None when every pipeline keeps to its plan."""
        return slowest(w.time_s for w in self.pipelines.values() if w.time_s is not None)

    @property
    def who(self) -> tuple[int, ...]:
        """The pipelines that straggle; they go on with the fastest plan."""
        return tuple(sorted(p for p, w in self.pipelines.items() if w.time_s is not None))

    def report(self, times_s: Mapping[int, tuple[float, float]]) -> Stragglers:
        """The next state, from each pipeline's (planned, measured) seconds of one iteration, gradient-sync wait excluded.

        A pipeline that is not named is gone (a failure, elastic training). RequestError for a time that is not above zero.
        """
        return replace(self, pipelines={p: self._next(p, planned_s, time_s) for p, (planned_s, time_s) in times_s.items()})

    def deadline_s(self, pipeline: int, usual_s: float, least_energy_time_s: float) -> float:
        """What this pipeline should plan for now: ``T_opt`` when another one straggles, else (and for stragglers) ``usual_s``."""
        late_s = self.straggler_time_s
        if late_s is None or pipeline in self.who:
            return usual_s
        return max(usual_s, optimal_time(least_energy_time_s, late_s))

    def _next(self, pipeline: int, planned_s: float, time_s: float) -> Watched:
        if not (math.isfinite(time_s) and time_s > 0 and math.isfinite(planned_s) and planned_s > 0):
            raise RequestError(f"pipeline {pipeline} reports {time_s} s of {planned_s} s planned", code="bad_value")
        known = self.pipelines.get(pipeline, Watched())
        over = time_s / planned_s - 1
        if known.time_s is None:
            late = known.late + 1 if over > self.patience.rise else 0
            return Watched(time_s if late >= self.patience.begin else None, late)
        fine = known.fine + 1 if over < self.patience.fall else 0
        if fine >= self.patience.end:
            return Watched()
        # A new time counts when it differs enough to be worth another plan; a pipeline that is on its way back keeps its last.
        moved = fine == 0 and abs(time_s / known.time_s - 1) > self.patience.rise
        return Watched(time_s if moved else known.time_s, known.late, fine)
