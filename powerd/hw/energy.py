"""From raw samples of one GPU to energy that may be subtracted: epochs, first-seen times, integration, doubt.

House rules: pure; the counter's own value is never corrected; a fall or an impossible jump begins a new epoch instead.
"""

from __future__ import annotations

from powerd.clock import NS
from powerd.hw.port import Fast
from powerd.model import EnergyMethod

_FROZEN_NS = 2 * NS  # no sensor period known is a tenth of this
_FROZEN_MJ = 20_000  # what must have been drawn meanwhile to call a resting counter frozen
_JUMP_FACTOR = 2.0  # of the highest limit: 1.4 x was seen in production within one window
_JUMP_SLACK_MJ = 50_000
_GAP_NS = 5 * NS  # a longer hole is not integrated over: nobody knows what was drawn in it


class EnergyTracker:
    """The energy of one GPU in one method; ``epoch`` rises whenever earlier values must not be subtracted from later ones."""

    def __init__(self, epoch: int, *, counter: bool, limit_mw: int | None, last_mj: int | None = None) -> None:
        self.method = EnergyMethod.COUNTER if counter else EnergyMethod.INTEGRATED
        self.epoch = epoch
        self.energy_mj: int | None = None
        self.energy_time_ns: int | None = None
        self.suspect = False
        self._limit_mw = limit_mw
        self._before_mj = last_mj  # of an earlier process in the same driver load
        self._expected_mj = 0.0
        self._time_ns: int | None = None
        self._power_mw: int | None = None
        self._integral_mj = 0.0

    def feed(self, now_ns: int, fast: Fast) -> None:
        """Take one sample."""
        power_mw = fast.power_mw if fast.power_mw is not None else fast.power_average_mw
        drawn_mj = 0.0
        if self._time_ns is not None and power_mw is not None:
            before_mw = power_mw if self._power_mw is None else self._power_mw
            drawn_mj = (before_mw + power_mw) / 2 * (now_ns - self._time_ns) / NS
        if self.method is EnergyMethod.COUNTER:
            if fast.energy_mj is not None:
                self._counter(now_ns, fast.energy_mj, drawn_mj)
        elif power_mw is not None:
            self._integrate(now_ns, drawn_mj)
        self._time_ns, self._power_mw = now_ns, power_mw

    def _counter(self, now_ns: int, energy_mj: int, drawn_mj: float) -> None:
        last_mj, self._before_mj = (self.energy_mj if self.energy_mj is not None else self._before_mj), None
        if last_mj is not None and (energy_mj < last_mj or self._impossible(now_ns, energy_mj)):
            self.epoch += 1
        if energy_mj != self.energy_mj:
            self.energy_mj, self.energy_time_ns = energy_mj, now_ns
            self._expected_mj, self.suspect = 0.0, False
            return
        self._expected_mj += drawn_mj
        resting_ns = now_ns - (self.energy_time_ns or now_ns)
        self.suspect = resting_ns > _FROZEN_NS and self._expected_mj > _FROZEN_MJ

    def _impossible(self, now_ns: int, energy_mj: int) -> bool:
        if self.energy_mj is None or self.energy_time_ns is None or self._limit_mw is None:
            return False
        bound_mj = _JUMP_FACTOR * self._limit_mw * (now_ns - self.energy_time_ns) / NS + _JUMP_SLACK_MJ
        return energy_mj - self.energy_mj > bound_mj

    def _integrate(self, now_ns: int, drawn_mj: float) -> None:
        if self._time_ns is not None and now_ns - self._time_ns > _GAP_NS:
            self.epoch += 1
            drawn_mj = 0.0
        self._integral_mj += max(0.0, drawn_mj)
        self.energy_mj, self.energy_time_ns = int(self._integral_mj), now_ns

    def restart(self) -> None:
        """The GPU was away: nothing before may be subtracted from anything after."""
        self.epoch += 1
        self.energy_mj = self.energy_time_ns = self._time_ns = self._power_mw = None
        self._expected_mj, self.suspect = 0.0, False
