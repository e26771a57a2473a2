"""The conductor records, profiles and resumes: what a job learns while it trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.pipeline_rig import BLOCKING_W, CLOCKS, Job, joules, seconds


def test_profile_is_what_the_gpus_did_at_each_clock_and_stops_when_energy_only_rises(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.until("profiling")
    for _ in range(200):
        job.steps(1)
        if job.states != {"profiling"}:
            break
    profile = job.ranks[0].conductor.agreement.profile
    assert profile.blocking_power_w == pytest.approx(BLOCKING_W)
    for row in profile.rows:
        assert row.time_s == pytest.approx(seconds(row.stage, row.kind, row.mhz), rel=1e-6)
        assert row.energy_j == pytest.approx(joules(row.stage, row.kind, row.mhz), rel=1e-6)
    measured = sorted({row.mhz for row in profile.rows}, reverse=True)
    assert measured[0] == CLOCKS[-1]
    cost = {m: joules(0, "forward", m) - BLOCKING_W * seconds(0, "forward", m) for m in CLOCKS}
    best = min(CLOCKS, key=lambda mhz: cost[mhz])
    expected = list(reversed(CLOCKS))[: list(reversed(CLOCKS)).index(best) + 6]
    assert measured == expected  # five clocks below the best one, no more
    assert all(rank.client.set[-1] is None for rank in job.ranks)  # and back up
