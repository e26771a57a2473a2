"""What the demonstration measured, against what was measured on real hardware.

House rules: time is the job's own, energy the daemon's, of a window around whole microbatches; the reference rows are the
published profile, durations and energies times ten.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from powerd.demo.children import DemoError
from powerd.demo.job import stage_of
from powerd.resources import folder
from powerd.sweep import Row

PROFILE_FILE = "stage_profile_gpt3-175b_a100_sxm.csv"
TRUE_SCALE = 10.0  # the published rows are tenths of a microbatch


@dataclass(frozen=True, slots=True)
class Cell:
    """One GPU at one clock: seconds and joules of one microbatch, forward and backward."""

    gpu: int
    clock_mhz: int
    time_s: float
    energy_j: float
    low_j: float
    high_j: float


@dataclass(frozen=True, slots=True)
class Error:
    """Deviation from the measured rows in per cent: mean of the absolute values, and the largest."""

    rows: int
    time_mean: float
    time_max: float
    energy_mean: float
    energy_max: float


def measured(path: Path | None = None) -> dict[tuple[int, int], tuple[float, float]]:
    """(stage, clock) -> (seconds, joules) of one true microbatch on real hardware."""
    rows: dict[tuple[int, int], tuple[float, float]] = {}
    with (path or folder("profiles") / PROFILE_FILE).open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            key = (int(row["stage"]), int(row["frequency"]))
            time_s, energy_j = rows.get(key, (0.0, 0.0))
            rows[key] = (time_s + TRUE_SCALE * float(row["time"]), energy_j + TRUE_SCALE * float(row["energy"]))
    return rows


def cell(message: Mapping[str, Any]) -> Cell:
    """What one window says, per microbatch; DemoError when the daemon does not know its energy."""
    figure, count = message["figure"], message["microbatches"]
    if figure["energy_j"] is None:
        raise DemoError(f"GPU {message['gpu']} at {message['clock_mhz']} MHz: no energy was measured")
    energies = [figure[name] / count for name in ("energy_j", "low_j", "high_j")]
    return Cell(message["gpu"], message["clock_mhz"], message["seconds"] / count, *energies)


def rows(found: Sequence[Cell], verdicts: Mapping[int, str]) -> list[Row]:
    """One row per clock: a microbatch through all stages, seconds and joules added up over the GPUs."""
    made = []
    for clock in sorted({c.clock_mhz for c in found}, reverse=True):
        here = [c for c in found if c.clock_mhz == clock]
        sums = [sum(getattr(c, name) for c in here) for name in ("time_s", "energy_j", "low_j", "high_j")]
        made.append(Row(clock, sums[0], sums[1], sums[2], sums[3], 1, verdicts[clock]))
    return made


def left_out(clocks: Sequence[int]) -> set[int]:
    """The measured clocks that a simulator fitted on every second one does not know."""
    ordered = sorted(clocks)
    return {c for n, c in enumerate(ordered) if n % 2 == 1 and n != len(ordered) - 1}


def error(found: Sequence[Cell], truth: Mapping[tuple[int, int], tuple[float, float]], only: set[int] | None = None) -> Error:
    """How far the cells are from the measured rows, per stage and clock."""
    times, energies = [], []
    for cell in found:
        known = truth.get((stage_of(cell.gpu), cell.clock_mhz))
        if known is None or (only is not None and cell.clock_mhz not in only):
            continue
        times.append(abs(cell.time_s / known[0] - 1) * 100)
        energies.append(abs(cell.energy_j / known[1] - 1) * 100)
    if not times:
        return Error(0, float("nan"), float("nan"), float("nan"), float("nan"))
    return Error(len(times), sum(times) / len(times), max(times), sum(energies) / len(energies), max(energies))


def to_csv(found: Sequence[Cell]) -> str:
    """The profile format of the field, one line per stage and clock."""
    lines = ["stage,instruction,frequency,time,energy"]
    for c in sorted(found, key=lambda c: (c.gpu, -c.clock_mhz)):
        lines.append(f"{c.gpu},microbatch,{c.clock_mhz},{c.time_s:.9g},{c.energy_j:.9g}")
    return "\n".join(lines) + "\n"
