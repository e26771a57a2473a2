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
        p = self.prices
        return _daily(hours, p.carbon_mean_g_per_kwh, p.carbon_midday_dip, p.carbon_evening_rise)


@dataclass(frozen=True, slots=True)
class EnergyPrice:
    """USD/kWh by time of day; ``begin_week_s`` is the second of the week at time 0."""

    prices: PricesSection
    begin_week_s: float = 0.0

    @classmethod
    def of(cls, prices: PricesSection, begin_week_s: float = 0.0) -> EnergyPrice | None:
        """Return the scenario's price; None where it states none."""
        return cls(prices, begin_week_s) if prices.energy_mean_usd_per_kwh > 0 else None

    def at(self, now_s: float) -> float:
        """Return the price at a moment."""
        return float(self.over(np.array([now_s]))[0])

    def over(self, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the price at each time."""
        hours = (times_s + self.begin_week_s) / 3600 + self.prices.utc_offset_h
        p = self.prices
        return _daily(hours, p.energy_mean_usd_per_kwh, p.energy_midday_dip, p.energy_evening_rise)


def _daily(hours: NDArray[np.float64], mean: float, dip: float, rise: float) -> NDArray[np.float64]:
    """Return the curve of a day with this mean."""

    def raw(hours: NDArray[np.float64]) -> NDArray[np.float64]:
        midday = dip * _bump(hours, _MIDDAY_H, _MIDDAY_WIDTH_H)
        return np.asarray(1 - midday + rise * _bump(hours, _EVENING_H, _EVENING_WIDTH_H))

    return np.asarray(mean * raw(hours) / float(raw(np.arange(0.0, 24.0, 0.05)).mean()))


def _bump(hours: NDArray[np.float64], centre_h: float, width_h: float) -> NDArray[np.float64]:
    away = (hours - centre_h + 12) % 24 - 12
    return np.asarray(np.exp(-((away / width_h) ** 2)))
