"""What a sweep's numbers say: its points, its choices within slowdowns, and both as a table.

House rules: the choice is the policy's (powerd_policies.energy_optimal), the words are ours; a row without energy is shown, not
used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from powerd.cli.output import table
from powerd.sweep import Row
from powerd_policies.energy_optimal import Choice, Point, choose, pareto

if TYPE_CHECKING:
    from rich.table import Table


def points_of(rows: Sequence[Row]) -> tuple[Point, ...]:
    """The rows that a choice may use."""
    return tuple(Point(r.clock_mhz, r.time_s, r.energy_j) for r in rows if r.energy_j and r.time_s > 0 and r.exit_code == 0)


def choices_of(points: Sequence[Point], slowdowns: Sequence[float]) -> tuple[Choice, ...]:
    """One choice per allowed slowdown."""
    return tuple(choose(points, slowdown) for slowdown in slowdowns) if points else ()


def front_of(points: Sequence[Point]) -> tuple[Point, ...]:
    """The Pareto front, fastest first."""
    return pareto(points)


def curve_table(rows: Sequence[Row], choices: Sequence[Choice], title: str) -> Table:
    """The energy-time curve: one row per clock, what it costs and saves against the highest, and where the choices lie."""
    made = table(">SM clock", ">time", ">slowdown", ">energy", ">saving", ">power", "95 % bounds", "front", "choice", title=title)
    points = points_of(rows)
    front = {p.clock_mhz for p in pareto(points)}
    base = max(points, key=lambda p: p.clock_mhz) if points else None
    for row in sorted(rows, key=lambda r: -r.clock_mhz):
        marks = ", ".join(f"<= {c.slowdown_allowed:.0%}" for c in choices if c.point.clock_mhz == row.clock_mhz)
        slower = "-" if base is None else f"{row.time_s / base.time_s - 1:+.1%}"
        saves = "-" if base is None or row.energy_j is None else f"{1 - row.energy_j / base.energy_j:.1%}"
        bounds = "-" if row.low_j is None or row.high_j is None else f"{row.low_j:.1f} to {row.high_j:.1f} J"
        made.add_row(
            f"{row.clock_mhz} MHz", f"{row.time_s:.4f} s", slower, "-" if row.energy_j is None else f"{row.energy_j:.1f} J",
            saves, "-" if row.energy_j is None else f"{row.energy_j / row.time_s:.0f} W", bounds,
            "*" if row.clock_mhz in front else "", marks,
        )  # fmt: skip
    return made


def choice_line(choice: Choice) -> str:
    """One choice in words."""
    within = "no slowdown" if choice.slowdown_allowed == 0 else f"{choice.slowdown_allowed:.0%} slowdown"
    return f"within {within}: {choice.point.clock_mhz} MHz saves {choice.saving:.1%} of the energy at {choice.slowdown:+.1%} time"
