"""docs/dynamollm-design.md shows what its command prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.dynamollm import parts
from benchmarks.report import Table
from powerd.sim.replay import session, trace

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
