"""The plots of a report, as matplotlib axes that HTML and PDF share.

House rules: nothing is drawn that a table or the JSON does not hold; colours tell arms apart in dark and in light; matplotlib is
imported when a picture is asked for.
"""

from __future__ import annotations

import datetime
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from powerd import plot
from powerd.cli.reports.model import Report

INK = "#01020a"  # replaced by the page's own text colour
COLOURS = ("#2f7fd6", "#d9822b", "#3a9d5d", "#b4569c", "#8a8f98", "#c94f4f", "#3aa6a6", "#9a7b2f")


@dataclass(frozen=True, slots=True)
class Picture:
    """One plot: what it shows in words, and who draws it."""

    name: str
    text: str
    draw: Callable[[Any, Report], None]
    height: float = 2.8


def pictures(report: Report) -> list[Picture]:
    """The plots for which this report has data."""
    found = []
    if any(n.power is not None for n in report.nodes):
        found.append(Picture("Power", "Power of each node's GPUs over time", _power))
    if any(s.energy_j is not None for s in report.steps):
        found.append(Picture("Energy per step", "Energy of each kept step over its number, by plan", _steps))
    if report.saving is not None and report.saving.saving is not None:
        found.append(Picture("Saving", f"Intervals of saving and slowdown: {report.saving.text}", _saving, 1.8))
    return found


def _power(axes: Any, report: Report) -> None:
    for number, node in enumerate(n for n in report.nodes if n.power is not None):
        if node.power is not None:
            when = [datetime.datetime.fromtimestamp(t, tz=datetime.UTC) for t in node.power.time_s]
            watts = [float("nan") if w is None else w for w in node.power.power_w]
            axes.plot(when, watts, linewidth=1.2, color=COLOURS[number % len(COLOURS)], label=node.name)
    axes.set_ylabel("power (W)")
    axes.set_xlabel("time (UTC)")
    axes.set_ylim(0, 1.15 * max((w for n in report.nodes if n.power for w in n.power.power_w if w is not None), default=1.0))
    _legend(axes)


def _steps(axes: Any, report: Report) -> None:
    arms = list(dict.fromkeys(s.plan or "full clock" for s in report.steps))
    for number, arm in enumerate(arms[: len(COLOURS)]):
        points = [(s.step, s.energy_j) for s in report.steps if (s.plan or "full clock") == arm and s.energy_j is not None]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), ".", markersize=4, color=COLOURS[number], label=arm)
    axes.set_ylabel("energy (J)")
    axes.set_xlabel("step")
    _legend(axes)


def _saving(axes: Any, report: Report) -> None:
    found = report.saving
    if found is None or found.saving is None or found.slowdown is None:
        return
    for row, share in enumerate((found.slowdown, found.saving)):
        value, low, high = (100 * v for v in (share.value, share.low, share.high))
        axes.errorbar(
            [value], [row], xerr=[[value - low], [high - value]], fmt="o", color=COLOURS[1 - row], capsize=5, linewidth=2
        )
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks([0, 1], ["slowdown", "saving"])
    axes.set_ylim(-0.6, 1.6)
    axes.set_xlabel(f"per cent, {100 * found.confidence:g} % interval")


def _legend(axes: Any) -> None:
    axes.legend(fontsize=7, ncol=4, frameon=False, labelcolor=INK)


def styled(axes: Any, name: str, simulated: bool) -> None:
    """Lines and texts in the page's ink, no background."""
    axes.set_title(name + (" (simulated)" if simulated else ""), fontsize=10, loc="left", color=INK)
    axes.patch.set_alpha(0)
    axes.grid(alpha=0.25, color=INK, linewidth=0.5)
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    for spine in axes.spines.values():
        spine.set_color(INK)
        spine.set_alpha(0.4)


def svg(report: Report, picture: Picture) -> str:
    """One plot as an inline SVG that takes the page's text colour; the same report always makes the same text."""
    import matplotlib

    figure = plot.new_figure(7.6, picture.height)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    picture.draw(axes, report)
    styled(axes, picture.name, bool(report.simulated))
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"powerd {picture.name}"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    return text.replace(INK, "currentColor")


def all_svg(report: Report) -> Sequence[tuple[Picture, str]]:
    """Every plot of this report."""
    return [(picture, svg(report, picture)) for picture in pictures(report)]
