"""A fleet that never changes: what searches try, and what everything else is compared with.

House rules: it looks at the state only to recognise its own instances; nothing is parked.
"""

from __future__ import annotations

from dataclasses import dataclass

from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.fleet import FleetPlan, FleetState, InstanceWant

POOL = "all"


@dataclass(frozen=True, slots=True)
class FixedFleet:
    """``count`` instances of one tensor parallelism at one clock in one pool; a fleet controller."""

    tp: int
    count: int
    clock_mhz: int
    name: str = "fixed"
    period_s: float = 300.0

    def decide(self, state: FleetState) -> FleetPlan:
        """Return the same fleet whatever the state."""
        ids: list[str | None] = [instance.id for instance in state.instances if instance.phase != "draining"]
        ids = (ids + [None] * self.count)[: self.count]
        wants = tuple(InstanceWant(id, POOL, self.tp, self.clock_mhz, reason="fixed") for id in ids)
        return FleetPlan(wants, {name: (POOL,) for name in NAMES})

    def __str__(self) -> str:
        return f"{self.count} x TP{self.tp} at {self.clock_mhz} MHz"
