"""Carbon intensity and price of electricity over the day, as a grid with much sun has them: low at midday, high in the evening.

House rules: the shape is assumed (after California's "duck" curve) and its parameters are the scenario's; the mean over a day is
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
class Daily:
    """A figure by time of day, in the unit of its ``mean``; ``begin_week_s`` is the second of the week at time 0."""

    mean: float
    midday_dip: float
    evening_rise: float
    utc_offset_h: float
    begin_week_s: float

    def at(self, now_s: float) -> float:
        """Return it at a moment."""
        return float(self.over(np.array([now_s]))[0])

    def over(self, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return it at each time."""
        raw = self._raw((times_s + self.begin_week_s) / 3600 + self.utc_offset_h)
        return np.asarray(self.mean * raw / float(self._raw(np.arange(0.0, 24.0, 0.05)).mean()))

    def _raw(self, hours: NDArray[np.float64]) -> NDArray[np.float64]:
        midday = self.midday_dip * _bump(hours, _MIDDAY_H, _MIDDAY_WIDTH_H)
        return np.asarray(1 - midday + self.evening_rise * _bump(hours, _EVENING_H, _EVENING_WIDTH_H))


def carbon(prices: PricesSection, begin_week_s: float = 0.0) -> Daily:
    """Return the scenario's carbon intensity, g/kWh."""
    p = prices
    return Daily(p.carbon_mean_g_per_kwh, p.carbon_midday_dip, p.carbon_evening_rise, p.utc_offset_h, begin_week_s)


def energy_price(prices: PricesSection, begin_week_s: float = 0.0) -> Daily | None:
    """Return the scenario's price of electricity, USD/kWh; None where it states none."""
    p = prices
    if p.energy_mean_usd_per_kwh <= 0:
        return None
    return Daily(p.energy_mean_usd_per_kwh, p.energy_midday_dip, p.energy_evening_rise, p.utc_offset_h, begin_week_s)


def _bump(hours: NDArray[np.float64], centre_h: float, width_h: float) -> NDArray[np.float64]:
    away = (hours - centre_h + 12) % 24 - 12
    return np.asarray(np.exp(-((away / width_h) ** 2)))
