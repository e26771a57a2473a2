"""A controller that does what a test says, and reports as routers and replicas send them."""

from __future__ import annotations

from powerd_integrations.fleet.handover import Limits
from powerd_integrations.fleet.observed import Arrivals
from powerd_integrations.fleet.planner import LivePlanner, PlannerOptions
from powerd_integrations.fleet.published import Group
from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.fleet import ClassLoad, FleetPlan, FleetState, InstanceLoad, InstanceState, InstanceWant

LL8 = Group("LL", 8)


class Scripted:
    """Wants ``counts``; remembers what it was shown; raises ``error`` when there is one."""

    name = "scripted"
    period_s = 5.0

    def __init__(self, **counts: int) -> None:
        self.counts = {LL8: counts.get("ll8", 1)}
        self.seen: list[FleetState] = []
        self.error: Exception | None = None
        self.resteered: frozenset[str] = frozenset()

    def decide(self, state: FleetState) -> FleetPlan:
        self.seen.append(state)
        if self.error is not None:
            raise self.error
        wants = tuple(InstanceWant(None, g.pool, g.tp, 1410) for g, count in self.counts.items() for _ in range(count))
        late = self.resteered | {"i2"}
        return FleetPlan(wants, dict.fromkeys(NAMES, ("LL",)), shed={"i1": 2.5}, reordered=late, resteered=self.resteered)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


def planner(controller: Scripted, clock: Clock, **options: object) -> LivePlanner:
    """A planner of 96 GPUs on the test's clock."""
    built = PlannerOptions(Limits(96, settle_s=1.0), stale_after_s=10.0, gone_after_s=15.0)
    return LivePlanner(controller, built, groups={LL8: (0, 12)}, now_s=clock, unix_s=lambda: 1e9 + clock.s, **options)  # type: ignore[arg-type]


def report(sequence: int, requests: int = 0, router: str = "r1") -> Arrivals:
    """A router's report of ML requests."""
    return Arrivals(router, sequence, {"ML": ClassLoad(requests, 500 * requests, 400 * requests)} if requests else {})


def replica(name: str, age_s: float = 0.0, group: Group = LL8) -> InstanceState:
    """A replica that serves."""
    return InstanceState(name, group.pool, group.tp, 1410, load=InstanceLoad(running=3, age_s=age_s))
