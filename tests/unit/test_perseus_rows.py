"""The published savings, planned anew from the measured profiles."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import perseus_rows
from benchmarks.report import Report, run


@pytest.mark.parametrize("gpu", perseus_rows.GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("microbatches", [12, 24])
def test_intrinsic_savings_reach_the_published_row_in_time(gpu: perseus_rows.Gpu, microbatches: int) -> None:
    row = perseus_rows.intrinsic(gpu, microbatches)
    assert row.saving >= gpu.intrinsic[microbatches]
    assert row.slowdown <= 0.001
    assert row.saving <= row.bound
    assert row.saving > max(row.others), "no baseline does better at the same deadline"
    if known := gpu.bounds.get(microbatches):
        assert row.bound == pytest.approx(known, abs=0.0101)
    assert row.passed


def test_a_row_that_misses_its_promise_fails_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    row = perseus_rows.Row("A100-SXM", 12, "at 1.00x", 15.9, 16.06, 0.2, 15.2, "", 0.001, (14.1,), 16.06)
    assert row.passed
    assert not dataclasses.replace(row, saving=16.1).passed, "more than the bound allows"
    assert not dataclasses.replace(row, promised=row.saving + 0.01).passed
    assert not dataclasses.replace(row, slowdown=0.0011).passed
    assert not dataclasses.replace(row, known_bound=row.bound + 0.02).passed
    assert run("perseus-rows", "python -m benchmarks.perseus_rows", lambda report, progress: False, []) == 1
    assert "python -m benchmarks.perseus_rows" in capsys.readouterr().out


def test_the_straggler_formula_gives_the_artifact_s_own_result() -> None:
    assert perseus_rows.artifact_job_saving() == pytest.approx(perseus_rows.GPUS[0].job, abs=0.2)


@pytest.mark.long
def test_every_published_row() -> None:
    report = Report("perseus-rows", "", simulated=False)
    kept = perseus_rows.measure(report, lambda share: None)
    assert kept, report.markdown()
    assert len(report.tables[0].rows) == 14
