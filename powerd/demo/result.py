"""What the demonstration measured, against what was measured on real hardware.

House rules: time is the job's own, energy the daemon's: the mean power of a window in which the GPU was at work all the time,
times that time; the reference rows are the published profile, durations and energies times ten.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from powerd.demo.job import stage_of
from powerd.resources import folder
from powerd.sweep import Row

PROFILE_FILE = "stage_profile_gpt3-175b_a100_sxm.csv"
WIDEST = 0.06  # of the 95 % interval, against the energy
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


def cells(clock_mhz: int, window: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], index: Mapping[str, int]) -> list[Cell]:
    """What one window says of each GPU; empty unless every GPU was at work during all of it and its energy is known."""
    begin_ns, end_ns = int(window["begin_ns"]), int(window["end_ns"])
    energies = {index[figure["uuid"]]: figure for figure in window["figures"] if figure["energy_j"] is not None}
    found = []
    for run in runs:
        began_ns = run["end_ns"] - run["seconds"] * 1e9
        if run["gpu"] not in energies or not began_ns <= begin_ns < end_ns <= run["end_ns"]:
            return []
        figure = energies[run["gpu"]]
        if figure["high_j"] - figure["low_j"] > WIDEST * figure["energy_j"]:
            return []  # the daemon says itself that it does not know well enough: samples came late
        time_s = run["seconds"] / run["microbatches"]
        share = time_s / ((end_ns - begin_ns) / 1e9)
        energy, low, high = (energies[run["gpu"]][name] * share for name in ("energy_j", "low_j", "high_j"))
        found.append(Cell(run["gpu"], clock_mhz, time_s, energy, low, high))
    return found


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
