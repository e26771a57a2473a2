"""The online profiler's walk through the clocks: from the highest down, until energy has only risen for a while.

House rules: pure; every rank walks the same way because every rank hears the same sheets; a clock that could not be measured is
tried again, then left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from powerd_integrations.pipeline.measured import Profile, Sheet, collapse

ATTEMPTS = 3


def ladder(tables: Sequence[Sequence[int]], stride: int, lowest_mhz: int | None, highest_mhz: int | None) -> tuple[int, ...]:
    """The clocks to measure, descending: those that all GPUs have, every ``stride``-th from the top, within the bounds."""
    common = set(tables[0]).intersection(*tables[1:]) if tables else set()
    usable = sorted((c for c in common if (lowest_mhz or 0) <= c <= (highest_mhz or c)), reverse=True)
    return tuple(usable[::stride])


class Sweep:
    """Which clock is next; ``take`` tells it what all ranks measured at one."""

    def __init__(
        self, clocks: Sequence[int], rises: int = 5, profile: Profile | None = None, blocking_power_w: float | None = None
    ) -> None:
        self.profile = profile or Profile()
        self._rises = rises
        self._blocking_power_w = blocking_power_w
        self._attempts: dict[int, int] = {}
        self._told: dict[int, list[Sheet]] = {}  # by every rank, by clock
        self._left = [mhz for mhz in sorted(clocks, reverse=True) if mhz not in self.profile.sheets]
        self._stopped = bool(self.profile.sheets) and self._risen_in_profile()
        self.retries = 0

    @property
    def next_mhz(self) -> int | None:
        """The clock to measure now; None: the walk is over."""
        return None if self._stopped or not self._left else self._left[0]

    @property
    def done(self) -> bool:
        """Whether everything worth measuring is."""
        return self.next_mhz is None

    def after(self, mhz: int) -> int | None:
        """The clock that comes next if this one is measured well; None: it is the last."""
        rest = [clock for clock in self._left if clock != mhz]
        return None if self._stopped or not rest else rest[0]

    def take(self, mhz: int, sheets: Sequence[Sheet | None]) -> bool:
        """The sheets of all ranks at one clock, None from a rank that could not measure; whether the clock is done with."""
        whole = [sheet for sheet in sheets if sheet is not None and sheet.rows]
        if len(whole) < len(sheets):
            self.retries += 1
            self._attempts[mhz] = self._attempts.get(mhz, 0) + 1
            if self._attempts[mhz] < ATTEMPTS:
                return False
            self._left = [clock for clock in self._left if clock != mhz]
            return True
        self._left = [clock for clock in self._left if clock != mhz]
        self.profile.sheets[mhz] = collapse(whole)
        self._told[mhz] = whole
        self._stopped = self._risen(self._told)
        return True

    def _energy(self, sheet: Sheet, watts: float) -> float:
        """What the work costs beyond waiting for as long: clocks below its minimum are dominated."""
        return sum(row.energy_j - watts * row.time_s for row in sheet.rows)

    def _risen(self, told: Mapping[int, Sequence[Sheet]]) -> bool:
        """Whether every rank's energy rose at each of the last clocks."""
        last = sorted(told)[: self._rises + 1]  # the lowest clocks are the newest
        if len(last) <= self._rises:
            return False
        watts = self._blocking_power_w or self.profile.blocking_power_w or 0.0
        columns = zip(*([self._energy(sheet, watts) for sheet in told[mhz]] for mhz in reversed(last)), strict=True)
        return all(all(b > a for a, b in pairwise(column)) for column in columns)

    def _risen_in_profile(self) -> bool:
        """The same of a kept profile, stage by stage: what ranks measured singly is not kept."""
        stages = sorted({row.stage for row in self.profile.rows})
        told = {
            mhz: [Sheet(mhz, tuple(row for row in sheet.rows if row.stage == stage)) for stage in stages]
            for mhz, sheet in self.profile.sheets.items()
        }
        return self._risen(told)
