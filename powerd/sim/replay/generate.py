"""Days and weeks of requests: a daily and weekly shape with noise and bursts over the lengths of a real trace.

House rules: a seed decides everything; the shape's expectation is the same for every seed, so that one week can be learned from
another; the shape is assumed and its noise is that of the one real hour, and both are said here.

The rate at second ``t`` is ``requests_per_s * shape(t) * noise(t) * burst(t)``:

- ``shape``: ``night + (1 - night) * ((1 + cos(2 pi (hour - peak_hour) / 24)) / 2) ** sharpness``, times ``weekend`` on Saturdays
  and Sundays, divided by its mean over a week. The defaults put a weekday's peak at 1.7 and its trough at 0.5 of the mean, about
  what is told of a conversation service's week (DynamoLLM section 3: peak 1.7 times the mean and 3.3 times the trough).
- ``noise``: two log-normal autoregressions of mean 1. The published conversation hour counts 2.5 times the variance of a Poisson
  process in windows of 5 s, 3.9 in 10 s, 16 in 60 s and 56 in 300 s; the defaults give about the same.
- ``burst``: ``1 + burst_gain`` for an exponential time of mean ``burst_s``, ``bursts_per_hour`` times an hour.

Arrivals are a Poisson process of that rate. Lengths are drawn together (prompt and answer of one real request), with weights
``exp(drift * cos(2 pi (hour - 3) / 24) * z)``, z the standardised logarithm of the answer: answers are longer at night.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from powerd.sim.replay.trace import WEEK_S, Trace

DAY_S: Final = 86_400.0
WEEKEND_S: Final = 5 * DAY_S


@dataclass(frozen=True, slots=True)
class Shape:
    """How load goes up and down; see the module's text for each."""

    requests_per_s: float = 5.5  # mean over a week
    night: float = 0.29
    peak_hour: float = 14.5
    sharpness: float = 1.2
    weekend: float = 0.8
    slow_sigma: float = 0.15
    slow_s: float = 600.0
    quick_sigma: float = 0.18
    quick_s: float = 25.0
    bursts_per_hour: float = 0.5
    burst_s: float = 60.0
    burst_gain: float = 0.4
    drift: float = 0.2

    def expected(self, week_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Expected requests/s at seconds of the week."""
        return np.asarray(self.requests_per_s * self._raw(week_s) / self._raw(np.arange(0.0, WEEK_S, 60.0)).mean(), dtype=float)

    def _raw(self, week_s: NDArray[np.float64]) -> NDArray[np.float64]:
        hour = week_s % DAY_S / 3600
        day = ((1 + np.cos(2 * np.pi * (hour - self.peak_hour) / 24)) / 2) ** self.sharpness
        return np.asarray((self.night + (1 - self.night) * day) * np.where(week_s % WEEK_S >= WEEKEND_S, self.weekend, 1.0))


def generate(lengths: Trace, length_s: float, seed: int, shape: Shape | None = None, begin_week_s: float = 0.0) -> Trace:
    """Return ``length_s`` seconds of requests that begin at that second of the week, with lengths of ``lengths``."""
    shape = shape or Shape()
    dice = np.random.default_rng([seed, 0x5EED])
    seconds = np.arange(np.ceil(length_s), dtype=np.float64)
    rate = shape.expected(begin_week_s + seconds) * _noise(dice, len(seconds), shape) * _bursts(dice, len(seconds), shape)
    counts = dice.poisson(rate)
    arrival_s = np.sort(np.repeat(seconds, counts) + dice.random(counts.sum()))
    arrival_s = arrival_s[arrival_s < length_s]
    rows = _drawn(dice, lengths, ((begin_week_s + arrival_s) % DAY_S // 3600).astype(int), shape.drift)
    name = f"generated-{length_s / DAY_S:g}d-seed{seed}"
    return Trace(
        name, arrival_s, lengths.prompt_tokens[rows], lengths.output_tokens[rows], begin_week_s % WEEK_S, float(length_s)
    )


def _noise(dice: np.random.Generator, count: int, shape: Shape) -> NDArray[np.float64]:
    """Log-normal, of mean 1, correlated over ``slow_s`` and ``quick_s``."""
    total = np.zeros(count)
    for sigma, tau_s in ((shape.slow_sigma, shape.slow_s), (shape.quick_sigma, shape.quick_s)):
        total += sigma * _autoregression(dice, count, np.exp(-1 / tau_s)) - sigma**2 / 2
    return np.exp(total)


def _autoregression(dice: np.random.Generator, count: int, keep: float) -> NDArray[np.float64]:
    from scipy.signal import lfilter

    steps = dice.standard_normal(count) * np.sqrt(1 - keep**2)
    steps[:1] /= np.sqrt(1 - keep**2)
    return np.asarray(lfilter([1.0], [1.0, -keep], steps))


def _bursts(dice: np.random.Generator, count: int, shape: Shape) -> NDArray[np.float64]:
    gain = np.ones(count)
    for _ in range(dice.poisson(shape.bursts_per_hour * count / 3600)):
        begin, length = dice.integers(count), dice.exponential(shape.burst_s)
        gain[begin : begin + max(1, round(length))] += shape.burst_gain
    return gain / (1 + shape.burst_gain * shape.bursts_per_hour * shape.burst_s / 3600)


def _drawn(dice: np.random.Generator, lengths: Trace, hours: NDArray[np.int64], drift: float) -> NDArray[np.int64]:
    """Rows of ``lengths``, one for each hour of day, answers longer at night."""
    logs = np.log(lengths.output_tokens)
    z = (logs - logs.mean()) / (logs.std() or 1.0)
    rows = np.zeros(len(hours), dtype=np.int64)
    for hour in range(24):
        here = np.flatnonzero(hours == hour)
        weights = np.cumsum(np.exp(drift * np.cos(2 * np.pi * (hour - 3) / 24) * z))
        rows[here] = np.searchsorted(weights, dice.random(len(here)) * weights[-1], side="right")
    return np.minimum(rows, len(lengths) - 1)
