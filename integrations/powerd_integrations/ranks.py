"""What the ranks of a job tell each other, through torch.distributed.

House rules: a group of its own on gloo, so that no GPU takes part and no other collective is disturbed; numbers only; every rank
calls at the same step, because every rank counts the same steps.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from typing import Any

from powerd_integrations.tuner import Exchange

MEETING_S = 60.0  # a rank that does not come is one without powerd: training goes on without it everywhere
PATIENCE_S = 1800.0  # later on a rank may well be busy with something that the others wait for anyhow


def exchange_of_torch() -> Exchange | None:
    """How this job's ranks exchange numbers; ``None`` in a job of one process. Collective: all ranks call it at the same step."""
    if "torch" not in sys.modules:
        return None  # whoever trains with it has imported it
    import torch
    from torch import distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    group: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=MEETING_S))
    _be_patient(dist, group)

    def exchange(mine: list[float]) -> Sequence[Sequence[float]]:
        told = torch.tensor(mine, dtype=torch.float64)
        heard = [torch.empty_like(told) for _ in range(dist.get_world_size())]
        dist.all_gather(heard, told, group=group)
        return [row.tolist() for row in heard]

    return exchange


def _be_patient(dist: Any, group: Any) -> None:
    try:
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=PATIENCE_S), group)
    except Exception:  # another torch: the shorter patience stays
        return
