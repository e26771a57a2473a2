"""Perseus in other frameworks' pipelines: their own engines run, instructions are told rightly, a plan is made and followed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.live import LiveNode
from tests.frameworks.rig import run_job

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("frameworks")]

MICROBATCHES = 4
F, B = "forward", "backward"
#: What two ranks of 1F1B with four microbatches run.
ORDER = [
    [[0, F, 0], [0, F, 1], [0, B, 0], [0, F, 2], [0, B, 1], [0, F, 3], [0, B, 2], [0, B, 3]],
    [[1, F, 0], [1, B, 0], [1, F, 1], [1, B, 1], [1, F, 2], [1, B, 2], [1, F, 3], [1, B, 3]],
]


def check(both: list[dict[str, Any]]) -> None:
    for said in both:
        assert "running" in said["states"], said["stderr"][-3000:]
        assert said["plan"] is not None
        assert max(plan["step"] or 0 for plan in said["armed"]) >= 1, f"beats went on from step to step: {said['armed']}"
        assert said["losses"][: len(said["without"])] == said["without"], "training is the same to the last bit"


def test_deepspeed_trains_the_same_and_follows_a_plan(live: LiveNode) -> None:
    both = run_job(live, "deepspeed_job", ranks=2)
    check(both)
    assert both[0]["order"] == both[1]["order"] == ORDER
    assert len(both[0]["without"]) == 6


def test_megatron_trains_the_same_and_follows_a_plan(live: LiveNode) -> None:
    both = run_job(live, "megatron_job", ranks=2)
    check(both)
    assert both[0]["order"] == both[1]["order"] == ORDER
    assert all(said["timers_elapsed"] > 0 for said in both), "the user's own timers went on"
    assert len(both[1]["without"]) == 6 * MICROBATCHES, "the last stage knows the losses"


def test_megatron_interleaved_tells_chunks_and_microbatches(live: LiveNode) -> None:
    both = run_job(live, "megatron_job", "interleaved", ranks=2)
    check(both)
    for rank, order in enumerate(both[0]["order"]):
        assert sorted(map(tuple, order)) == sorted(
            (s, k, m) for s in (rank, rank + 2) for k in (F, B) for m in range(MICROBATCHES)
        )
