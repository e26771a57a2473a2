"""Online search for the SM clock of least energy within an allowed slowdown, from blocks of real training steps.

House rules: pure and deterministic, so that every rank that is told the same takes the same decision; a clock is only ever
compared with blocks at the top clock just before and after it, so that slow drift cancels; what noise could be is no gain.

The search goes from the top clock downward. A clock of top / (1 + slowdown) can be no slower than allowed, since time grows at
most as 1 / clock: it comes first. What it tells of the share of time that follows the clock says how far down to go next. Where
the bound or rising energy is met, intervals are halved, and then local fits through all measurements near the best clock say
which to measure again, until the choice is as sure as asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

_WINDOW = 0.05  # of the top clock: how far from a clock measurements count for it
_NEAR = 0.02  # likewise: as good as the same clock
_RISEN = 0.05  # so much more energy than a higher clock's, and there is no use in going further down
_STRIDE, _JUMP = 0.95, 0.85  # at least and at most so far down at once


class SearchState(StrEnum):
    """Where a search stands."""

    SEARCHING = "searching"
    SETTLED = "settled"  # a clock was found that saves
    NO_GAIN = "no_gain"  # the top clock is as good as any within the slowdown
    BLIND = "blind"  # nothing is measured: the top clock until something is


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What is asked for; shares, not per cent."""

    slowdown: float = 0.05  # allowed, against the top clock
    least_gain: float = 0.01  # a saving below it is not worth a lock
    time_error: float = 0.0025  # standard error of the slowdown at which the choice counts as proven
    energy_error: float = 0.005  # likewise of the saving
    regret: float = 0.0075  # measure on while a clock that may be fast enough would save so much more
    time_noise: float = 0.003  # of one block, until the blocks themselves tell
    energy_noise: float = 0.006
    shift: float = 0.10  # of step time or power: the work has changed, search again
    least_near: int = 4  # measurements at or beside the chosen clock
    most_blocks: int = 80

    def __post_init__(self) -> None:
        if not 0 <= self.slowdown < math.inf:
            raise ValueError(f"an allowed slowdown is 0 or more (0.05 is 5 %), not {self.slowdown}")


@dataclass(frozen=True, slots=True)
class Trial:
    """One block of steps to run at a clock."""

    number: int
    clock_mhz: int
    baseline: bool


@dataclass(frozen=True, slots=True)
class Found:
    """What a search settled on, against the top clock; errors are standard errors."""

    clock_mhz: int
    slowdown: float
    slowdown_error: float
    saving: float
    saving_error: float
    proven: bool  # False: the blocks ran out first
    blocks: int


@dataclass(frozen=True, slots=True)
class _Fit:
    value: float
    error: float


class Search:
    """A search as a conversation: ``propose`` names the next block, ``report`` tells what it took; in any later order."""

    def __init__(self, clocks_mhz: Sequence[int], options: SearchOptions | None = None) -> None:
        self.clocks = tuple(sorted({c for c in clocks_mhz if c > 0}, reverse=True))
        if not self.clocks:
            raise ValueError("a search needs at least one clock")
        self.options = options or SearchOptions()
        self.top = self.clocks[0]
        self.restarts = 0
        self._begin()

    def _begin(self) -> None:
        self.state = SearchState.SEARCHING if len(self.clocks) > 1 else SearchState.NO_GAIN
        self.found: Found | None = None
        self._number = 0
        self._open: dict[int, Trial] = {}
        self._baseline: dict[int, tuple[float, float]] = {}
        self._tried: dict[int, tuple[int, float, float]] = {}
        self._last: Trial | None = None
        self._missing = 0
        self._floor: int | None = None  # the highest clock known to be too slow, or to use more than one above it
        self._steady: list[tuple[float, float]] = []
        self._odd = 0

    # -- the conversation ------------------------------------------------------------------------------------------------

    def propose(self) -> Trial:
        """The block to run next; while a measured clock has not been reported yet, another one at the top clock."""
        clock, baseline = self.top, True
        if self.state is SearchState.SETTLED and self.found is not None:
            clock, baseline = self.found.clock_mhz, False
        elif self.state is SearchState.SEARCHING and self._may_try():
            wanted = self._wanted()
            if wanted is not None:
                clock, baseline = wanted, False
            elif self.state is SearchState.SETTLED and self.found is not None:  # type: ignore[comparison-overlap]
                clock, baseline = self.found.clock_mhz, False
        trial = Trial(self._number, clock, baseline)
        self._number += 1
        self._open[trial.number] = trial
        self._last = trial
        return trial

    def report(self, number: int, time_s: float | None, energy_j: float | None) -> None:
        """Seconds and joules per step of a block; ``None`` when it could not be measured; unknown numbers are ignored."""
        trial = self._open.pop(number, None)
        if trial is None:
            return
        if not time_s or not energy_j or not (0 < time_s < math.inf and 0 < energy_j < math.inf):
            self._missing += 1
            if self.state is SearchState.SEARCHING and self._missing >= 8:
                self._settle(SearchState.BLIND, None)
            return
        self._missing = 0
        if self.state is SearchState.SEARCHING:
            if trial.baseline:
                self._baseline[number] = (time_s, energy_j)
            else:
                self._tried[number] = (trial.clock_mhz, time_s, energy_j)
        elif self.state is SearchState.BLIND:
            self.restart()
        elif trial.clock_mhz == self.clock_mhz:
            self._watch(time_s, energy_j)

    def restart(self) -> None:
        """Forget everything and search again: the work or the machine has changed."""
        self.restarts += 1
        number = self._number
        self._begin()
        self._number = number  # reports of blocks from before must not be taken for new ones

    @property
    def clock_mhz(self) -> int:
        """The clock that this search recommends as of now."""
        return self.found.clock_mhz if self.state is SearchState.SETTLED and self.found else self.top

    # -- after it has settled --------------------------------------------------------------------------------------------

    def _watch(self, time_s: float, energy_j: float) -> None:
        power_w = energy_j / time_s
        if len(self._steady) < 3:
            self._steady.append((time_s, power_w))
            return
        usual = (median(t for t, _ in self._steady), median(p for _, p in self._steady))
        away = max(abs(time_s / usual[0] - 1), abs(power_w / usual[1] - 1))
        self._odd = self._odd + 1 if away > self.options.shift else 0
        if self._odd >= 2:
            self.restart()

    def _settle(self, state: SearchState, found: Found | None) -> None:
        self.state, self.found = state, found
        self._steady, self._odd, self._missing = [], 0, 0

    # -- what to try -----------------------------------------------------------------------------------------------------

    def _may_try(self) -> bool:
        if any(not t.baseline for t in self._open.values()):
            return False  # its result decides
        newest = max(self._tried, default=-1)
        after = sum(1 for number in self._baseline if number > newest)
        return after >= (1 if self._tried else 2)  # a comparison has both sides

    def _wanted(self) -> int | None:
        """The clock to measure next; None: settled just now, or more blocks at the top are needed."""
        ratios = self._ratios()
        if len(self._baseline) + len(self._tried) >= self.options.most_blocks:
            self._conclude(ratios, proven=False)
            return None
        lowest = min((clock for clock, _, _ in ratios), default=self.top)
        if self._floor is None:
            step = self._descend(ratios, lowest)
            if step is not None:
                return step
            self._floor = lowest
        return self._refine(ratios)

    def _ratios(self) -> list[tuple[int, float, float]]:
        """(clock, time, energy) of every tried block as shares of the blocks at the top clock around it."""
        found = []
        for number, (clock, time_s, energy_j) in self._tried.items():
            before = [self._baseline[n] for n in sorted(self._baseline) if n < number][-2:]
            after = [self._baseline[n] for n in sorted(self._baseline) if n > number][:2]
            around = before + after
            # Equal weight to both sides, so that a linear drift cancels however many blocks each has.
            sides = [side for side in (before, after) if side]
            usual_s = sum(sum(t for t, _ in side) / len(side) for side in sides) / len(sides) if around else time_s
            usual_j = sum(sum(e for _, e in side) / len(side) for side in sides) / len(sides) if around else energy_j
            found.append((clock, time_s / usual_s, energy_j / usual_j))
        return found

    def _descend(self, ratios: Sequence[tuple[int, float, float]], lowest: int) -> int | None:
        """The next clock further down, or None when the way down has ended."""
        bound = 1 + self.options.slowdown
        if not ratios:
            return self._at_least(self.top / bound, below=self.top)
        slow = [(t, e) for clock, t, e in ratios if clock == lowest]
        time = sum(t for t, _ in slow) / len(slow)
        energy = sum(e for _, e in slow) / len(slow)
        least = min([1.0, *(e for clock, _, e in ratios if clock > lowest)])
        # While a power cap binds, a lower clock may use a little more in the same time: that is not yet the bottom.
        over = time - bound
        if len(slow) < 2 and (abs(over) < 2 * self.options.time_noise or energy > least + _RISEN):
            return lowest  # the end of the way down is worth a second look
        if over > 0 or energy > least + _RISEN or lowest == self.clocks[-1]:
            return None
        share = max(0.02, (time - 1) / (self.top / lowest - 1))  # of the time that follows the clock
        ahead = self.top / (1 + self.options.slowdown / share)
        return self._at_least(max(min(ahead, lowest * _STRIDE), lowest * _JUMP), below=lowest)

    def _at_least(self, clock: float, *, below: int) -> int:
        fitting = [c for c in self.clocks if clock <= c < below]
        return min(fitting) if fitting else max((c for c in self.clocks if c < below), default=self.clocks[-1])

    def _refine(self, ratios: Sequence[tuple[int, float, float]]) -> int | None:
        between = self._bisect(ratios)
        if between is not None:
            return between
        best, hoped = self._best(ratios, self._noise(ratios))
        clock = best[0] if best else min((row for row in ratios), key=lambda row: row[2])[0]
        spread = [c for c in self.clocks if abs(c - clock) <= _NEAR * self.top and c < self.top]
        near = sum(1 for c, _, _ in ratios if c in spread)
        sure = best is None or (best[1].error <= self.options.time_error and best[2].error <= self.options.energy_error)
        if near >= self.options.least_near and sure:
            missed = 0.0 if hoped is None else (best[2].value if best else 1.0) - hoped[2].value
            if hoped is None or missed <= self.options.regret:
                self._conclude(ratios, proven=True)
                return None
            clock = hoped[0]
            spread = [c for c in self.clocks if abs(c - clock) <= _NEAR * self.top / 2 and c < self.top]
        # Measuring on both sides of the choice tells its slope as well as its value.
        counts = {c: sum(1 for other, _, _ in ratios if other == c) for c in spread}
        return min(spread, key=lambda c: (counts[c], abs(c - clock)), default=clock)

    def _bisect(self, ratios: Sequence[tuple[int, float, float]]) -> int | None:
        """Halfway from the best measured clock to its neighbour, as long as there is room worth it; None when closed in."""
        bound = 1 + self.options.slowdown
        known = {self.top: (1.0, 1.0)}
        for clock in {c for c, _, _ in ratios}:
            rows = [row for row in ratios if row[0] == clock]
            known[clock] = (sum(t for _, t, _ in rows) / len(rows), sum(e for _, _, e in rows) / len(rows))
        best = min((c for c in known if known[c][0] <= bound), key=lambda c: known[c][1])
        below = max((c for c in known if c < best), default=best)
        above = min((c for c in known if c > best), default=best)
        for low, high in ((below, best), (best, above)):
            inside = [c for c in self.clocks if low < c < high]
            if inside and high - low > _NEAR * self.top * (1 if low == below else 2):
                return inside[len(inside) // 2]
        return None

    def _conclude(self, ratios: Sequence[tuple[int, float, float]], *, proven: bool) -> None:
        best, _ = self._best(ratios, self._noise(ratios))
        blocks = len(self._baseline) + len(self._tried)
        if best is None or 1 - best[2].value < self.options.least_gain:
            self._settle(SearchState.NO_GAIN, None)
            return
        clock, time, energy = best
        found = Found(clock, time.value - 1, time.error, 1 - energy.value, energy.error, proven, blocks)
        self._settle(SearchState.SETTLED, found)

    # -- estimates -------------------------------------------------------------------------------------------------------

    def _noise(self, ratios: Sequence[tuple[int, float, float]]) -> tuple[float, float]:
        """Standard deviation of one block's time and energy ratio: what was asked to be assumed, or more if blocks say so."""
        found = []
        for column, assumed in ((1, self.options.time_noise), (2, self.options.energy_noise)):
            squares, freedom = 4 * assumed**2, 4.0  # the assumption weighs as much as four blocks
            for clock in {c for c, _, _ in ratios}:
                values = [row[column] for row in ratios if row[0] == clock]
                mean = sum(values) / len(values)
                squares += sum((v - mean) ** 2 for v in values)
                freedom += len(values) - 1
            found.append(math.sqrt(squares / freedom))
        return found[0], found[1]

    def _best(
        self, ratios: Sequence[tuple[int, float, float]], noise: tuple[float, float]
    ) -> tuple[tuple[int, _Fit, _Fit] | None, tuple[int, _Fit, _Fit] | None]:
        """The clock of least estimated energy that is surely fast enough, and the one that may turn out to be.

        Surely: one standard error included.
        """
        lowest = min((c for c, _, _ in ratios), default=self.top)
        known = [(float(self.top), 1.0, 1.0)] * 4 + [(float(c), t, e) for c, t, e in ratios]
        estimates = []
        for clock in self.clocks:
            if lowest <= clock < self.top:
                time = _local([(c, t) for c, t, _ in known], clock, _WINDOW * self.top, noise[0])
                energy = _local([(c, e) for c, _, e in known], clock, _WINDOW * self.top, noise[1])
                estimates.append((clock, time, energy))
        limit, worth = 1 + self.options.slowdown, 1 - self.options.least_gain
        may = [row for row in estimates if row[1].value <= limit and row[2].value < worth]
        best = min((r for r in may if r[1].value + r[1].error <= limit), key=lambda r: (r[2].value, -r[0]), default=None)
        return best, min(may, key=lambda r: (r[2].value, -r[0]), default=None)


def _local(points: Sequence[tuple[float, float]], at: float, window: float, noise: float) -> _Fit:
    """A line through the points near ``at`` (tricube weights, at least three points), and the error of its value there."""
    distances = sorted(abs(x - at) for x, _ in points)
    reach = max(window, 1.01 * distances[min(2, len(distances) - 1)])
    s0 = s1 = s2 = y0 = y1 = 0.0
    weights = []
    for x, y in points:
        w = max(0.0, 1 - (abs(x - at) / reach) ** 3) ** 3
        u = x - at
        weights.append((w, u))
        s0, s1, s2, y0, y1 = s0 + w, s1 + w * u, s2 + w * u * u, y0 + w * y, y1 + w * u * y
    det = s0 * s2 - s1 * s1
    level = det <= 1e-9 * max(1.0, s0 * s2)  # all at one clock
    gains = [w / s0 if level else w * (s2 - s1 * u) / det for w, u in weights]
    value = sum(g * y for g, (_, y) in zip(gains, points, strict=True))
    return _Fit(value, noise * math.sqrt(sum(g * g for g in gains)))
