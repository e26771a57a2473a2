"""A policy's name -> its controller and what it may know; the only place where names of policies become objects.

House rules: what a controller knows beforehand is in ``Known`` and was so before the trace began; parking belongs to the clock knob:
policies that set no clocks do not park.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from powerd.sim.cluster import ClusterConfig
from powerd.sim.replay.fixed import FixedFleet
from powerd.sim.replay.runner import Setting
from powerd.sim.replay.scenario import Scenario
from powerd.sim.replay.trace import WEEK_S, Trace
from powerd.sim.replay.workload import Observed, Workload, observations
from powerd_policies.dynamollm.fleet import FleetController
from powerd_policies.dynamollm.overheads import Fixes, Overheads

POLICIES: Final = ("singlepool", "multipool", "scaleinst", "scaleshard", "scalefreq", "beststatic", "dynamollm")
PARKING: Final = ("scalefreq", "dynamollm")


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What is known before the first request."""

    past: Trace  # whose lengths are known
    history: tuple[Observed, ...] = ()  # times before 0 of the trace
    begin_week_s: float = 0.0  # when in the week the trace begins


def known(scenario: Scenario, trace: Trace, history: Trace | None, past: Trace) -> Known:
    """Return what controllers may know; a history is moved before the trace by whole weeks, so that days and hours match."""
    if history is None:
        return Known(past, (), trace.begin_week_s)
    # From the history's own place in the week to the trace's, then back by as many weeks as the history takes.
    ahead_s = (history.begin_week_s - trace.begin_week_s) % WEEK_S
    weeks = -(-(ahead_s + history.length_s) // WEEK_S)
    shift_s = ahead_s - weeks * WEEK_S
    rows = tuple((at_s + shift_s, window_s, load) for at_s, window_s, load in observations(history, scenario.request_classes()))
    return Known(past, rows, trace.begin_week_s)


def overheads(scenario: Scenario) -> Overheads:
    """Return what changes cost under the scenario's fixes."""
    c = scenario.costs
    return Overheads(
        Fixes(
            c.cached_weights, c.snapshot, c.background_start, c.weights_in_memory, c.matching, c.overlap, c.resident_nvml
        )
    )  # fmt: skip


def cluster_config(scenario: Scenario) -> ClusterConfig:
    """Return how the simulated cluster behaves; nothing is parked."""
    costs = overheads(scenario)
    return ClusterConfig(
        chunk_tokens=scenario.engine.chunk_tokens,
        max_running=scenario.engine.max_running,
        start_s=costs.start_s(),
        reshard_s=costs.reshard_s(8, 4),
        clock_set_s=costs.clock_set_s,
        wake_s=2 * costs.clock_set_s,
        tick_s=scenario.run.tick_s,
        horizon_s=scenario.run.drain_limit_s,
    )


def build(
    name: str, scenario: Scenario, workload: Workload, setting: Setting, known: Known
) -> tuple[FleetController, ClusterConfig]:
    """Return a fresh controller and the cluster as this policy has it."""
    config = setting.config
    if name in PARKING and scenario.parking.enabled:
        config = replace(config, park_after_s=scenario.parking.after_s, park_clock_mhz=scenario.parking.clock_mhz or None)
    if name == "singlepool":
        return single_pool(setting, scenario.cluster.gpus_per_node), config
    raise NotImplementedError(name)


def single_pool(setting: Setting, tp: int) -> FixedFleet:
    """Return the state of practice: every node one instance at the highest clock."""
    return FixedFleet(tp, setting.gpus // tp, setting.model.clocks_mhz(tp)[0], "singlepool")
