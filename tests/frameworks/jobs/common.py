"""What every job here shares: a GPU that computes, a look at its clock lock, a word at the end."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

from powerd.sim.node import attach
from powerd.sim.workload import Context
from powerd_integrations.steps import StepOptions, Steps

logging.basicConfig(level=logging.INFO)
rank = int(os.environ.get("LOCAL_RANK", "0"))
gpu = Context(rank)
node = attach()
OPTIONS = StepOptions(block_s=0.4, warmup_steps=3, idle_after_s=0.3)


def compute(units: float = 0.03) -> None:
    """What a training step does on the GPU: forward and backward of a measured stage, about 1.5 s per unit."""
    gpu.run([("gpt3-175b/0/forward", units), ("gpt3-175b/0/backward", units)])


def lock_mhz() -> int:
    """The highest clock this rank's GPU may use now; 0: not locked."""
    return int(node.view(rank).lock_max_mhz)


def lowest(clocks_mhz: list[int]) -> int:
    """The lowest lock that was seen; 0: never locked."""
    return min((c for c in clocks_mhz if c), default=0)


def tell(steps: Steps, **more: Any) -> None:
    """The job's last word."""
    print(json.dumps({
        "state": steps.state, "clocks": len(steps.searching_among), "steps": steps.steps, "measured_steps": steps.measured_steps,
        "energy_j": steps.energy_j, "measured_s": steps.measured_s, **more,
    }), flush=True)  # fmt: skip
