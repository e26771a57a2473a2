"""A clock plan and a powerd that holds the setpoint below which it may run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from powerd.model import ClockPlan, Control, Interval
from tests.hw.rig import Powerd, Rig

CLOCKS = (1980, 1200, 900, 600)
SAFE = 1500
CEILING = Interval(210, 1980)


def plan_for(rig: Rig, *, gpu: int = 0, **other: Any) -> ClockPlan:
    plan = ClockPlan("p1", rig.uuids[gpu], CLOCKS, SAFE, iteration_s=600.0)
    return replace(plan, **other)


def held(rig: Rig, ceiling: Interval = CEILING, **more: Any) -> Powerd:
    """A powerd whose first GPU's SM clock is wanted below a ceiling."""
    powerd = rig.connect()
    seq = powerd.desire((rig.uuids[0], Control.SM_CLOCK, ceiling), **more)
    powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK)
    return powerd


def served(rig: Rig, ceiling: Interval = CEILING, **more: Any) -> Powerd:
    rig.serve()
    return held(rig, ceiling, **more)
