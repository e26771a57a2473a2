"""What a fleet controller may turn, and the published policies as settings of it.

House rules: one frozen dataclass; every policy is a row of one table; a knob that is off leaves what it would set at the state of
practice: one pool, all GPUs, tensor parallelism 8, the highest clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from powerd_policies.dynamollm.optimizer import Weights
from powerd_policies.dynamollm.pace import Pace


@dataclass(frozen=True, slots=True)
class Knobs:
    """Everything a controller can be told; times in seconds, shares of 1."""

    instances: bool = False  # how many (ScaleInst)
    shards: bool = False  # their tensor parallelism (ScaleShard)
    clocks: bool = False  # their SM clocks (ScaleFreq)
    partitions: tuple[str, ...] = ("one",)  # of fragments.PARTITIONS; the cheapest of them is taken
    joint: bool = (
        True  # clock, parallelism and count are chosen together; False: upper levels assume the highest clock (the paper)
    )
    tp: int = 8  # where it is not chosen
    cluster_s: float = 1800.0  # pools and their share of the GPUs
    pool_s: float = 300.0  # counts and parallelism
    period_s: float = 5.0  # clocks; and whether load has outgrown the plan
    share_late: float = 0.005  # of all requests may miss by plan
    tbt_margin: float = 0.985  # of the TBT is planned with
    burst: float = 1.1  # times the predicted peak is what the fleet must hold at the highest clock
    clock_margin: float = 1.0  # times the recent load is what clocks are chosen for
    fast_s: float = 20.0  # the recent load, for clocks
    surge_s: float = 30.0  # and for outgrown plans
    ahead_s: float = 60.0  # how far beyond a start the pools look: what comes later can still be started for
    outgrown: float = 1.05  # times the recent load that the highest clocks no longer hold: decided at once
    trend: float = 0.5  # of a rise within the last minute is expected once more
    young_s: float = 60.0  # without a history, load seen for t seconds may be a trough: 1 + young_s / t times it is held
    surge_margin: float = 1.1  # times the recent load is held at least
    horizon_s: float = 600.0  # a change has to pay for itself within
    merge_gain: float = 0.03  # another partition must save this share of the power
    dwell_s: float = 10.0  # before a clock goes down
    warmup_s: float = 30.0  # without a forecast, all GPUs stay on for this long
    pairs: int = 4  # re-shards at a time at most
    ladder: bool = False  # emergencies: reorder, highest clock, re-steer, reject
    backs_off: bool = False  # whatever falls short of its promises, by plan or as measured, is given more than the model asks for
    pace: Pace | None = None  # answers are written as fast as they are read: tightens the TBT
    budget_w: float | None = None  # for all GPUs of the fleet
    budget_strict: bool = False  # it holds at every moment, by the most that a clock can draw; False: for the mean of seconds
    weights: Weights = field(default_factory=Weights)
    usd_per_gpu_hour: float | None = None  # with a price of energy: GPUs that are off save this too
    usd_per_kg_carbon: float | None = None  # with a carbon signal: added to the price of energy

    @property
    def fixed(self) -> bool:
        """Whether nothing is ever changed."""
        return not (self.instances or self.shards or self.clocks)


_ALL: Final = ("one", "prompt", "output", "nine")

POLICIES: Final[Mapping[str, Knobs]] = {
    "singlepool": Knobs(),
    "multipool": Knobs(partitions=("nine",)),
    "scaleinst": Knobs(instances=True),
    "scaleshard": Knobs(shards=True),
    "scalefreq": Knobs(clocks=True),
    "dynamollm": Knobs(instances=True, shards=True, clocks=True, ladder=True, backs_off=True, partitions=_ALL),
    "dynamollm-paper": Knobs(instances=True, shards=True, clocks=True, ladder=True, partitions=("nine",), joint=False),
}
