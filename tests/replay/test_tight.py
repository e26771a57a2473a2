"""Where the profile leaves little room, the controller is no worse for users than the fleet that never changes anything."""

from __future__ import annotations

from dataclasses import replace

import pytest

from powerd.sim.replay import compare, scale, scenario, session
from powerd.sim.replay.trace import Trace


@pytest.mark.parametrize("nodes", [12, 6])
def test_a_peak_at_which_only_one_parallelism_keeps_the_gaps_costs_no_more_promises_than_a_fixed_fleet(
    hour: Trace, nodes: int
) -> None:
    tight = scenario.parse(f"[cluster]\nnodes = {nodes}\n[engine]\nchunk_tokens = 768\n")
    load = {12: 6.819, 6: 3.178}[nodes]  # of the whole hour: the most at which SinglePool keeps 99 %
    made = session.prepare(scale.scaled(hour.between(1200, 2400), load, 1), tight)
    fixed, ours = (compare.one(name, made).entry for name in ("singlepool", "dynamollm"))
    assert ours["slo_attainment"] >= fixed["slo_attainment"]
    assert ours["energy_kwh"] < 0.99 * fixed["energy_kwh"]
    assert ours["event_counts"]["infeasible"] > 0  # it knew, and said so
    untouched = replace(tight, engine=replace(tight.engine, chunk_tokens=512))
    calm = session.prepare(scale.scaled(hour.between(2400, 3000), load / 2, 1), untouched)
    assert "infeasible" not in compare.one("dynamollm", calm).entry["event_counts"]
