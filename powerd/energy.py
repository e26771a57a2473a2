"""Energy between two instants from a counter that is refreshed now and then: the pure estimator behind energy windows.

House rules: no clock and no I/O, only readings; one cumulative ledger per GPU, so that a window is the difference of two edges;
a counter is never subtracted across epochs; whatever is not measured is bounded by physics or not told at all.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import pairwise

from powerd.api import EnergyFigure
from powerd.clock import NS
from powerd.model import EnergyMethod, Health, Reading

_Z95 = 1.96
_KEEP = 64  # samples per GPU; at 10 Hz 6.4 s, far more than an edge waits
_OVERSHOOT = 1.2  # power may pass the enforced limit by so much for a sensor window (failure catalogue R26)


@dataclass(frozen=True, slots=True)
class SensorErrors:
    """What is believed of NVML's sensors; docs/energy.md says where each figure comes from."""

    refresh_ns: int = 100_000_000  # the slowest refresh of an energy counter in the field: 20-100 ms
    counter_gain: float = 0.01  # 95 % of counters are within this share of the truth
    power_gain: float = 0.05  # NVML's own specification of a power reading
    frozen_ns: int = 2 * NS  # a counter that stands still for so long while power flows is not believed


@dataclass(frozen=True, slots=True)
class _Point:
    """The ledger at one instant: everything is summed up since the track began, in mJ."""

    at_ns: int  # the middle of the instants that the value may belong to
    age_ns: int  # the width of those instants
    energy_mj: float
    integrated_mj: float  # the part that comes from power readings
    variance: float  # of that part, beside its gain
    slack_low_mj: float  # how much lower the truth may be, by physics
    slack_high_mj: float
    bridges: int  # stretches without a trustworthy counter
    epoch: int


@dataclass(frozen=True, slots=True)
class Edge:
    """The ledger read off at one instant, with the doubt of reading it off there."""

    at_ns: int
    point: _Point
    sigma_mj: float
    breaks: int
    final: bool  # False: a later sample would narrow it
    extrapolated: bool


def _between(before: _Point, after: _Point, at_ns: int, share: float) -> _Point:
    """The ledger between two points, everything in proportion."""

    def mix(low: float, high: float) -> float:
        return low + (high - low) * share

    return _Point(
        at_ns=at_ns,
        age_ns=round(mix(before.age_ns, after.age_ns)),
        energy_mj=mix(before.energy_mj, after.energy_mj),
        integrated_mj=mix(before.integrated_mj, after.integrated_mj),
        variance=mix(before.variance, after.variance),
        slack_low_mj=mix(before.slack_low_mj, after.slack_low_mj),
        slack_high_mj=mix(before.slack_high_mj, after.slack_high_mj),
        bridges=before.bridges if share < 1 else after.bridges,
        epoch=before.epoch if share < 1 else after.epoch,
    )


class Track:
    """One GPU's ledger; feed it every reading, ask it for edges."""

    def __init__(self, errors: SensorErrors | None = None, period_ns: int | None = None) -> None:
        self.errors = errors or SensorErrors()
        self.period_ns = period_ns
        self._late_ns = 0  # by how much samples have lately come off their period
        self.breaks = 0  # times after which nothing is known of what came before
        self.lost = False
        self.has_counter = False
        self.notes: deque[tuple[int, str]] = deque(maxlen=_KEEP)
        self.epochs: deque[int] = deque(maxlen=_KEEP)
        self._points: deque[_Point] = deque(maxlen=_KEEP)
        self._powers: deque[tuple[int, int]] = deque(maxlen=_KEEP)
        self._raw_mj = 0  # the counter at the newest counter point
        self._seen_ns = 0  # when that value was first seen
        self._time_ns = 0  # of the newest reading
        self._limit_mw: int | None = None
        self._frozen = False

    @property
    def newest_ns(self) -> int:
        """The instant up to which edges are final; 0 before the first sample."""
        return self._points[-1].at_ns if self._points else 0

    def add(self, reading: Reading) -> None:
        """Take one reading; readings without news (not newer than the last one) are ignored."""
        if reading.health is Health.LOST:
            if not self.lost:
                self._forget(reading.time_ns, "GPU lost")
                self.lost = True
            return
        if reading.time_ns <= self._time_ns:
            return
        self.lost = False
        previous_ns, self._time_ns = self._time_ns, reading.time_ns
        if self.period_ns and previous_ns:
            # A machine too busy to sample on time may also have been late between the time stamp and the driver's answer.
            off_ns = min(abs(reading.time_ns - previous_ns - self.period_ns), 2 * self.errors.refresh_ns)
            self._late_ns = max(off_ns, self._late_ns * 7 // 8)
        power_mw = reading.power_mw if reading.power_mw is not None else reading.power_average_mw
        if power_mw is not None:
            self._powers.append((reading.time_ns, power_mw))
        if reading.power_limit_enforced_mw is not None:
            self._limit_mw = reading.power_limit_enforced_mw
        if reading.energy_method is EnergyMethod.INTEGRATED:  # here rather than in the sampler's sum, to know the doubt of it
            self._integrate(reading, power_mw)
            return
        if reading.energy_mj is None or reading.energy_time_ns is None:
            return
        self.has_counter = True
        self._count(reading, reading.energy_mj, reading.energy_time_ns, previous_ns)

    def _forget(self, at_ns: int, note: str) -> None:
        self.breaks += 1
        self.notes.append((at_ns, note))
        self._points.clear()
        self._powers.clear()
        self._frozen = False

    def _age(self, seen_ns: int, previous_ns: int) -> int:
        """A value first seen now became visible after the sample before, and is at most one refresh old then."""
        gap = seen_ns - previous_ns if previous_ns else self.errors.refresh_ns
        return max(1, min(gap, self.errors.refresh_ns))

    def _count(self, reading: Reading, raw_mj: int, seen_ns: int, previous_ns: int) -> None:
        last = self._points[-1] if self._points else None
        if last is not None and seen_ns == self._seen_ns and reading.epoch == last.epoch:
            if reading.time_ns - seen_ns >= self.errors.frozen_ns and reading.power_mw:
                if not self._frozen:
                    self.notes.append((reading.time_ns, "energy counter stood still, power integrated instead"))
                self._frozen = True
                self._bridge(last, reading.time_ns, 1, reading.epoch, believed=True)
            return
        age_ns = self._age(seen_ns, previous_ns) + self._late_ns
        at_ns = seen_ns + self._late_ns - age_ns // 2
        if last is None:
            self.epochs.append(reading.epoch)
            self._points.append(_Point(at_ns, age_ns, 0.0, 0.0, 0.0, 0.0, 0.0, 0, reading.epoch))
        elif reading.epoch != last.epoch:
            self.epochs.append(reading.epoch)
            self.notes.append(
                (reading.time_ns, f"counter restarted (epoch {reading.epoch}), the gap is bounded by the power limit")
            )
            self._bridge(last, at_ns, age_ns, reading.epoch, believed=False)
        elif self._frozen:
            self._bridge(last, at_ns, age_ns, reading.epoch, believed=True)
        elif not self._possible(raw_mj - self._raw_mj, at_ns - last.at_ns + age_ns):
            self.notes.append((reading.time_ns, "impossible step of the energy counter left out"))
            self._bridge(last, at_ns, age_ns, reading.epoch, believed=False)
        else:
            self._points.append(
                _Point(
                    at_ns, age_ns, last.energy_mj + raw_mj - self._raw_mj, last.integrated_mj, last.variance,
                    last.slack_low_mj, last.slack_high_mj, last.bridges, reading.epoch,
                )
            )  # fmt: skip
        self._raw_mj, self._seen_ns, self._frozen = raw_mj, seen_ns, False

    def _possible(self, step_mj: int, span_ns: int) -> bool:
        if step_mj < 0:
            return False
        return self._limit_mw is None or step_mj <= _OVERSHOOT * self._limit_mw * (span_ns + self.errors.refresh_ns) / NS

    def _bridge(self, last: _Point, at_ns: int, age_ns: int, epoch: int, *, believed: bool) -> None:
        """Go on without the counter: by power readings where there are any, within what the power limit allows."""
        span_s = max(0, at_ns - last.at_ns) / NS
        inside = [p for t, p in self._powers if last.at_ns < t <= self._time_ns] or [p for _, p in list(self._powers)[-1:]]
        if not inside or (not believed and self._limit_mw is None):
            self._forget(at_ns, "energy unknown: neither counter nor power readings")
            self._points.append(_Point(at_ns, age_ns, 0.0, 0.0, 0.0, 0.0, 0.0, 0, epoch))
            return
        before = next((p for t, p in reversed(self._powers) if t <= last.at_ns), inside[0])
        # The sample before the gap and those inside it stand for equal parts of it.
        energy_mj = span_s * (before + sum(inside)) / (1 + len(inside))
        low_mj = high_mj = 0.0
        if not believed:
            low_mj = energy_mj
            high_mj = max(0.0, _OVERSHOOT * (self._limit_mw or 0) * span_s - energy_mj)
        spread_mw = max(before, *inside) - min(before, *inside)
        self._points.append(
            _Point(
                at_ns, age_ns, last.energy_mj + energy_mj, last.integrated_mj + energy_mj,
                last.variance + (spread_mw * span_s) ** 2 / 12, last.slack_low_mj + low_mj, last.slack_high_mj + high_mj,
                last.bridges + 1, epoch,
            )
        )  # fmt: skip

    def _integrate(self, reading: Reading, power_mw: int | None) -> None:
        """No counter on this GPU: sum up power readings."""
        if power_mw is None:
            return
        age_ns = self.errors.refresh_ns
        at_ns = reading.time_ns - age_ns // 2
        if not self._points:
            self.epochs.append(reading.epoch)
            self._points.append(_Point(at_ns, age_ns, 0.0, 0.0, 0.0, 0.0, 0.0, 0, reading.epoch))
            return
        last = self._points[-1]
        if reading.epoch != last.epoch:
            self.epochs.append(reading.epoch)
        if at_ns - last.at_ns > self.errors.frozen_ns:
            self.notes.append((reading.time_ns, "no power readings for a while, bounded by the power limit"))
            self._bridge(last, at_ns, age_ns, reading.epoch, believed=False)
        else:
            self._bridge(last, at_ns, age_ns, reading.epoch, believed=True)

    def edge(self, at_ns: int) -> Edge | None:
        """The ledger at an instant, or ``None`` when nothing is known of it (no sample yet, or it lies too far back)."""
        points = self._points
        if not points:
            return None
        if at_ns > points[-1].at_ns:
            return self._ahead(at_ns)
        index = len(points) - 1
        while index > 0 and points[index - 1].at_ns > at_ns:
            index -= 1
        if index == 0:
            first = points[0]
            if first.at_ns - at_ns > self.errors.frozen_ns:
                return None
            return self._behind(first, at_ns)
        before, after = points[index - 1], points[index]
        span_ns = max(1, after.at_ns - before.at_ns)
        share = (at_ns - before.at_ns) / span_ns
        near = [points[i] for i in range(max(0, index - 2), min(len(points), index + 2))]
        slopes = [(b.energy_mj - a.energy_mj) / max(1, b.at_ns - a.at_ns) for a, b in pairwise(near)]  # mJ/ns
        highest, lowest = max(slopes), min(slopes)
        age_ns = before.age_ns + (after.age_ns - before.age_ns) * share
        shift = sum(slopes) / len(slopes) * age_ns  # uniform over this range; what a switch nearby adds is in the shape
        shape = (highest - lowest) * span_ns / 2  # a switch of power somewhere inside, at most half of this off either way
        point = _between(before, after, at_ns, share)
        return Edge(at_ns, point, math.sqrt((shift**2 + shape**2) / 12), self.breaks, final=True, extrapolated=False)

    def _recent(self) -> tuple[float, float, float]:
        """The newest power and the lowest and highest of the last samples, in mW; from the counter where power is unknown."""
        powers: list[float] = [float(p) for _, p in list(self._powers)[-32:]]
        if not powers:
            points = list(self._points)[-8:]
            powers = [(b.energy_mj - a.energy_mj) * NS / max(1, b.at_ns - a.at_ns) for a, b in pairwise(points)]
        if not powers:
            return 0.0, 0.0, float(self._limit_mw or 0)
        return powers[-1], min(powers), max(powers)

    def _ahead(self, at_ns: int) -> Edge:
        """Past the newest counter value: by power readings, held from the newest one on."""
        last = self._points[-1]
        newest, lowest, highest = self._recent()
        span_s, energy_mj, done_ns = (at_ns - last.at_ns) / NS, 0.0, last.at_ns
        for sample_ns, power_mw in self._powers:  # a reading tells of the time before it
            if last.at_ns < sample_ns <= at_ns:
                energy_mj += power_mw * (sample_ns - done_ns) / NS
                done_ns = sample_ns
        energy_mj += next((p for t, p in self._powers if t > at_ns), newest) * (at_ns - done_ns) / NS
        blind_s = max(0, at_ns - self._time_ns) / NS  # nothing was read in this part: it may be anything seen lately, or a switch
        reach = max(highest, self._limit_mw or 0.0 if blind_s > self.errors.refresh_ns / NS else 0.0)
        shift = highest * last.age_ns / NS
        shape = (highest - lowest) * (span_s - blind_s) + 2 * max(reach - newest, newest) * blind_s
        sigma = math.sqrt((shift**2 + shape**2) / 12)
        point = _Point(
            at_ns, last.age_ns, last.energy_mj + energy_mj, last.integrated_mj + energy_mj, last.variance, last.slack_low_mj,
            last.slack_high_mj, last.bridges, last.epoch,
        )  # fmt: skip
        return Edge(at_ns, point, sigma, self.breaks, final=False, extrapolated=True)

    def _behind(self, first: _Point, at_ns: int) -> Edge:
        """Before the first sample (a window begun as the daemon started): by the first power reading."""
        newest, _, highest = self._recent()
        power = next((p for t, p in self._powers if t >= first.at_ns), newest)
        span_s = (first.at_ns - at_ns) / NS
        reach = 2 * max(power, max(highest, self._limit_mw or 0) - power) * span_s
        sigma = math.sqrt(((highest * first.age_ns / NS) ** 2 + reach**2) / 12)
        point = _Point(
            at_ns, first.age_ns, first.energy_mj - power * span_s, first.integrated_mj - power * span_s, first.variance,
            first.slack_low_mj, first.slack_high_mj, first.bridges, first.epoch,
        )  # fmt: skip
        return Edge(at_ns, point, sigma, self.breaks, final=True, extrapolated=True)


def unknown(uuid: str, note: str) -> EnergyFigure:
    """The figure of a GPU of which nothing can be said, and why."""
    return EnergyFigure(uuid, None, None, None, None, "none", (), note)


def figure(uuid: str, track: Track, begin: Edge | None, end: Edge | None) -> EnergyFigure:
    """The energy between two edges of one track in joules, with its 95 % interval."""
    if begin is None or end is None or begin.breaks != end.breaks or track.lost:
        since = begin.at_ns if begin else 0
        notes = [text for at, text in track.notes if at >= since] or ["no readings of this GPU in the window"]
        return unknown(uuid, "; ".join(dict.fromkeys(notes)))
    errors = track.errors
    low_point, point = begin.point, end.point
    energy = max(0.0, point.energy_mj - low_point.energy_mj)
    integrated = min(energy, max(0.0, point.integrated_mj - low_point.integrated_mj))
    sigma = math.sqrt(begin.sigma_mj**2 + end.sigma_mj**2 + max(0.0, point.variance - low_point.variance))
    half = math.hypot(_Z95 * sigma, errors.counter_gain * (energy - integrated), errors.power_gain * integrated)
    low = max(0.0, energy - half - (point.slack_low_mj - low_point.slack_low_mj))
    high = energy + half + (point.slack_high_mj - low_point.slack_high_mj)
    if not track.has_counter:
        name = "integrated"
    else:
        helped = begin.extrapolated or end.extrapolated or integrated > 0 or point.bridges != low_point.bridges
        name = "counter+power" if helped else "counter"
    duration_s = (end.at_ns - begin.at_ns) / NS
    notes = [text for at, text in track.notes if begin.at_ns <= at <= end.at_ns + NS and not text.startswith("GPU lost")]
    return EnergyFigure(
        uuid=uuid,
        energy_j=energy / 1000,
        low_j=low / 1000,
        high_j=high / 1000,
        average_power_w=energy / 1000 / duration_s if duration_s > 0 else None,
        method=name,
        epochs=tuple(e for e in track.epochs if low_point.epoch <= e <= point.epoch),
        note="; ".join(dict.fromkeys(notes)),
    )
