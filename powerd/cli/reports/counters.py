"""Energy between two instants from a stored energy counter: its difference, epoch by epoch, with what is not known named.

House rules: pure; a counter is never subtracted across a restart; a stretch without samples is still counted when the counter
went on, and named; what lies before the first or after the last sample is not guessed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from powerd.cli.reports.model import Amount
from powerd.energy import SensorErrors

_GAIN = SensorErrors().counter_gain
_OVERSHOOT = 1.2


@dataclass(frozen=True, slots=True)
class GpuSeries:
    """One GPU's stored course; every list as long as ``time_s`` (Unix seconds, when the value was read)."""

    uuid: str
    index: int | None
    name: str
    step_s: float  # how far apart samples lie when nothing is missing
    time_s: tuple[float, ...]
    energy_j: tuple[float | None, ...]
    power_w: tuple[float | None, ...]
    epoch: tuple[float | None, ...] = ()  # empty: only steps backwards tell a restart
    limit_w: float | None = None


@dataclass(slots=True)
class _Sum:
    energy_j: float = 0.0
    doubt_j: float = 0.0
    notes: list[str] = field(default_factory=list)


def clock_text(time_s: float) -> str:
    """A moment for people, UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time_s))


def _mean_power(series: GpuSeries, begin_s: float, end_s: float) -> float | None:
    known = [p for t, p in zip(series.time_s, series.power_w, strict=True) if p is not None and begin_s <= t <= end_s]
    return sum(known) / len(known) if known else None


def counted(series: GpuSeries, begin_s: float, end_s: float) -> tuple[Amount, tuple[str, ...]]:
    """The energy of one GPU between two instants in joules, and what there is to say about it."""
    epochs = series.epoch or (0.0,) * len(series.time_s)
    points = [(t, e, n) for t, e, n in zip(series.time_s, series.energy_j, epochs, strict=True) if e is not None]
    if len(points) < 2:
        return Amount(None, None, None, None), ("no energy counter is stored for this time",)
    slack_s = max(2.5 * series.step_s, 5.0)
    sum_ = _Sum()
    whole = True
    first, last = max(begin_s, points[0][0]), min(end_s, points[-1][0])
    for missing_s, text in ((first - begin_s, f"not measured before {clock_text(first)} UTC"),
                            (end_s - last, f"not measured after {clock_text(last)} UTC")):  # fmt: skip
        if missing_s > slack_s:
            whole = False
            sum_.notes.append(text)
        elif missing_s > 0:  # less than the samples' own distance: by the mean power around
            power = _mean_power(series, begin_s, end_s) or 0.0
            sum_.energy_j += power * missing_s
            sum_.doubt_j += power * missing_s
    if last <= first:
        return Amount(None, None, None, None), (*sum_.notes, "no samples in this time")
    for before, after in pairwise(points):
        if after[0] <= first or before[0] >= last:
            continue
        _add(sum_, series, before, after, first, last)
    half = _GAIN * sum_.energy_j + sum_.doubt_j
    low, high = max(0.0, sum_.energy_j - half), sum_.energy_j + half
    notes = tuple(dict.fromkeys(sum_.notes))
    if not whole:
        return Amount(None, None, None, sum_.energy_j), notes
    return Amount(sum_.energy_j, low, high, sum_.energy_j), notes


_Point = tuple[float, float, float | None]


def _add(sum_: _Sum, series: GpuSeries, before: _Point, after: _Point, first: float, last: float) -> None:
    """One stretch between two samples, cut to the report's time."""
    span_s = after[0] - before[0]
    inside = (min(after[0], last) - max(before[0], first)) / span_s
    if before[2] == after[2] and after[1] >= before[1]:
        part = (after[1] - before[1]) * inside
        sum_.energy_j += part
        if inside < 1:  # an edge: power within the stretch need not be even
            sum_.doubt_j += (after[1] - before[1]) / 2
        if span_s > max(3 * series.step_s, 10.0):
            sum_.notes.append(f"no samples from {clock_text(before[0])} to {clock_text(after[0])} UTC; the GPU's counter went on")
        return
    power = _mean_power(series, before[0] - 2 * series.step_s, after[0] + 2 * series.step_s)
    text = f"the energy counter restarted between {clock_text(before[0])} and {clock_text(after[0])} UTC"
    limit_w = series.limit_w or max((p for p in series.power_w if p is not None), default=0.0)
    estimate = (power or 0.0) * span_s * inside
    sum_.energy_j += estimate
    sum_.doubt_j += max(estimate, _OVERSHOOT * limit_w * span_s * inside - estimate)
    sum_.notes.append(f"{text}; {estimate:.0f} J were estimated from power")


def summed(parts: Sequence[Amount]) -> Amount:
    """Several figures together: known as a whole only when each is; calibrations are shared, so that bounds add up."""
    known = [p.known for p in parts if p.known is not None]
    total = sum(known) if known else None
    if not parts or any(p.value is None or p.low is None or p.high is None for p in parts):
        return Amount(None, None, None, total)
    return Amount(sum(p.value or 0.0 for p in parts), sum(p.low or 0.0 for p in parts), sum(p.high or 0.0 for p in parts), total)


def times(amount: Amount, factor: float) -> Amount:
    """A figure in another unit."""
    value, low, high, known = (None if v is None else v * factor for v in (amount.value, amount.low, amount.high, amount.known))
    return Amount(value, low, high, known)
