"""Two ranks on gloo: DDP, then FSDP2, around a tiny model; the optimizer's hook counts steps, both ranks use one clock."""

from __future__ import annotations

import torch
from common import OPTIONS, compute, lock_mhz, lowest, rank, tell
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from powerd.client import Client
from powerd_integrations.fsdp import watch


def train(kind: str) -> None:
    torch.manual_seed(0)
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    steps = watch(optimizer, OPTIONS)
    wanted, seen = [], []
    for _ in range(70):
        compute(0.03 if rank == 0 else 0.02)  # unequal work: the slower rank is the step's time
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(steps.clock_mhz or 0)
        seen.append(lock_mhz())
    both = [None, None]
    dist.all_gather_object(both, wanted)
    steps.close()
    dist.barrier()
    tried = len({c for c in wanted if 0 < c < 1400})
    tell(steps, kind=kind, same=both[0] == both[1], tried=tried, lowest_mhz=lowest(seen), lock_after_mhz=lock_mhz(),
         leases=len(Client().leases()))  # fmt: skip
    dist.barrier()


dist.init_process_group("gloo")
train("ddp")
train("fsdp")
dist.destroy_process_group()
