"""What each kind of work on a GPU used, fitted to the course of its energy counter: the pure estimator behind energy spans.

House rules: no clock and no I/O; between two counter refreshes the energy is the sum over labels of power times overlap; what the
data cannot tell apart gets a wide interval, what was not measured gets none (docs/energy.md, "Spans").
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from powerd.api import LabelEnergy, Span, SpansView
from powerd.clock import NS
from powerd.energy import SensorErrors
from powerd.errors import RequestError
from powerd.leastsquares import Fit, Row, fit
from powerd.model import reason_names

MAX_SPANS = 20_000
MAX_LABELS = 64
MAX_LABEL = 64  # characters
BETWEEN = ""  # the label of what no span covers
_EARLY_NS = 10_000_000  # by so much a value may be younger than its sample's stamp: the stamp is taken before the driver answers
_PERIODS_NS = (100_000_000, 50_000_000, 33_333_333, 25_000_000, 20_000_000)  # refresh periods that are tried
_WINDOWS_NS = (25_000_000, 100_000_000, 1_000_000_000)  # over which a power reading may be a mean
_SEARCH_ROWS = 400  # intervals that choose the phase; all of them are fitted then
_COARSE = 20  # phases of one period that are tried, then twice as many more around the best
_SHARE = 0.1  # a clock event reason is told when this share of a label's samples showed it


@dataclass(slots=True)
class Cut:
    """One GPU's samples over some time, as columns; -1: not read."""

    oldest_ns: int | None  # of all that is kept
    counter: bool
    limit_mw: int | None
    breaks: tuple[tuple[int, str], ...]
    time_ns: list[int] = field(default_factory=list)
    energy_mj: list[int] = field(default_factory=list)
    seen_ns: list[int] = field(default_factory=list)  # when this counter value was first seen
    power_mw: list[int] = field(default_factory=list)
    clock_mhz: list[int] = field(default_factory=list)
    reasons: list[int] = field(default_factory=list)
    epoch: list[int] = field(default_factory=list)


def check_spans(spans: Sequence[Span]) -> None:
    """RequestError that names the first span that is out of order, overlaps the one before, or has no label."""
    if not spans:
        raise RequestError("no spans", hint="give at least one")
    if len(spans) > MAX_SPANS:
        raise RequestError(f"{len(spans)} spans: at most {MAX_SPANS} at once", hint="ask in parts", code="too_many")
    labels: set[str] = set()
    before_ns = 0
    for number, span in enumerate(spans):
        if not span.label or len(span.label) > MAX_LABEL:
            raise RequestError(f"span {number}: a label of 1 to {MAX_LABEL} characters is needed", code="bad_value")
        if span.end_ns < span.begin_ns or span.begin_ns < 0:
            raise RequestError(f"span {number} ({span.label}) ends before it begins", code="bad_value")
        if span.begin_ns < before_ns:
            raise RequestError(
                f"span {number} ({span.label}) begins before the one before it ends", hint="sort them by time", code="bad_value"
            )
        before_ns = span.end_ns
        labels.add(span.label)
    if len(labels) > MAX_LABELS:
        raise RequestError(f"{len(labels)} labels: at most {MAX_LABELS}", hint="label kinds of work, not pieces", code="too_many")


class Timeline:
    """The spans as one gapless course of labels; the last two labels stand for the time before and after all of them."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.names = [*dict.fromkeys(span.label for span in spans), BETWEEN]
        number = {name: n for n, name in enumerate(self.names)}
        between, before, after = number[BETWEEN], len(self.names), len(self.names) + 1
        self.begin_ns, self.end_ns = spans[0].begin_ns, spans[-1].end_ns
        self.counts = [0] * len(self.names)
        self.times_ns = [0] * len(self.names)
        self.starts, self.labels = [-1], [before]
        at_ns = self.begin_ns
        for span in spans:
            label = number[span.label]
            self.counts[label] += 1
            self.times_ns[label] += span.end_ns - span.begin_ns
            if span.begin_ns > at_ns:
                self._add(at_ns, between)
                self.counts[between] += 1
                self.times_ns[between] += span.begin_ns - at_ns
            if span.end_ns > span.begin_ns:
                self._add(span.begin_ns, label)
            at_ns = span.end_ns
        self._add(self.end_ns, after)
        self.width = len(self.names) + 2

    def _add(self, start_ns: int, label: int) -> None:
        self.starts.append(start_ns)
        self.labels.append(label)

    def at(self, time_ns: float) -> int:
        """The label of an instant."""
        return self.labels[bisect_right(self.starts, time_ns) - 1]

    def overlap(self, begin_ns: float, end_ns: float) -> list[tuple[int, float]]:
        """(label, seconds) of a stretch of time; a label may come up several times."""
        starts, labels = self.starts, self.labels
        found = []
        index = bisect_right(starts, begin_ns) - 1
        while index + 1 < len(starts) and starts[index + 1] < end_ns:
            found.append((labels[index], (starts[index + 1] - begin_ns) / NS))
            index += 1
            begin_ns = starts[index]
        found.append((labels[index], (end_ns - begin_ns) / NS))
        return found


@dataclass(frozen=True, slots=True)
class _Step:
    """What the sensor said of one stretch: energy between two looks at it, in joules."""

    first_ns: int  # look before
    last_ns: int  # look after
    energy_j: float


#: Where a look at the sensor belongs on the time axis.
_Place = Callable[[int], float]


def _counted(cut: Cut) -> list[_Step]:
    """Between one counter value and the next."""
    steps: list[_Step] = []
    last: tuple[int, int] | None = None
    for seen_ns, energy_mj in zip(cut.seen_ns, cut.energy_mj, strict=True):
        if energy_mj < 0 or (last is not None and seen_ns == last[0]):
            continue
        if last is not None and energy_mj >= last[1]:
            steps.append(_Step(last[0], seen_ns, (energy_mj - last[1]) / 1000))
        last = seen_ns, energy_mj
    return steps


def _averaged(cut: Cut, window_ns: int) -> list[_Step]:
    """A power reading is a mean over a window before it."""
    return [
        _Step(time_ns - window_ns, time_ns, power_mw / 1000 * window_ns / NS)
        for time_ns, power_mw in zip(cut.time_ns, cut.power_mw, strict=True)
        if power_mw >= 0
    ]


def _constant(age_ns: float) -> _Place:
    return lambda look_ns: look_ns - age_ns


def _grid(period_ns: float, phase_ns: float) -> _Place:
    return lambda look_ns: (look_ns - phase_ns) // period_ns * period_ns + phase_ns


def _rows(steps: Sequence[_Step], place: _Place, line: Timeline) -> list[Row]:
    rows = []
    for step in steps:
        begin, end = place(step.first_ns), place(step.last_ns)
        if end > begin:
            # Beside the overlaps what a small delay of both edges would change: the column of the phase.
            rows.append(Row(step.energy_j, (end - begin) / NS, line.overlap(begin, end), line.at(begin), line.at(end)))
    return rows


def _score(steps: Sequence[_Step], line: Timeline) -> Callable[[_Place], float]:
    """How badly looks at these places fit, by as many of the steps as are worth the time."""
    stride = max(1, len(steps) // _SEARCH_ROWS)
    some = [step for n, step in enumerate(steps) if n % stride == 0]

    def score(place: _Place) -> float:
        rows = _rows(some, place, line)
        return fit(rows, line.width, phase=False).residue if len(rows) == len(some) else math.inf

    return score


def _best(score: Callable[[_Place], float], make: Callable[[float], _Place], low: float, high: float) -> tuple[float, float]:
    """The smallest residue over a range of ages or phases, and where it is."""
    step = (high - low) / _COARSE
    found, at = min((score(make(low + (n + 0.5) * step)), low + (n + 0.5) * step) for n in range(_COARSE))
    for _ in range(2):
        step /= 4
        found, at = min((found, at), *((score(make(at + n * step)), at + n * step) for n in (-3, -2, -1, 1, 2, 3)))
    return found, at


def _place(steps: Sequence[_Step], line: Timeline, reach_ns: int) -> _Place:
    """Where counter values belong: at a fixed age, or on the grid of the counter's refreshes."""
    score = _score(steps, line)
    found, age_ns = _best(score, _constant, -_EARLY_NS, reach_ns)
    place = _constant(age_ns)
    for period_ns in _PERIODS_NS:
        grid_found, phase_ns = _best(score, lambda phase, period=period_ns: _grid(period, phase), 0, period_ns)  # type: ignore[misc]
        grid = _grid(period_ns, phase_ns)
        # A sampler on time sees a fixed age, then both are the same; and no value changes between two refreshes.
        if grid_found < 0.9 * found and all(grid(s.last_ns) > grid(s.first_ns) for s in steps):
            found, place = grid_found, grid
    return place


def _window(cut: Cut, line: Timeline, reach_ns: int) -> tuple[list[_Step], _Place, int]:
    """Over which window power readings are a mean, and how old they are."""
    tried = []
    for window_ns in _WINDOWS_NS:
        steps = _touching(_averaged(cut, window_ns), line, reach_ns)
        found, age_ns = _best(_score(steps, line), _constant, -_EARLY_NS, reach_ns)
        tried.append((found / window_ns, window_ns, age_ns, steps))  # mean squares of power
    _, window_ns, age_ns, steps = min(tried, key=lambda row: row[0])
    return steps, _constant(age_ns), window_ns


def _touching(steps: Sequence[_Step], line: Timeline, reach_ns: int) -> list[_Step]:
    return [s for s in steps if s.last_ns > line.begin_ns and s.first_ns - reach_ns < line.end_ns]


def _none(line: Timeline, cut: Cut, uuid: str, note: str) -> SpansView:
    labels = _label_views(line, cut, [None] * len(line.names))
    return SpansView(uuid, labels, 0, "none", note)


def _label_views(line: Timeline, cut: Cut, energies: Sequence[tuple[float, float, float] | None]) -> tuple[LabelEnergy, ...]:
    """Each label with its energy and what clocks and clock event reasons its samples showed."""
    clocks: list[list[int]] = [[] for _ in range(line.width)]
    reasons: list[dict[int, int]] = [{} for _ in range(line.width)]
    for time_ns, clock_mhz, bits in zip(cut.time_ns, cut.clock_mhz, cut.reasons, strict=True):
        label = line.at(time_ns)
        if clock_mhz >= 0:
            clocks[label].append(clock_mhz)
        if bits >= 0:
            reasons[label][bits] = reasons[label].get(bits, 0) + 1
    views = []
    for number, name in enumerate(line.names):
        if not line.counts[number]:
            continue
        seen, clock, energy = reasons[number], sorted(clocks[number]), energies[number]
        counts = {bit: sum(n for bits, n in seen.items() if bits & bit) for bit in (1 << k for k in range(31))}
        told = sum(bit for bit, n in counts.items() if n and n >= _SHARE * sum(seen.values()))
        low, high = (None, None) if energy is None else energy[1:]
        views.append(
            LabelEnergy(
                label=name, spans=line.counts[number], time_s=line.times_ns[number] / NS,
                energy_j=None if energy is None else energy[0], low_j=low, high_j=high,
                clock_event_reasons=reason_names(told), sm_clock_mhz=clock[len(clock) // 2] if clock else None,
            )
        )  # fmt: skip
    return tuple(views)


def estimate(uuid: str, spans: Sequence[Span], cut: Cut, errors: SensorErrors) -> SpansView:
    """The energy of every label in joules with its 95 % interval, from samples that reach a little beyond the spans."""
    line = Timeline(spans)
    if cut.oldest_ns is None or cut.oldest_ns > line.begin_ns:
        return _none(line, cut, uuid, "spans are older than what is kept (ten minutes, or since powerd started)")
    inside = [text for at, text in cut.breaks if line.begin_ns <= at <= line.end_ns + errors.refresh_ns]
    if inside:
        return _none(line, cut, uuid, inside[-1])
    around = [e for t, e in zip(cut.time_ns, cut.epoch, strict=True) if line.begin_ns - NS // 10 <= t <= line.end_ns + NS // 10]
    if len(set(around)) > 1:
        return _none(line, cut, uuid, f"counter restarted (epoch {around[-1]})")
    if around:
        keep = [n for n, epoch in enumerate(cut.epoch) if epoch == around[0]]
        for name in ("time_ns", "energy_mj", "seen_ns", "power_mw", "clock_mhz", "reasons", "epoch"):
            column = getattr(cut, name)
            setattr(cut, name, [column[n] for n in keep])
    seen = sorted({t for t, mw in zip(cut.time_ns, cut.power_mw, strict=True) if mw >= 0} if not cut.counter else cut.seen_ns)
    gaps = [b - a for a, b in pairwise(seen) if a < line.end_ns and b > line.begin_ns and b > a]
    reach_ns = min([errors.refresh_ns, *sorted(gaps)[len(gaps) // 2 : len(gaps) // 2 + 1]])
    if sum(gap for gap in gaps if cut.counter or gap <= errors.frozen_ns) < 0.5 * (line.end_ns - line.begin_ns):
        return _none(line, cut, uuid, "no counter values in this time" if cut.counter else "no power readings in this time")
    each = 1.0  # rows that overlap tell the same thing again
    if cut.counter:
        steps = _touching(_counted(cut), line, errors.refresh_ns)
        place = _place(steps, line, reach_ns)
    else:
        steps, place, window_ns = _window(cut, line, errors.refresh_ns)
        each = max(1.0, window_ns * len(steps) / max(1, sum(gaps)))
    solved = fit(_rows(steps, place, line), line.width, phase_s=(reach_ns + _EARLY_NS) / NS / math.sqrt(12), each=each)
    gain = errors.counter_gain if cut.counter else errors.power_gain
    energies = [_interval(solved, label, line.times_ns[label] / NS, gain) for label in range(len(line.names))]
    notes = [text for at, text in cut.breaks if line.begin_ns <= at <= line.end_ns]
    return SpansView(
        uuid, _label_views(line, cut, energies), len(steps), "counter" if cut.counter else "integrated", "; ".join(notes)
    )


def _interval(solved: Fit, label: int, seconds: float, gain: float) -> tuple[float, float, float]:
    energy_j = solved.power_w[label] * seconds
    half = math.hypot(solved.half_w[label] * seconds, gain * energy_j)
    return energy_j, max(0.0, energy_j - half), energy_j + half
