"""The replay model: what it computes by hand, what it recovers, and how it does on runs that it has not seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import perseus_replay
from powerd.errors import RequestError
from powerd_policies.perseus import dag, schedules
from powerd_policies.perseus.replay import Job, Model, Run, Runs

KINDS = ("forward", "backward")
JOB = Job(dag.build(schedules.order("1f1b", 2, 3)), 1000.0, 50.0, 300.0)
TRUTH = Model(1.02, 90.0, 240.0, 290.0)


def test_a_prediction_is_the_longest_path_and_the_power_of_each_clock() -> None:
    times = {(0, "forward"): 1.0, (0, "backward"): 2.0, (1, "forward"): 1.0, (1, "backward"): 2.0}
    clocks = {(0, "forward"): 1000.0, (0, "backward"): 1000.0, (1, "forward"): 500.0, (1, "backward"): 500.0}
    said = Model(1.0, 100.0, 160.0, 250.0).predict(JOB, times, clocks)
    # Two equal stages: (microbatches + stages - 1) * (1 + 2) s; each rank is busy for 9 of the 12 s.
    assert said.iteration_time_s == pytest.approx(12.0)
    assert said.energy_j == pytest.approx(9 * 250 + 9 * (100 + 160 / 8) + 50 * (24 - 18))
    slower = Model(1.1, 100.0, 160.0, 250.0).predict(JOB, times, clocks)
    assert slower.iteration_time_s == pytest.approx(13.2)
    assert slower.energy_j == pytest.approx(1.1 * said.energy_j)


def synthetic(count: int = 12) -> Runs:
    random = np.random.default_rng(7)
    runs = []
    for plan in range(count):
        top = plan < 2
        clocks = {(s, k): 1000.0 if top else float(random.uniform(600, 950)) for s in (0, 1) for k in KINDS}
        times = {key: 0.5 * 1000 / mhz for key, mhz in clocks.items()}
        said = TRUTH.predict(JOB, times, clocks)
        runs.append(Run(plan, times, clocks, said.iteration_time_s, said.energy_j))
    return Runs(JOB, tuple(runs))


def test_a_fit_recovers_the_model_that_made_the_runs() -> None:
    runs = synthetic()
    model = runs.fit(range(0, 12, 2))
    assert model.time_factor == pytest.approx(TRUTH.time_factor)
    assert (model.static_w, model.dynamic_w, model.cap_w) == pytest.approx((90.0, 240.0, 290.0), rel=0.01)
    time, energy = runs.judge(model)
    assert abs(time).max() < 1e-9
    assert abs(energy).max() < 1e-3


def test_one_disturbed_run_does_not_move_the_time_of_all_others() -> None:
    runs = synthetic()
    late = replace(runs.runs[4], iteration_time_s=2 * runs.runs[4].iteration_time_s)
    disturbed = Runs(JOB, (*runs.runs[:4], late, *runs.runs[5:]))
    assert disturbed.fit(range(0, 12, 2)).time_factor == pytest.approx(TRUTH.time_factor)


def test_too_few_runs_and_missing_instructions_are_refused_by_name() -> None:
    runs = synthetic()
    with pytest.raises(RequestError, match="at least five runs, not 4"):
        runs.fit(range(4))
    run = runs.runs[0]
    without = {key: value for key, value in run.times_s.items() if key != (1, "backward")}
    with pytest.raises(RequestError, match="backward of stage 1 has no time"):
        TRUTH.predict(JOB, without, run.clocks_mhz)
    with pytest.raises(RequestError, match="forward of stage 0 has no clock"):
        TRUTH.predict(JOB, run.times_s, {**run.clocks_mhz, (0, "forward"): float("nan")})


@pytest.mark.parametrize("job", sorted(perseus_replay.load()))
@pytest.mark.parametrize("first", [0, 1])
def test_measured_plans_that_the_fit_has_not_seen(job: str, first: int) -> None:
    judged = perseus_replay.alternate(job, perseus_replay.load()[job], first)
    fitted = {run.plan for run in perseus_replay.load()[job].runs} - set(judged.plans)
    assert abs(len(fitted) - len(judged.plans)) <= 1
    assert abs(judged.time).mean() <= 0.01
    assert abs(judged.energy).mean() <= 0.02
    assert abs(judged.time).max() <= 0.03
    assert abs(judged.energy).max() <= 0.02
