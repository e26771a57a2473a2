"""Couples a fleet controller with the cluster simulator: decide, apply, advance, until the trace has ended.

House rules: every policy sees the same requests, batching, router and power model; a controller is given the state of now and
nothing that comes later; no clock is read here, time is the simulator's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from powerd.sim.cluster import Cluster, ClusterConfig, Results
from powerd.sim.replay.signals import Daily
from powerd.sim.replay.workload import Workload
from powerd_policies.dynamollm.classes import Classes
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import FleetController, FleetEvent, FleetState, Role

LAST_STEP_S: Final = 1.0
#: Told how many seconds of the trace are done.
Watch = Callable[[float], None]


@dataclass(slots=True)
class Timeline:
    """The fleet over time, for pictures: one row per sample."""

    time_s: list[float] = field(default_factory=list)
    instances: list[dict[int, int]] = field(default_factory=list)  # serving, by tensor parallelism
    clock_mhz: list[float] = field(default_factory=list)  # mean over the GPUs of serving instances
    roles: list[dict[Role, tuple[int, int]]] = field(default_factory=list)  # GPUs, and GPUs times MHz, of serving instances

    def add(self, state: FleetState) -> None:
        """Take a sample."""
        serving = [i for i in state.instances if i.phase != "starting"]
        gpus = sum(i.tp for i in serving)
        self.time_s.append(state.now_s)
        self.instances.append(dict(Counter(i.tp for i in serving)))
        self.clock_mhz.append(sum(i.clock_mhz * i.tp for i in serving) / gpus if gpus else 0.0)
        row: dict[Role, tuple[int, int]] = {}
        for i in serving:
            had, turned = row.get(i.role, (0, 0))
            row[i.role] = (had + i.tp, turned + i.tp * i.clock_mhz)
        self.roles.append(row)

    def sides(self) -> dict[str, dict[str, float]]:
        """Return mean GPUs and mean clock of those that prefill and of those that decode; empty where all do both."""
        found: dict[str, dict[str, float]] = {}
        for role in ("prefill", "decode"):
            rows = [row[role] for row in self.roles if role in row]
            if rows:
                gpus = sum(had for had, _ in rows)
                found[role] = {"gpus": gpus / len(self.roles), "clock_mhz": sum(turned for _, turned in rows) / gpus}
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What one policy made of a workload."""

    policy: str
    results: Results
    timeline: Timeline
    events: tuple[FleetEvent, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """What all policies of a comparison share beside the requests."""

    model: EngineModel
    classes: Classes
    config: ClusterConfig
    gpus: int
    carbon: Daily | None = None
    price: Daily | None = None
    sample_s: float = 60.0


def replay(
    controller: FleetController,
    workload: Workload,
    setting: Setting,
    watch: Watch = lambda done_s: None,
    config: ClusterConfig | None = None,
) -> Outcome:
    """Run one policy over a workload; ``config`` in place of the setting's where a policy has its own (parking)."""
    cluster = Cluster(
        setting.model, workload.requests, setting.classes, config or setting.config, gpus=setting.gpus, seed=workload.seed
    )
    timeline, events = Timeline(), list[FleetEvent]()
    now_s, sample_at_s, end_s = 0.0, 0.0, workload.length_s + cluster.config.horizon_s
    while now_s < end_s:
        state = cluster.state()
        if setting.carbon is not None:
            state = replace(state, carbon_g_per_kwh=setting.carbon.at(now_s))
        if setting.price is not None:
            state = replace(state, price_per_kwh=setting.price.at(now_s))
        if now_s >= workload.length_s and not _busy(state):
            break
        plan = controller.decide(state)
        events += plan.events
        events += cluster.apply(plan)
        if now_s >= sample_at_s and state.instances:
            timeline.add(state)
            sample_at_s += setting.sample_s
            watch(min(now_s, workload.length_s))
        # After the trace's end the fleet goes on until the last answer, but looks more often whether that was it.
        step_s = controller.period_s if now_s < workload.length_s else min(controller.period_s, LAST_STEP_S)
        until_s = workload.length_s if now_s < workload.length_s else end_s
        now_s = min(now_s + step_s, until_s)
        cluster.advance(now_s)
    watch(workload.length_s)
    return Outcome(controller.name, cluster.results(), timeline, tuple(events))


def _busy(state: FleetState) -> bool:
    return any(each.load.running or each.load.queued for each in state.instances)
