"""What the pipeline jobs share: stages whose work takes a simulated GPU's time, options of a short job, a last word."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

import torch

from powerd.sim.workload import Context

logging.basicConfig(level=logging.INFO)
RANK = int(os.environ["RANK"])
WORLD = int(os.environ["WORLD_SIZE"])
WIDTH, UNITS = 8, 0.03
OPTIONS: dict[str, Any] = {
    "iterations_per_clock": 2, "clock_stride": 8, "lowest_clock_mhz": 1050, "rises": 2, "exchange_steps": 1, "cache": None,
}  # fmt: skip
_gpu = Context(RANK, name="trainer")


def run(kind: str, units: float = UNITS) -> None:
    """A forward or backward of a measured stage; the last rank's takes longer, so that there is something to plan."""
    _gpu.run([(f"gpt3-175b/{7 if RANK == WORLD - 1 else 2}/{kind}", units)])


class _Work(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        run("forward")
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        run("backward")
        return grad


class Layer(torch.nn.Module):
    """A linear layer that takes time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(_Work.apply(value)))


def tell(handle: Any, states: list[str], losses: list[str], **more: Any) -> None:
    """The job's last word."""
    conductor = handle.conductor
    order, plans = [], []
    if conductor is not None:
        order = [list(rank) for rank in conductor.agreement.order]
        lease = conductor._gpu._lease
        if lease is not None and lease.held:
            plans = [{"state": p.state, "step": p.step} for p in conductor._gpu.client.plans(lease.id, lease.token)]
    print(
        json.dumps({"states": states, "losses": losses, "order": order, "plan": handle.plan, "armed": plans, **more}), flush=True
    )
