"""Where the saving comes from: one thing taken away, or known, at a time.

House rules: each row changes one thing of the reference; nothing but the change differs, the requests least of all; an oracle is
named as one and is in no other figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.dynamollm.study import BASE, FULL, worst_class
from benchmarks.dynamollm.traces import Case, full_load, prepared, without
from benchmarks.report import Progress, Table
from powerd.sim.replay import compare
from powerd.sim.replay.compare import Comparison
from powerd.sim.replay.scenario import Scenario
from powerd.sim.replay.workload import Workload
from powerd_policies.dynamollm import policies as dynamollm
from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.fleet import ClassLoad
from powerd_policies.dynamollm.knobs import POLICIES
from powerd_policies.dynamollm.predictor import Injected, Rate

BIN_S = 60.0


class Foreseen:
    """A forecast that knows the trace: what perfect prediction of load would be worth."""

    def __init__(self, workload: Workload) -> None:
        requests, bins = workload.requests, int(np.ceil(workload.length_s / BIN_S)) + 1
        cell = (requests.arrival_s // BIN_S).astype(int) * len(NAMES) + requests.true_class
        weights = (None, requests.prompt_tokens, requests.output_tokens)
        counts = [np.bincount(cell, w, bins * len(NAMES)).reshape(bins, -1) / BIN_S for w in weights]
        self._rates = np.stack(counts, axis=-1)

    def observe(self, now_s: float, window_s: float, arrivals: Mapping[str, ClassLoad]) -> None:
        """It has nothing to learn."""

    def peak(self, from_s: float, to_s: float) -> dict[str, Rate]:
        """Return each class's highest minute of what comes."""
        first = min(int(from_s // BIN_S), len(self._rates) - 1)
        top = self._rates[first : max(first + 1, int(np.ceil(to_s / BIN_S)))].max(axis=0)
        return {name: Rate(*map(float, top[n])) for n, name in enumerate(NAMES)}


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is different."""

    what: str
    scenario: Callable[[Scenario], Scenario] = lambda s: s
    comparison: Callable[[Comparison], Comparison] = lambda c: c
    policy: str = FULL


def _knobs(**changes: Any) -> Callable[[Comparison], Comparison]:
    knobs = replace(POLICIES[FULL], **changes)
    return lambda c: replace(c, known=replace(c.known, knobs={FULL: knobs}))


def _forecast(c: Comparison, injected: Injected | None, history: bool = True) -> Comparison:
    known = c.known
    rows = known.history if history else ()
    return replace(
        c,
        known=replace(known, predictor=lambda: dynamollm.forecaster(epoch_s=known.begin_week_s, history=rows, injected=injected)),
    )


COSTS_OFF = dict.fromkeys(
    ("cached_weights", "snapshot", "background_start", "weights_in_memory", "matching", "overlap", "resident_nvml"), False
)

CHANGES = (
    Change("SinglePool", policy=BASE),
    Change("all of it"),
    Change("the paper's way: nine pools, levels that assume the highest clock",
           comparison=lambda c: replace(c, known=replace(c.known, knobs={FULL: POLICIES["dynamollm-paper"]}))),
    Change("without choosing the number of instances", comparison=_knobs(instances=False)),
    Change("without choosing tensor parallelism", comparison=_knobs(shards=False)),
    Change("without choosing clocks", comparison=_knobs(clocks=False)),
    Change("one pool only", comparison=_knobs(partitions=("one",))),
    Change("without the emergency ladder", comparison=_knobs(ladder=False)),
    Change("without parking", scenario=lambda s: without(s, "parking", enabled=False)),
    Change("without the paper's fixes of overheads", scenario=lambda s: without(s, "costs", **COSTS_OFF)),
    Change("answers' lengths: 60 % right (noisy oracle)",
           scenario=lambda s: without(s, "forecast", output_length="noisy", output_accuracy=0.6)),
    Change("answers' lengths: 80 % right (noisy oracle)",
           scenario=lambda s: without(s, "forecast", output_length="noisy", output_accuracy=0.8)),
    Change("answers' lengths: oracle", scenario=lambda s: without(s, "forecast", output_length="oracle")),
    Change("load: no history", comparison=lambda c: _forecast(c, None, history=False)),
    Change("load: forecasts 15 % too low", comparison=lambda c: _forecast(c, Injected(bias=-0.15))),
    Change("load: forecasts 15 % too high", comparison=lambda c: _forecast(c, Injected(bias=0.15))),
    Change("load: forecasts off by 20 % (log-normal)", comparison=lambda c: _forecast(c, Injected(spread=0.2, seed=3))),
    Change("load: oracle",
           comparison=lambda c: replace(c, known=replace(c.known, predictor=lambda: Foreseen(c.workload)))),
)  # fmt: skip


def table(cases: list[Case], scenario: Scenario, progress: Progress) -> Table:
    """Return the saving at load 1.0 of every change, of each case."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for c, case in enumerate(cases):
        load = full_load(case, scenario)
        for n, change in enumerate(CHANGES):
            comparison = change.comparison(prepared(case, load, change.scenario(scenario)))
            entries[change.what, case.name] = compare.one(change.policy, comparison).entry
            progress((c + (n + 1) / len(CHANGES)) / len(cases))
    header = ["what"]
    for case in cases:
        header += [f"{case.name}: saving", "in SLO", "worst class", "GPU-hours"]
    rows = []
    for change in CHANGES:
        cells = [change.what]
        for case in cases:
            entry, base = entries[change.what, case.name], entries[CHANGES[0].what, case.name]
            worst, share = worst_class(entry)
            saved = f"{1 - entry['energy_kwh'] / base['energy_kwh']:.1%}"
            cells += [saved, f"{entry['slo_attainment']:.2%}", f"{worst} {share:.1%}", f"{entry['gpu_hours']:.4g}"]
        rows.append(tuple(cells))
    return Table(tuple(header), tuple(rows))
