"""A pipeline-parallel training with torch.distributed.pipelining whose clocks powerd sets; one line of it is powerd's.

On one node:    torchrun --standalone --nproc-per-node 4 torch_pipeline.py --pipeline 2
With Slurm:     sbatch torch_pipeline.sbatch        (srun starts one of this per GPU; see docs/training.md)

It runs on GPUs where there are any and on CPUs else; without a powerd on the node it trains all the same.
"""

from __future__ import annotations

import argparse
import logging
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel

from powerd_integrations.pipeline import rendezvous
from powerd_integrations.torch_pipeline import optimize

WIDTH, MICROBATCHES, BATCH = 256, 8, 64


def main() -> None:
    """Train a small model for some steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pipeline", type=int, default=2, help="ranks of each pipeline")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--slowdown", type=float, default=0.0, help="how much longer an iteration may take: 0.05 is five percent")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    os.environ.update(rendezvous(os.environ))  # torchrun, srun or neither
    local_rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    mesh = init_device_mesh(device.type, (world // args.pipeline, args.pipeline), mesh_dim_names=("data", "pipeline"))
    data, pipeline = mesh["data"], mesh["pipeline"]
    rank = pipeline.get_local_rank()

    torch.manual_seed(rank)
    layers: list[nn.Module] = [nn.Linear(WIDTH, WIDTH), nn.Tanh()] * (4 if rank else 3)  # real stages are never quite even
    module = nn.Sequential(*layers).to(device)
    replica = DistributedDataParallel(module, process_group=data.get_group()) if data.size() > 1 else module
    stage = PipelineStage(replica, rank, args.pipeline, device, group=pipeline.get_group())
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.AdamW(module.parameters())

    optimize(schedule, slowdown=args.slowdown, job="example")  # this line is powerd's

    for step in range(args.steps):
        x, y = torch.randn(BATCH, WIDTH, device=device), torch.zeros(BATCH, WIDTH, device=device)
        losses: list[torch.Tensor] = []
        last = rank == args.pipeline - 1
        schedule.step(*([x] if rank == 0 else []), **({"target": y, "losses": losses} if last else {}))
        optimizer.step()
        optimizer.zero_grad()
        if last and data.get_local_rank() == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {sum(loss.item() for loss in losses) / len(losses):.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
