"""Carbon intensity over the day, as a grid with much sun has it: low at midday, high in the evening.

House rules: the shape is assumed (after California's "duck" curve) and its parameters are the scenario's; its mean over a day is
the stated one; nothing here is a forecast, so that a controller may read it at any time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from powerd.sim.replay.scenario import PricesSection

_MIDDAY_H, _MIDDAY_WIDTH_H = 12.5, 3.5
_EVENING_H, _EVENING_WIDTH_H = 20.0, 2.5


@dataclass(frozen=True, slots=True)
class Carbon:
    """g/kWh by time of day; ``begin_week_s`` is the second of the week at time 0."""

    prices: PricesSection
    begin_week_s: float = 0.0

    def at(self, now_s: float) -> float:
        """Return the intensity at a moment."""
        return float(self.over(np.array([now_s]))[0])

    def over(self, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the intensity at each time."""
        hours = (times_s + self.begin_week_s) / 3600 + self.prices.utc_offset_h
        raw, mean = self._raw(hours), float(self._raw(np.arange(0.0, 24.0, 0.05)).mean())
        return np.asarray(self.prices.carbon_mean_g_per_kwh * raw / mean)

    def _raw(self, hours: NDArray[np.float64]) -> NDArray[np.float64]:
        dip = self.prices.carbon_midday_dip * _bump(hours, _MIDDAY_H, _MIDDAY_WIDTH_H)
        return 1 - dip + self.prices.carbon_evening_rise * _bump(hours, _EVENING_H, _EVENING_WIDTH_H)


def _bump(hours: NDArray[np.float64], centre_h: float, width_h: float) -> NDArray[np.float64]:
    away = (hours - centre_h + 12) % 24 - 12
    return np.asarray(np.exp(-((away / width_h) ** 2)))
