"""Runs the simulated pipeline's ranks as processes and hands their words on; what they should say comes from the profile.

House rules: every child is ended here, by its id; expectations are computed from the shipped profile, never from the simulator.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from powerd.resources import folder
from powerd_integrations.simulated_pipeline.job import Job
from powerd_policies.perseus import profile

SCALE = 10.0  # the published rows are tenths of a true instruction
TOP_MHZ = 1410
BLOCKED_W = 90.0  # of the simulated A100 SXM at its top clock (docs/simulation.md)
CSV = folder("profiles") / "stage_profile_gpt3-175b_a100_sxm.csv"


@dataclass(frozen=True)
class Expected:
    """One iteration of one pipeline at full clocks."""

    time_s: float
    energy_j: float
    busy_s: list[float]  # by rank


def expected(job: Job, path: Path = CSV) -> Expected:
    """What the graph and the measured rows say."""
    measured = {(row.stage, row.instruction): row for row in profile.read(path) if row.mhz == TOP_MHZ}
    times, energy_j, busy_s = [], 0.0, [0.0] * job.ranks
    for node, rank in zip(job.graph.nodes, job.graph.rank.tolist(), strict=True):
        parts = [(measured[job.rows[node.stage], name.rsplit("/", 1)[1]], units) for name, units in job.kernels(node)]
        times.append(sum(SCALE * row.time_s * units for row, units in parts))
        energy_j += sum(SCALE * row.energy_j * units for row, units in parts)
        busy_s[rank] += times[-1]
    total_s = job.graph.schedule(np.array(times))[2]
    return Expected(total_s, energy_j + BLOCKED_W * (job.ranks * total_s - sum(busy_s)), busy_s)


def arguments(job: Job, *more: str) -> list[str]:
    """The command line that trains a job."""
    return [
        "-m", "powerd_integrations.simulated_pipeline", "--stages", ",".join(map(str, job.rows)),
        "--pipelines", str(job.pipelines), "--schedule", job.schedule, "--microbatches", str(job.microbatches),
        "--chunks", str(job.chunks), "--profile", job.profile, *(["--recompute"] if job.recompute else []), *more,
    ]  # fmt: skip


def lines(job: Job, env: Mapping[str, str], *more: str) -> Iterator[dict[str, Any]]:
    """What the ranks say, to the end of all steps."""
    child = subprocess.Popen(
        [sys.executable, *arguments(job, *more)], env={**os.environ, **env}, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        for line in child.stdout:
            yield json.loads(line)
        assert child.wait(30) == 0, child.stderr.read()
    finally:
        child.terminate()
        child.wait(30)
        child.stdout.close()
        child.stderr.close()
