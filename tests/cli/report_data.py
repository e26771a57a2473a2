"""Two nodes of one job as their APIs would tell them: 13 runs of 21 steps, 8 % saved under the plan, numbers drawn by a seed."""

from __future__ import annotations

import random
from typing import Any

from powerd.api import JobView
from powerd.cli.reports.counters import GpuSeries
from powerd.cli.reports.nodes import NodeData
from powerd.records import JobStepRow
from tests.client.fake_daemon import UUIDS

BEGIN_S = 1_790_000_000.0
STEPS, STEP_S = 273, 2.0
END_S = BEGIN_S + STEPS * STEP_S
WATTS = 300.0


def view(**changes: Any) -> JobView:
    values: dict[str, Any] = {
        "job": "train-7", "state": "ended", "begin_wall_ns": int(BEGIN_S * 1e9), "end_wall_ns": int(END_S * 1e9), "steps": STEPS,
        "lost_steps": 0, "time_s": 1.9, "energy_j": 155_000.0, "energy_per_retained_step_j": None, "saving_fraction": None,
        "plan": "p-1", "gpus": UUIDS[:1],
    }  # fmt: skip
    return JobView(**{**values, **changes})


def steps(seed: int = 1, saving: float = 0.08) -> tuple[JobStepRow, ...]:
    dice, out = random.Random(seed), []
    for i in range(STEPS):
        plan = "baseline" if i // 21 % 2 else "p-1"
        begin = int(i * STEP_S * 1e9)
        energy = 600.0 * dice.gauss(1, 0.01) * (1 - saving if plan == "p-1" else 1)
        time_s = 1.9 * dice.gauss(1, 0.005) * (1.01 if plan == "p-1" else 1)
        out.append(JobStepRow("train-7", 0, i, begin, begin, begin + 10**9, time_s, energy, 1200.0, plan, UUIDS[:1]))
    return tuple(out)


def course(**changes: Any) -> GpuSeries:
    """A second's samples of one GPU at 300 W, from ten seconds before the job to ten after it."""
    when = tuple(BEGIN_S - 10 + i for i in range(int(END_S - BEGIN_S) + 21))
    values: dict[str, Any] = {
        "uuid": UUIDS[0], "index": 0, "name": "NVIDIA A100-SXM4-80GB", "step_s": 1.0, "time_s": when,
        "energy_j": tuple(5000 + WATTS * (t - when[0]) for t in when), "power_w": (WATTS,) * len(when),
        "epoch": (1.0,) * len(when),
        "limit_w": 400.0,
    }  # fmt: skip
    return GpuSeries(**{**values, **changes})


def node(name: str = "node7", seed: int = 1, saving: float = 0.08) -> NodeData:
    return NodeData(
        name,
        simulated=True,
        gpus=(course(),),
        job=view(),
        steps=steps(seed, saving),
        begin_s=BEGIN_S,
        end_s=END_S,
        now_s=END_S + 60,
    )
