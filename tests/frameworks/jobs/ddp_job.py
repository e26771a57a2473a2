"""Two ranks on gloo: DDP or FSDP2 around a tiny model; the optimizer's hook counts steps, both ranks use one clock."""

from __future__ import annotations

import sys

import torch
from common import OPTIONS, compute, lock_mhz, lowest, rank, tell
from torch import distributed as dist

from powerd.client import Client
from powerd_integrations.fsdp import watch

dist.init_process_group("gloo")
torch.manual_seed(0)
model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
if "fsdp" in sys.argv:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
else:
    model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), 0.01)
steps = watch(optimizer, OPTIONS)
wanted, seen = [], []
for _ in range(90):
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
tell(steps, same=both[0] == both[1], tried=len({c for c in wanted if 0 < c < 1400}), lowest_mhz=lowest(seen),
     lock_after_mhz=lock_mhz(), leases=len(Client().leases()))  # fmt: skip
dist.destroy_process_group()
