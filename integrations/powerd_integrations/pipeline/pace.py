"""Who is slow: pipelines against each other, and stages against what was measured of them.

House rules: pure; every rank hears the same figures and so decides the same; nothing changes on one bad iteration, nor back on
one good one.

A pipeline is measured against the plan that it has just now, so one that follows a straggler does not look like one
(powerd_policies.perseus.straggler decides; here its figures are made comparable).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from powerd_policies.perseus.straggler import Patience, Stragglers, Watched


@dataclass(frozen=True, slots=True)
class Slow:
    """How a stage differs from its profile: all of it slower by a factor, or cut to a clock from above."""

    factor: float = 1.0
    ceiling_mhz: int | None = None

    @property
    def normal(self) -> bool:
        """Whether it is as profiled."""
        return self.factor == 1.0 and self.ceiling_mhz is None


NORMAL = Slow()


@dataclass
class Steady:
    """A figure that counts once ``patience`` exchanges in a row have told it, each beyond ``tolerance`` of what counted."""

    value: float
    tolerance: float
    patience: int
    _away: list[float] = field(default_factory=list)

    def tell(self, told: float) -> bool:
        """One more figure; whether ``value`` has just changed."""
        back = 1.0 - self.tolerance / 2 <= told <= 1.0 + self.tolerance / 2 and self.value != 1.0
        if abs(told / self.value - 1.0) <= self.tolerance and not back:
            self._away.clear()
            return False
        self._away.append(told)
        if len(self._away) < self.patience:
            return False
        self.value = median(self._away[-self.patience :])
        if abs(self.value - 1.0) <= self.tolerance:
            self.value = 1.0
        self._away.clear()
        return True


class Pace:
    """The pipelines of a job against each other: who straggles, and how long an iteration takes there."""

    def __init__(self, tolerance: float, patience: int) -> None:
        self._state = Stragglers(Patience(tolerance, tolerance / 2, patience, patience))

    @property
    def times_s(self) -> dict[int, float]:
        """The iteration time of every pipeline that straggles, seconds."""
        return {n: w.time_s for n, w in sorted(self._state.pipelines.items()) if w.time_s is not None}

    def tell(self, measured_s: Sequence[float | None], planned_s: Sequence[float], own_plan: Collection[int] = ()) -> bool:
        """Measured and planned iteration times of every pipeline; whether somebody became slow, slower, or well again.

        What communication adds to every plan alike is taken off: the pipeline that keeps its plan best tells how much that is.
        ``own_plan`` are the pipelines that run a plan made for their own slow stage: nobody is measured against those.
        """
        known = {n: m for n, m in enumerate(measured_s) if m is not None and m > 0}
        if len(known) < len(planned_s):
            return False  # somebody's step was not whole: this exchange tells nothing
        ratios = {n: m / planned_s[n] for n, m in known.items()}
        best = min([r for n, r in ratios.items() if n not in own_plan] or ratios.values())
        before = self.times_s
        self._state = self._state.report({n: (planned_s[n], max(1.0, r / best) * planned_s[n]) for n, r in ratios.items()})
        return self.times_s != before

    def forget(self, pipeline: int) -> None:
        """This pipeline gets a plan made for its own slow stage: from here on it is measured against that."""
        self._state = replace(self._state, pipelines={**self._state.pipelines, pipeline: Watched()})


class Stages:
    """What of a pipeline's stages differs from the profile, by (pipeline, stage)."""

    def __init__(self, tolerance: float, patience: int) -> None:
        self._tolerance, self._patience = tolerance, patience
        self._steady: dict[tuple[int, int], Steady] = {}
        self.slow: dict[tuple[int, int], Slow] = {}

    def of(self, pipeline: int) -> dict[int, Slow]:
        """The stages of one pipeline that are not as profiled."""
        return {stage: slow for (number, stage), slow in self.slow.items() if number == pipeline}

    def tell(self, told: Mapping[tuple[int, int], tuple[float, int | None]]) -> set[int]:
        """Per (pipeline, stage): measured over *expected* time, and the clock it was cut to; the pipelines that changed."""
        changed: set[int] = set()
        for where, (ratio, ceiling_mhz) in sorted(told.items()):
            steady = self._steady.setdefault(where, Steady(1.0, self._tolerance, self._patience))
            if not steady.tell(ratio):
                continue
            now = self.slow.get(where, NORMAL)
            self._steady[where] = Steady(1.0, self._tolerance, self._patience)  # the next figures are against the new expectation
            if ratio < 1.0:
                after = NORMAL  # whatever held it back has gone; if not all of it, the next figures say so
            elif ceiling_mhz is not None and ceiling_mhz != now.ceiling_mhz:
                after = Slow(1.0, ceiling_mhz)
            else:
                after = Slow(now.factor * ratio, now.ceiling_mhz)
            if after.normal and where not in self.slow:
                continue
            self.slow[where] = after
            if after.normal:
                del self.slow[where]
            changed.add(where[0])
        return changed


def telling(times: Sequence[tuple[float, float]]) -> float:
    """How much longer a stage's work takes than expected, from (measured, expected) of each instruction, without the odd ones."""
    ordered = sorted(times, key=lambda pair: pair[0] / pair[1])
    odd = len(ordered) // 8
    counted = ordered[odd : len(ordered) - odd]
    return sum(measured_s for measured_s, _ in counted) / sum(expected_s for _, expected_s in counted)
