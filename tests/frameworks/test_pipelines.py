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
        assert said["states"][-1] == "running", said["stderr"][-3000:]
        assert said["plan"] is not None
        assert said["beats"] > 16, "it followed the plan"


def test_deepspeed_trains_the_same_and_follows_a_plan(live: LiveNode) -> None:
    both = run_job(live, "deepspeed_job", ranks=2)
    check(both)
    assert both[0]["order"] == both[1]["order"] == ORDER
    without = run_job(live, "deepspeed_job", "without", ranks=2)
    assert [said["losses"][:6] for said in both] == [said["losses"] for said in without]


def test_megatron_trains_the_same_and_follows_a_plan(live: LiveNode) -> None:
    both = run_job(live, "megatron_job", ranks=2)
    check(both)
    assert both[0]["order"] == both[1]["order"] == ORDER
    assert all(said["timers_elapsed"] > 0 for said in both), "the user's own timers went on"
    without = run_job(live, "megatron_job", "without", ranks=2)
    assert both[1]["losses"][: 6 * MICROBATCHES] == without[1]["losses"] != []


def test_megatron_interleaved_tells_chunks_and_microbatches(live: LiveNode) -> None:
    both = run_job(live, "megatron_job", "interleaved", ranks=2)
    check(both)
    for rank, order in enumerate(both[0]["order"]):
        assert sorted(map(tuple, order)) == sorted(
            (s, k, m) for s in (rank, rank + 2) for k in (F, B) for m in range(MICROBATCHES)
        )
