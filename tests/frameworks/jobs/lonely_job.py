"""Two ranks of which only the first uses powerd, against the guide: training goes on all the same."""

from __future__ import annotations

import json

import torch
from common import OPTIONS, compute, rank
from torch import distributed as dist

from powerd_integrations import ranks
from powerd_integrations.fsdp import watch

ranks.MEETING_S = 2.0
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
steps = watch(optimizer, OPTIONS) if rank == 0 else None
made = 0
for _ in range(20):
    compute(0.01)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    made += 1
print(json.dumps({"made": made, "clock_mhz": steps.clock_mhz if steps else None}), flush=True)
