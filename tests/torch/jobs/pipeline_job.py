"""One rank of a pipeline that trains on gloo, each rank's work on a simulated GPU; prints what happened as one JSON object.

House rules: the numbers of training come from torch on the CPU, time and energy from the simulated GPU; nothing here knows what
powerd does, but for the one line that a user writes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import signal
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules

from powerd.client import Client
from powerd.sim.workload import Context
from powerd_integrations.torch_pipeline import optimize

WIDTH = 16
MICROBATCHES = 4
MOST_STEPS = 150
UNITS = 0.03  # of a measured microbatch
MEASURED_STAGES = (0, 2, 5, 7)


class _Work(torch.autograd.Function):
    """The identity; its forward and backward take a simulated GPU's time."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, run: Any, kinds: tuple[str | None, str | None]) -> torch.Tensor:
        ctx.run, ctx.kind = run, kinds[1]
        run(kinds[0])
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.run(ctx.kind)
        return grad, None, None


class Stage(nn.Module):
    """A linear layer whose work is a measured GPT-3 stage's; weight gradients take a third of the backward."""

    def __init__(self, index: int, run: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.run = lambda kind: run(index, kind)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        weight = _Work.apply(self.linear.weight, self.run, (None, "weight"))
        return torch.tanh(nn.functional.linear(_Work.apply(value, self.run, ("forward", "input")), weight, self.linear.bias))


class Gpu:
    """This rank's simulated GPU; ``off`` makes work take no time."""

    def __init__(self, number: int, stages: int) -> None:
        self.context = Context(number, name="trainer")
        self.off = False
        self.stages = stages

    def run(self, stage: int, kind: str | None) -> None:
        if self.off or kind is None:
            return
        measured = MEASURED_STAGES[stage * len(MEASURED_STAGES) // self.stages]
        name, units = ("forward", UNITS) if kind == "forward" else ("backward", UNITS * (0.35 if kind == "weight" else 0.65))
        self.context.run([(f"gpt3-175b/{measured}/{name}", units)])


def build(name: str, rank: int, world: int, microbatches: int, gpu: Gpu) -> tuple[Any, list[nn.Module], bool, bool]:
    """A schedule of torch with this rank's stages; whether this rank has the first and the last stage."""
    cls = getattr(torch_schedules, name)
    single = issubclass(cls, torch_schedules.PipelineScheduleSingle)
    count = world if single else 2 * world
    second = 2 * world - 1 - rank if "ZBV" in name else rank + world
    indices = [rank] if single else [rank, second]
    gpu.stages = count
    torch.manual_seed(7)
    modules = [Stage(index, gpu.run) for index in range(count)]  # every rank draws all, so that all are the same everywhere
    mine = [modules[index] for index in indices]
    stages = [PipelineStage(m, i, count, torch.device("cpu")) for m, i in zip(mine, indices, strict=True)]
    schedule = cls(stages[0] if single else stages, microbatches, loss_fn=nn.functional.mse_loss)
    return schedule, mine, 0 in indices, count - 1 in indices


@dataclass(frozen=True)
class Phase:
    """One training: for ``steps``, or until it has followed its plan for ``follows``; ``..._at`` counts from there too."""

    steps: int = MOST_STEPS
    follows: int | None = None
    powerd: bool = True
    socket: str | None = None
    evaluate_at: int | None = None
    disturb_at: int | None = None
    kill_at: int | None = None


PHASES = {
    "alone": Phase(powerd=False),  # as many steps as the longest of its schedule before it took
    "plain": Phase(follows=8),
    "missing": Phase(6, socket="/nonexistent/powerd.sock"),
    "disturbed": Phase(follows=8, evaluate_at=2, disturb_at=4),
    "killed": Phase(follows=6, kill_at=2),
}


class Following:
    """How many steps the training goes on since every rank followed its plan; None before, however long planning takes."""

    def __init__(self) -> None:
        self.steps: int | None = None

    def step(self, handle: Any) -> None:
        """A step has ended, on every rank."""
        if self.steps is not None:
            self.steps += 1
            return
        whole = torch.tensor(handle.conductor is not None and len(handle.conductor._whole) > 0, dtype=torch.int)
        dist.all_reduce(whole, dist.ReduceOp.MIN)
        if whole.item():
            self.steps = 0


def train(name: str, phase: Phase, rank: int, world: int, gpu: Gpu, daemon: int) -> dict[str, Any]:
    """Train as the phase says; losses as exact hexadecimal numbers, and what became of the clocks."""
    gpu.off = not phase.powerd
    schedule, modules, first, last = build(name, rank, world, MICROBATCHES, gpu)
    optimizer = torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.05)
    handle, following = None, Following()
    if phase.powerd:
        client = None if phase.socket is None else Client(phase.socket, on_error="log")
        handle = optimize(
            schedule, client=client, iterations_per_clock=2, clock_stride=12, lowest_clock_mhz=900, rises=2, exchange_steps=1,
            cache=None, tolerance=0.25, job=f"test-{name}",
        )  # fmt: skip
    data = torch.Generator().manual_seed(11)
    losses: list[str] = []
    weights: list[str] = []
    states: list[str] = []
    for _ in range(phase.steps):
        x = torch.randn(2 * MICROBATCHES, WIDTH, generator=data)
        y = torch.randn(2 * MICROBATCHES, WIDTH, generator=data)
        evaluating, disturbing, killing = (
            at is not None and following.steps == at for at in (phase.evaluate_at, phase.disturb_at, phase.kill_at)
        )
        if killing and rank == 0:
            os.kill(daemon, signal.SIGKILL)
        if evaluating:
            with torch.no_grad():
                one_pass(schedule.eval, x, y, first, last)
        if disturbing:  # the next step begins with something that no plan has
            assert handle is not None
            schedule._stage.forward_one_chunk = wrong_first(schedule._stage, handle.conductor)
        found = one_pass(schedule.step, x, y, first, last)
        losses.append(float(sum(loss.item() for loss in found)).hex() if found else "")
        optimizer.step()
        optimizer.zero_grad()
        weights.append(
            hashlib.sha256(b"".join(p.detach().numpy().tobytes() for m in modules for p in m.parameters())).hexdigest()
        )
        if handle is not None and (not states or states[-1] != str(handle.state)):
            states.append(str(handle.state))
        if phase.follows is not None:
            following.step(handle)
            if following.steps == phase.follows:
                break
    said: dict[str, Any] = {"losses": losses, "weights": weights, "states": states}
    if handle is not None and handle.conductor is not None:
        said |= outcome(handle)
        handle.detach()
        said["restored"] = not any(
            "forward_one_chunk" in s.__dict__ for s in getattr(schedule, "_stages", ()) or [schedule._stage]
        )
    return said


def outcome(handle: Any) -> dict[str, Any]:
    """What became of the clocks of this rank."""
    conductor = handle.conductor
    lease = conductor._gpu._lease
    plans = [] if lease is None or not lease.held else conductor._gpu.client.plans(lease.id, lease.token)
    promised = conductor.agreement._derived
    return {
        "plan": handle.plan, "rank": conductor.place.rank, "steps": conductor.steps,
        "promised": None if promised is None else [list(r) for r in promised],
        "recorded": [list(r) for r in conductor.agreement.order],
        "armed": [{"state": str(p.state), "step": p.step, "switches": p.switches, "why": p.why} for p in plans],
    }  # fmt: skip


def wrong_first(stage: Any, conductor: Any) -> Any:
    """The stage's forward, once with another instruction in front."""
    wrapped = stage.__dict__["forward_one_chunk"]

    def forward(*args: Any, **kwargs: Any) -> Any:
        stage.forward_one_chunk = wrapped
        conductor.begin(99, "forward", 0)
        conductor.end(99, "forward", 0)
        return wrapped(*args, **kwargs)

    return forward


def one_pass(call: Any, x: torch.Tensor, y: torch.Tensor, first: bool, last: bool) -> list[torch.Tensor]:
    """One step or evaluation of this rank; the losses of its microbatches on the last stage's rank."""
    losses: list[torch.Tensor] = []
    arguments = [x] if first else []
    call(*arguments, **({"target": y, "losses": losses} if last else {}))
    return losses


def main() -> None:
    """Every (schedule:phase) that is named, one after another."""
    parser = argparse.ArgumentParser()
    parser.add_argument("trainings", nargs="+", metavar="SCHEDULE:PHASE")
    parser.add_argument("--daemon", type=int, default=0, help="the process that a phase kills")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    gpu = Gpu(int(os.environ["LOCAL_RANK"]), world)
    said: dict[str, dict[str, Any]] = {}
    steps: dict[str, int] = {}
    for training in args.trainings:
        name, _, phase = training.partition(":")
        print(f"PHASE {training}", file=sys.stderr, flush=True)
        what = PHASES[phase] if phase != "alone" else replace(PHASES[phase], steps=steps[name])
        said[training] = train(name, what, rank, world, gpu, args.daemon)
        steps[name] = max(steps.get(name, 0), len(said[training]["losses"]))
        dist.barrier()
        if phase == "plain":
            job = Client().job(f"test-{name}")  # what the daemon knows of it
            said[training]["job"] = [job.state, job.steps, job.plan, job.energy_per_retained_step_j, job.time_s]
    print(json.dumps(said), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
