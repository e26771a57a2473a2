"""What a plan really takes: iteration time and energy of one iteration, from the durations of its instructions and their clocks.

House rules: pure, numpy and a least-squares fit; four fitted numbers per job and not one more (``Model``), all else is measured;
a model is fitted on some runs and judged on others, never on its own.

Time is the longest path through the schedule's graph times one factor, which holds what the graph does not: sending activations,
launch gaps. Energy is what busy GPUs draw at their clock, up to the power they are capped at, and blocking power for the rest;
the gaps that stretch an instruction count as busy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import optimize

from powerd.errors import RequestError
from powerd_policies.perseus.problem import Dag, Floats

#: How far from the power limit the mean draw under it may lie: fitted runs that never reach the limit leave the cap free.
CAP_SLACK = 0.1

Key = tuple[int, str]  # stage and instruction kind, as in Profile


@dataclass(frozen=True)
class Job:
    """What stays the same in all runs of a job."""

    dag: Dag
    max_clock_mhz: float
    blocking_power_w: float  # measured, of one rank that waits
    power_limit_w: float  # of every GPU


@dataclass(frozen=True, slots=True)
class Run:
    """One plan and what it took: mean seconds and mean clock of each instruction kind; energy of all ranks."""

    plan: int
    times_s: Mapping[Key, float]
    clocks_mhz: Mapping[Key, float]
    iteration_time_s: float
    energy_j: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one iteration of all ranks, blocking included."""

    iteration_time_s: float
    energy_j: float


@dataclass(frozen=True, slots=True)
class Model:
    """The fitted numbers of one job: ``P(f) = min(static_w + dynamic_w * (f / fmax)^3, cap_w)`` while a rank computes.

    A description of the clocks that were run, not of the chip: ``static_w`` holds what does not change between them.
    """

    time_factor: float  # of the replayed iteration time
    static_w: float
    dynamic_w: float
    cap_w: float  # what the power limit leaves on average

    def power_w(self, share_of_max_clock: Floats) -> Floats:
        """Draw of a rank that computes, at shares of the highest clock."""
        return np.minimum(self.static_w + self.dynamic_w * share_of_max_clock**3, self.cap_w)

    def predict(self, job: Job, times_s: Mapping[Key, float], clocks_mhz: Mapping[Key, float]) -> Prediction:
        """Time and energy of an iteration whose instructions take these times at these clocks; needs no measured total."""
        return self.predicted(Replayed.of(job, times_s, clocks_mhz), job)

    def predicted(self, replayed: Replayed, job: Job) -> Prediction:
        """The same, of a run that went through the graph before."""
        time_s = self.time_factor * replayed.path_s
        busy_s = self.time_factor * replayed.busy_s
        blocked_s = job.dag.ranks * time_s - float(busy_s.sum())
        busy_j = float((self.power_w(replayed.share) * busy_s).sum())
        return Prediction(time_s, busy_j + job.blocking_power_w * blocked_s)


@dataclass(frozen=True)
class Replayed:
    """One run through the graph, before any fitted number: longest path, and per (stage, kind) seconds busy and clock."""

    path_s: float
    busy_s: Floats
    share: Floats

    @classmethod
    def of(cls, job: Job, times_s: Mapping[Key, float], clocks_mhz: Mapping[Key, float]) -> Replayed:
        """RequestError naming the instruction that has no time or clock."""
        keys = sorted({(node.stage, str(node.kind)) for node in job.dag.nodes})
        for stage, kind in keys:
            for what, table in (("time", times_s), ("clock", clocks_mhz)):
                value = table.get((stage, kind))
                if value is None or not (np.isfinite(value) and value > 0):
                    raise RequestError(f"{kind} of stage {stage} has no {what} above zero, but {value}", code="bad_value")
        index = {key: number for number, key in enumerate(keys)}
        kinds = np.array([index[node.stage, str(node.kind)] for node in job.dag.nodes])
        one_s = np.array([times_s[key] for key in keys])
        share = np.array([clocks_mhz[key] for key in keys]) / job.max_clock_mhz
        return cls(job.dag.schedule(one_s[kinds])[2], one_s * np.bincount(kinds), share)


@dataclass(frozen=True)
class Runs:
    """Measured runs of one job, replayed once, so that many splits of them can be fitted and judged."""

    job: Job
    runs: tuple[Run, ...]

    @cached_property
    def replayed(self) -> tuple[Replayed, ...]:
        """Every run through the graph."""
        return tuple(Replayed.of(self.job, run.times_s, run.clocks_mhz) for run in self.runs)

    def fit(self, chosen: Sequence[int]) -> Model:
        """The model that these runs (their positions) support.

        The factor is the median ratio, which a disturbed run cannot move; the three of power minimise the energies' relative
        errors. RequestError for fewer than five runs.
        """
        if len(chosen) < 5:
            raise RequestError(f"four numbers need at least five runs, not {len(chosen)}", code="bad_value")
        factor = float(np.median([self.runs[n].iteration_time_s / self.replayed[n].path_s for n in chosen]))
        measured_j = np.array([self.runs[n].energy_j for n in chosen])

        def model(parameters: Floats) -> Model:
            return Model(factor, *(float(p) for p in parameters))

        def misses(parameters: Floats) -> Floats:
            trial = model(parameters)
            said_j: Floats = np.array([trial.predicted(self.replayed[n], self.job).energy_j for n in chosen])
            return np.asarray(said_j / measured_j - 1, dtype=np.float64)

        limit_w = self.job.power_limit_w
        low_w, high_w = ((1 - CAP_SLACK) * limit_w, (1 + CAP_SLACK) * limit_w)
        within = ((0.0, 0.0, low_w), (limit_w, 3 * limit_w, high_w))
        # Where the clocks' draw crosses the cap, the misfit has a kink and sometimes a second valley: start on both sides.
        starts = [(share * limit_w, (1.05 - share) * limit_w, cap_w) for share in (0.3, 0.6) for cap_w in (low_w + 1, high_w - 1)]
        least_squares: Any = optimize.least_squares  # untyped; a module of the same name hides it from type checkers
        fits = [least_squares(misses, start, bounds=within, x_scale=limit_w) for start in starts]
        return model(min(fits, key=lambda fit: float(fit.cost)).x)

    def judge(self, model: Model) -> tuple[Floats, Floats]:
        """Relative errors of time and energy of every run, predicted over measured minus one."""
        said = [model.predicted(replayed, self.job) for replayed in self.replayed]
        times = np.array([s.iteration_time_s / run.iteration_time_s for s, run in zip(said, self.runs, strict=True)])
        energies = np.array([s.energy_j / run.energy_j for s, run in zip(said, self.runs, strict=True)])
        return times - 1, energies - 1
