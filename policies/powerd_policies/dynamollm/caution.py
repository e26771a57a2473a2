"""Backing off: gaps measured above the promise make every load be reckoned higher than it is, until they are forgotten.

House rules: pure; what engines measured beats what a model says of them; one instance's bad half minute may be chance, a quarter
of them at a time is not; what is not measured is no miss. Only gaps count: they follow from the fleet and its load. First tokens
that come late are a wave of arrivals, which passes, and which the controller sees in the arrivals themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from powerd_policies.dynamollm.classes import Slo
from powerd_policies.dynamollm.fleet import InstanceLoad, InstanceState

MANY: Final = 0.25  # of the instances that serve: from here on it is the fleet that misses
STEP: Final = 0.05  # of the load is added at each look at which all miss, a part of it where some do
MOST: Final = 0.25  # of the load is added at most
HALF_LIFE_S: Final = 900.0  # of what was added, once misses are few


def missed(load: InstanceLoad, slo: Slo) -> bool:
    """Whether the P99 of an instance's gaps of late is above what is promised; what is not known is not."""
    return load.tbt_p99_s is not None and load.tbt_p99_s > slo.tbt_s


class Caution:
    """How much more than the load a fleet is reckoned to need, by what it missed of its promises."""

    def __init__(self) -> None:
        self.share = 0.0

    @property
    def factor(self) -> float:
        """Times the load; 1.0 as long as nothing was missed."""
        return 1.0 + self.share

    def see(self, window_s: float, instances: Iterable[InstanceState], slos: Mapping[str, Slo]) -> None:
        """Look at what the instances measured; ``slos`` by pool, of ``window_s`` seconds since the last look."""
        serving = [i for i in instances if i.phase == "serving"]
        late = sum(missed(i.load, slos[i.pool]) for i in serving) / len(serving) if serving else 0.0
        if late >= MANY:
            self.share = min(MOST, self.share + STEP * late)
        else:
            self.share *= 0.5 ** (window_s / HALF_LIFE_S)
