"""torch's own order of every schedule at many sizes, beside ours; prints those that differ as JSON.

House rules: torch builds the real schedule objects, over a process group that sends nothing; ours come from powerd_policies.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules
from torch.testing._internal.distributed.fake_pg import FakeStore

from powerd_integrations.torch_pipeline import _flat, order_of
from powerd_policies.perseus import schedules

#: torch's class -> our name and how many stages a rank has.
CLASSES = {
    "ScheduleGPipe": ("gpipe", 1),
    "Schedule1F1B": ("1f1b", 1),
    "ScheduleInterleaved1F1B": ("interleaved", 2),
    "ScheduleZBVZeroBubble": ("zbv", 2),
}
RANKS = (2, 3, 4, 8)
MICROBATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24)


def main() -> None:
    """Compare them all."""
    compared, different = 0, []
    for ranks in RANKS:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        for name, (ours, chunks) in CLASSES.items():
            for microbatches in MICROBATCHES:
                try:
                    schedule = build(name, ranks, chunks, microbatches)
                except ValueError as error:  # torch takes no such size; whatever else it says is a failure
                    print(f"{name} {ranks}x{microbatches}: {error}", file=sys.stderr)
                    continue
                made = schedules.order(ours, ranks, microbatches, chunks)
                mine = [[(i.stage, str(i.kind), i.microbatch) for i in steps] for steps in made]
                theirs = schedule._get_pipeline_order() if chunks == 1 else schedule.pipeline_order
                # torch's own 1F1B of the last rank is wrong: its F0 is missing and it ends with a forward that does not exist.
                told = range(ranks - 1) if name == "Schedule1F1B" else range(ranks)
                derived = [list(steps) for steps in order_of(schedule) or ()]
                compared += 1
                if any(mine[rank] != _flat(theirs[rank]) for rank in told) or derived != mine:
                    different.append([name, ranks, microbatches])
        dist.destroy_process_group()
    print(json.dumps({"compared": compared, "different": different}))


def build(name: str, ranks: int, chunks: int, microbatches: int) -> Any:
    """A schedule object of rank 0."""
    indices = [0] if chunks == 1 else [0, 2 * ranks - 1 if "ZBV" in name else ranks]
    stages = [PipelineStage(nn.Identity(), index, ranks * chunks, torch.device("cpu")) for index in indices]
    cls = getattr(torch_schedules, name)
    return cls(stages[0] if chunks == 1 else stages, microbatches, loss_fn=nn.functional.mse_loss)


if __name__ == "__main__":
    main()
