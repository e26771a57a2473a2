"""What an instance costs and keeps at a load: (class, tensor parallelism, SM clock, requests/s) -> energy, TTFT, TBT, power.

House rules: between measured points values are interpolated by a labelled additive model; beyond them the answer is
"not covered", never a guess; an infeasible point says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Source = Literal["measured", "modelled", "interpolated"]


class NotCoveredError(LookupError):
    """The profile does not hold what was asked; the message says what it holds."""


@dataclass(frozen=True, slots=True)
class ProfilePoint:
    """One instance that serves ``requests_per_s`` of one class; power is of the whole instance (all its GPUs)."""

    request_class: str
    tp: int
    clock_mhz: int
    requests_per_s: float
    energy_per_request_j: float
    ttft_p99_s: float
    tbt_p99_s: float
    power_w: float
    feasible: bool
    source: Source = "measured"
