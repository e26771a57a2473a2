"""A policy's name -> its controller and what it may know; the only place where names of policies become objects.

House rules: what a controller knows beforehand is in ``Known`` and was so before the trace began; parking belongs to the clock
knob: policies that set no clocks do not park.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from powerd.errors import RequestError
from powerd.sim.cluster import ClusterConfig
from powerd.sim.replay import report, search
from powerd.sim.replay.runner import Setting, replay
from powerd.sim.replay.scenario import Scenario
from powerd.sim.replay.trace import WEEK_S, Trace
from powerd.sim.replay.workload import Observed, Workload, observations
from powerd_policies.dynamollm import policies as dynamollm
from powerd_policies.dynamollm import splitphases
from powerd_policies.dynamollm.capacity import Capacity, Lengths, measured, scaled
from powerd_policies.dynamollm.classes import NAMES, Classes
from powerd_policies.dynamollm.controller import Predictor
from powerd_policies.dynamollm.fleet import FleetController
from powerd_policies.dynamollm.knobs import Knobs
from powerd_policies.dynamollm.overheads import Fixes, Overheads
from powerd_policies.dynamollm.predictor import Rate

POLICIES: Final = ("singlepool", "multipool", "scaleinst", "scaleshard", "scalefreq", "beststatic", "dynamollm", splitphases.NAME)
PARKING: Final = ("scalefreq", "dynamollm", splitphases.NAME)
PEAK_WINDOW_S: Final = 60.0
PEAK_SURE: Final = 0.9  # of the busiest minutes: a hundredth of all requests may miss
LIKELY: Final = 1.15  # kinds of fixed fleets that a closed form puts above so many times the best are not simulated


@dataclass(frozen=True, slots=True)
class Built:
    """A policy, ready to run; ``fleet`` says which fixed fleet a search found."""

    controller: FleetController
    config: ClusterConfig
    fleet: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What is known before the first request."""

    past: Trace  # whose lengths are known
    history: tuple[Observed, ...] = ()  # times before 0 of the trace
    begin_week_s: float = 0.0  # when in the week the trace begins
    predictor: Callable[[], Predictor] | None = None  # for studies of what forecasts are worth: another for each controller
    knobs: Mapping[str, Knobs] = field(default_factory=dict)  # for studies: in place of a policy's own


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


def build(name: str, scenario: Scenario, workload: Workload, setting: Setting, known: Known) -> Built:
    """Return a policy's fresh controller and the cluster as it has it."""
    config = setting.config
    if name in PARKING and scenario.parking.enabled:
        config = replace(config, park_after_s=scenario.parking.after_s, park_clock_mhz=scenario.parking.clock_mhz or None)
    if name == "beststatic":
        best = best_static(workload, setting, known)
        lacks = (
            "" if best.feasible else f" (no fixed fleet of {setting.gpus} GPUs keeps {search.KEPT:.0%} in SLO; this keeps most)"
        )
        return Built(controller(best.fleet, setting, name), config, f"{best.fleet}{lacks}")

    def predictor() -> Predictor:
        if known.predictor is not None:
            return known.predictor()
        return dynamollm.forecaster(epoch_s=known.begin_week_s, history=known.history)

    taught, chunk_tokens, costs = lengths(setting.classes, known.past), config.chunk_tokens, overheads(scenario)
    if name == splitphases.NAME:
        try:
            apart = splitphases.SplitPhases(
                setting.model, setting.classes, setting.gpus, predictor, lengths=taught, chunk_tokens=chunk_tokens,
                overheads=costs, links=config.links, knobs=known.knobs.get(name, splitphases.KNOBS),
            )  # fmt: skip
        except ValueError as error:
            raise RequestError(str(error), hint="leave this policy out, or give it more GPUs", code="bad_value") from None
        return Built(apart, config)
    fleet = dynamollm.build(
        name, model=setting.model, classes=setting.classes, gpus=setting.gpus, lengths=taught, chunk_tokens=chunk_tokens,
        overheads=costs, predictor=predictor(), knobs=known.knobs.get(name),
    )  # fmt: skip
    return Built(fleet, config)


def single_pool(setting: Setting, tp: int) -> FleetController:
    """Return the state of practice: every node one instance at the highest clock."""
    return controller(search.Fixed(tp, setting.gpus // tp, setting.model.clocks_mhz(tp)[0]), setting, "singlepool")


def controller(fleet: search.Fixed, setting: Setting, name: str = "fixed") -> FleetController:
    """Return the controller that keeps a fixed fleet."""
    return dynamollm.static(
        fleet.tp, fleet.count, fleet.clock_mhz, model=setting.model, classes=setting.classes, name=name
    )  # fmt: skip


def lengths(classes: Classes, past: Trace) -> dict[str, Lengths]:
    """Return what a past trace says of each class; of a long one, of every so many requests."""
    some = past.thinned(20_000)
    return measured(classes, zip(some.prompt_tokens.tolist(), some.output_tokens.tolist(), strict=True))


def best_static(workload: Workload, setting: Setting, known: Known) -> search.Tried:
    """Return the cheapest fixed fleet that keeps the promises on this very workload: it may look ahead, nobody else does.

    Where none does, the one that keeps most of them, which is not ``feasible``.
    """
    by_class = Counter(workload.requests.true_class.tolist())
    requests, length_s = workload.requests, workload.length_s
    demand = {}
    for n, count in by_class.items():
        here = requests.true_class == n
        prompt, output = (int(tokens[here].sum()) / length_s for tokens in (requests.prompt_tokens, requests.output_tokens))
        demand[NAMES[n]] = Rate(count / length_s, prompt, output)
    capacity = Capacity(setting.model, setting.classes, lengths(setting.classes, known.past), setting.config.chunk_tokens)
    bins = np.bincount((requests.arrival_s // PEAK_WINDOW_S).astype(int))
    peak = scaled(demand, PEAK_SURE * float(np.percentile(bins, 99)) / PEAK_WINDOW_S / (len(requests) / length_s))
    kinds = []
    for tp in setting.model.tps:
        for clock_mhz in setting.model.clocks_mhz(tp):
            if least := capacity.least(tp, clock_mhz, peak, setting.gpus // tp):
                kinds.append((capacity.serve(tp, clock_mhz, least, demand).power_w, tp, clock_mhz, least))
    likely = [kind[1:] for kind in sorted(kinds) if kind[0] <= LIKELY * min(kinds)[0]]
    if not likely:  # the closed form is careful: whether full clocks do it after all is for the simulator to say
        likely = [(tp, setting.model.clocks_mhz(tp)[0], setting.gpus // tp) for tp in setting.model.tps]

    def judge(fleet: search.Fixed) -> search.Tried:
        outcome = replay(controller(fleet, setting), workload, setting)
        kept, _ = report.attainment(outcome, workload, setting.classes)
        return search.Tried(fleet, kept, outcome.results.total_j / report.J_PER_KWH)

    best, tried = search.cheapest(judge, likely, setting.gpus)
    return best or max(tried, key=lambda each: each.kept)
