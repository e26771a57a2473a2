"""The simulated pipeline's ranks, without powerd: what they take is what the schedule's graph and the measured profile say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from typing import Any

import pytest

from powerd.sim.node import SimNode, create
from powerd_integrations.simulated_pipeline.job import Job
from tests.e2e.pipeline_run import arguments, expected, lines

MODEL = "a100-sxm-500w"
WARM = 4


def steps_of(node: SimNode, job: Job, count: int) -> dict[int, list[dict[str, Any]]]:
    """step -> what each rank said of it, by rank."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in lines(job, node.env(), "--steps", str(count)):
        assert line["simulated"] is True
        if "step" in line:
            found[line["step"]].append(line)
    return {step: sorted(rows, key=lambda row: row["rank"]) for step, rows in found.items()}


@pytest.mark.parametrize(
    "job",
    [
        Job((0, 2, 5, 7), pipelines=2, microbatches=6),
        Job((0, 7), schedule="gpipe", microbatches=5),
        Job((0, 3, 5, 7), schedule="interleaved", chunks=2, microbatches=4),
        Job((1, 2, 6, 7), schedule="zbv", microbatches=5),
        Job((0, 7), schedule="zb-h1", microbatches=4),
        Job((0, 7), microbatches=4, recompute=True),
    ],
    ids=lambda job: f"{job.schedule}{'-recompute' if job.recompute else ''}",
)
def test_stepped_iterations_take_the_time_and_energy_of_the_graph(job: Job) -> None:
    want = expected(job)
    with create(MODEL, job.world, "stepped") as node:
        found = steps_of(node, job, WARM + 1)
    assert sorted(found) == list(range(WARM + 1))
    for number, rows in found.items():
        assert [row["rank"] for row in rows] == list(range(job.world))
        assert len({row["begin_ns"] for row in rows}) == len({row["end_ns"] for row in rows}) == 1, "nobody goes on before all"
        for pipeline in range(job.pipelines):
            own = rows[pipeline * job.ranks : (pipeline + 1) * job.ranks]
            assert (own[0]["end_ns"] - own[0]["begin_ns"]) / 1e9 == pytest.approx(want.time_s, rel=0.001)
            assert [row["busy_s"] for row in own] == pytest.approx(want.busy_s, rel=0.001)
            if number == WARM:  # a cold GPU leaks less
                assert sum(row["end_mj"] - row["begin_mj"] for row in own) / 1000 == pytest.approx(want.energy_j, rel=0.005)


def test_a_throttled_gpu_makes_everybody_wait_at_the_gradient_sync() -> None:
    job = Job((0, 7), pipelines=2, microbatches=4)
    with create(MODEL, job.world, "stepped") as node:
        node.fault("sw-thermal", 3)
        (rows,) = steps_of(node, job, 1).values()
    worked_s = [(row["worked_ns"] - row["begin_ns"]) / 1e9 for row in rows]
    assert max(worked_s[:2]) == pytest.approx(expected(job).time_s, rel=0.001)
    assert max(worked_s[2:]) > 1.15 * max(worked_s[:2])
    assert {(row["end_ns"] - row["begin_ns"]) / 1e9 for row in rows} == {max(worked_s[2:])}


def test_scaled_time_is_the_same_training_within_what_this_machine_can_keep_up() -> None:
    job = Job((0, 7), microbatches=3)
    with create(MODEL, job.world, "x4") as node:
        (rows,) = steps_of(node, job, 1).values()
    want = expected(job)
    assert want.busy_s == pytest.approx([row["busy_s"] for row in rows], rel=0.001), "true durations at the simulated clock"
    took_ns = max(row["end_ns"] for row in rows) - min(row["begin_ns"] for row in rows)  # a late rank finds work waiting
    assert took_ns > 0.999e9 * want.time_s


def test_a_rank_that_fails_ends_the_job_with_its_reason() -> None:
    job = Job((0, 7))
    with create(MODEL, 1, "stepped") as node:
        done = subprocess.run(
            [sys.executable, *arguments(job)], env={**os.environ, **node.env()}, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert "2 ranks need as many GPUs, this node has 1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages", "0,7,2", "--schedule", "zbv"], "3 stages do not share out over ranks with 2 each"),
        (["--schedule", "2f2b"], "schedule '2f2b' is not known"),
        (["--pipelines", "0"], "there is at least 1 pipeline"),
        (["--microbatches", "0"], "microbatches is at least 1"),
    ],
)
def test_a_job_that_cannot_be_is_refused_with_a_reason(words: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "powerd_integrations.simulated_pipeline", *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
