"""docs/dynamollm-design.md shows what its commands print."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.dynamollm import __main__ as command
from benchmarks.dynamollm import accuracy, parts, study, traces
from benchmarks.report import Table
from powerd.sim.replay import session, trace
from powerd_policies.dynamollm.lengths import NoisyOracle, Oracle

PAGE = Path(__file__).parents[3] / "docs" / "dynamollm-design.md"


def lengths() -> Table:
    return parts.lengths(trace.read(session.shipped_hour()))


@pytest.mark.parametrize("made", [lengths, parts.reshards, parts.starts])
def test_tables_are_as_the_command_prints_them(made: object) -> None:
    assert callable(made)
    assert "\n".join(made().markdown()) in PAGE.read_text(encoding="utf-8")


def test_forecasts_and_phases_have_a_row_for_each_case() -> None:
    assert len(parts.phases().rows) == len(parts.LOADS)
    rows = parts.forecasts(trace.read(session.shipped_hour())).rows
    assert len(rows) == 6
    assert all(0.9 < float(row[2]) < 1.5 for row in rows), "no forecast is far off on average"


def test_a_predictor_changes_by_what_requests_are_routed_and_nothing_else() -> None:
    hour = trace.read(session.shipped_hour())
    comparison = session.prepare(hour.between(1800.0, 1900.0), session.scenario(None))
    before = comparison.workload.requests
    known, right = accuracy.routed(comparison, Oracle())
    assert right == 1.0
    assert (known.workload.requests.routed_class == before.true_class).all()
    guessed, right = accuracy.routed(comparison, NoisyOracle(0.6))
    after = guessed.workload.requests
    assert right == pytest.approx((after.routed_class == before.true_class).mean())
    assert 0.5 < right < 0.7
    assert (after.routed_class // 3 == before.true_class // 3).all(), "the prompt's length is known"
    assert (after.output_tokens == before.output_tokens).all()
    assert (after.arrival_s == before.arrival_s).all()


def test_published_figures_stand_beside_those_policies_that_ran() -> None:
    rows = {name: dict.fromkeys(command.PUBLISHED, value) for name, value in ((study.BASE, 100.0), (study.FULL, 50.0))}
    table = command._published(study.Study(traces.hour(), 1.0, {1.0: rows}))
    assert table.header == ("against SinglePool", "published", "dynamollm here")
    assert table.rows[0] == ("energy", "-53%", "-50%")
