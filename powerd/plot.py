"""Pictures of what was measured: the energy-time curve and histories, as SVG, PNG or PDF.

House rules: matplotlib is imported when a picture is asked for; pictures of simulated numbers say so in their title; nothing is
computed here that a table does not show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerd.errors import RequestError

if TYPE_CHECKING:
    from powerd.api import HistoryView

KINDS = (".svg", ".png", ".pdf")
#: (clock in MHz, seconds, joules)
XY = tuple[int, float, float]


def check(path: Path) -> Path:
    """Refuse a file whose name says no kind of picture, before anything is measured."""
    if path.suffix.lower() not in KINDS:
        raise RequestError(f"{path}: a picture ends in {', '.join(KINDS)}", code="bad_value")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RequestError("pictures need matplotlib", hint="pip install 'powerd[plot]'", code="bad_value") from None
    return path


def new_figure(width: float, height: float) -> Any:
    """An empty figure, inches; the same numbers always make the same file."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "powerd"
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write it in the kind that its name says; RequestError when that cannot be done."""
    check(path)
    try:
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from error


def energy_time(
    paths: Sequence[Path],
    points: Sequence[XY],
    *,
    title: str,
    simulated: bool,
    front: Sequence[XY] = (),
    choices: Mapping[str, XY] | None = None,
    errors: Sequence[tuple[float, float]] | None = None,
    measured: Sequence[XY] = (),
) -> None:
    """Draw energy over time, one dot per clock, with the Pareto front, the chosen clocks and any reference."""
    figure = new_figure(7.5, 4.8)
    axes = figure.add_subplot()
    if measured:
        axes.plot(
            [p[1] for p in measured], [p[2] for p in measured], "x", color="0.45", markersize=6, label="measured on hardware"
        )
    times, energies = [p[1] for p in points], [p[2] for p in points]
    if errors is not None:
        lows_highs = [[e - low for e, (low, _) in zip(energies, errors, strict=True)],
                      [high - e for e, (_, high) in zip(energies, errors, strict=True)]]  # fmt: skip
        axes.errorbar(times, energies, yerr=lows_highs, fmt="none", ecolor="0.75", elinewidth=1, zorder=1)
    axes.plot(times, energies, "o", markersize=4, color="tab:blue", label="simulated" if simulated else "measured")
    if front:
        axes.plot([p[1] for p in front], [p[2] for p in front], "-", color="tab:blue", linewidth=1, label="Pareto front")
    marked: dict[XY, list[str]] = {}
    for name, point in (choices or {}).items():
        marked.setdefault(point, []).append(name)
    for point, names in marked.items():
        axes.plot(point[1], point[2], "*", markersize=13, color="tab:orange", zorder=5)
        axes.annotate(f"{', '.join(names)}: {point[0]} MHz", point[1:], xytext=(8, 8), textcoords="offset points", fontsize=8)
    if points:
        top = max(points)
        axes.annotate(f"{top[0]} MHz", top[1:], xytext=(6, -3), textcoords="offset points", fontsize=8, color="0.3")
    axes.set_xlabel("time (s)")
    axes.set_ylabel("energy (J)")
    axes.set_title(title + (" (simulated)" if simulated else ""), fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    for path in paths:
        save_figure(figure, path)


def history(path: Path, view: HistoryView, names: Mapping[str, str], *, simulated: bool) -> None:
    """Draw every column of a history over time, one line per GPU."""
    import datetime

    columns = list(dict.fromkeys(column for series in view.series for column in series.columns))
    figure = new_figure(8, 1.0 + 2.0 * max(1, len(columns)))
    for row, column in enumerate(columns, 1):
        axes = figure.add_subplot(len(columns), 1, row)
        for series in view.series:
            times = [datetime.datetime.fromtimestamp(t, tz=datetime.UTC) for t in series.time_s]
            values = [float("nan") if v is None else v for v in series.columns.get(column, ())]
            if len(values) == len(times):
                axes.plot(times, values, linewidth=1, label=names.get(series.uuid, series.uuid))
        axes.set_ylabel(column, fontsize=8)
        axes.grid(alpha=0.3)
        if row == 1:
            axes.set_title("history (UTC)" + (", simulated" if simulated else ""), fontsize=10)
            axes.legend(fontsize=7, ncol=4)
    save_figure(figure, path)
