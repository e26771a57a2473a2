"""A pipeline's iteration as bars on a time axis, before (highest clocks) and after (the plan): in a terminal and as a picture.

House rules: everything comes from OUT.json; both halves share one time axis and one colour scale; matplotlib only when a picture
is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from powerd.errors import RequestError
from powerd_policies.perseus import dag, document
from powerd_policies.perseus.problem import Dag, Instruction, Kind

if TYPE_CHECKING:
    from rich.text import Text

LETTERS = {Kind.FORWARD: "F", Kind.BACKWARD: "B", Kind.INPUT: "I", Kind.WEIGHT: "W", Kind.RECOMPUTE: "R"}
KIND_COLOURS = {"F": "#4c72b0", "B": "#dd8452", "I": "#dd8452", "W": "#8c564b", "R": "#937860", "+": "0.5"}
KIND_NAMES = {"F": "forward", "B": "backward", "I": "backward, input", "W": "backward, weight", "R": "recompute", "+": "other"}


@dataclass(frozen=True, slots=True)
class Bar:
    """One computation on one rank."""

    rank: int
    start_s: float
    time_s: float
    letter: str
    microbatch: int
    mhz: int | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """One half of the picture."""

    title: str
    bars: tuple[Bar, ...]
    ranks: int
    iteration_time_s: float


def of_plan(content: Any, name: str) -> tuple[Timeline, ...]:
    """Before (where the file holds the baseline's clocks) and after, from a decoded OUT.json; RequestError when it is none."""
    try:
        rows = [(Instruction(r["stage"], r["instruction"], r["microbatch"]), r) for r in content["clocks"]]
        job = content.get("job")
        if job is not None:
            order = document.parse(job, name).ranks_order()
        else:
            stages = sorted({step.stage for step, _ in rows})
            by_start = sorted(rows, key=lambda row: row[1]["start_s"])
            order = [[step for step, _ in by_start if step.stage == stage] for stage in stages]
        graph = dag.build(order)
        rank = {_key(node): int(r) for node, r in zip(graph.nodes, graph.rank, strict=True)}
        after = tuple(
            Bar(rank[_key(step)], r["start_s"], r["time_s"], _letter(step.kind), step.microbatch, r["mhz"]) for step, r in rows
        )
        base = content["baseline"]
        saving = 1 - content["energy_j"] / base["energy_j"]
        slower = content["iteration_time_s"] / base["iteration_time_s"] - 1
        made = [Timeline(f"planned: {content['iteration_time_s']:.4g} s ({slower:+.1%}), {content['energy_j']:.4g} J "
                         f"({-saving:+.1%})", after, graph.ranks, content["iteration_time_s"])]  # fmt: skip
        if base.get("clocks"):
            made.insert(0, _before(graph, base))
    except (KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{name} is no plan: {error}", hint="`powerctl perseus plan JOB.json -o OUT.json` writes one",
                           code="bad_value") from error  # fmt: skip
    return tuple(made)


def _before(graph: Dag, base: Mapping[str, Any]) -> Timeline:
    highest = {(row["stage"], row["instruction"]): row for row in base["clocks"]}
    rows = [highest[node.stage, str(node.kind)] for node in graph.nodes]
    starts = graph.schedule(np.array([row["time_s"] for row in rows]))[0]
    bars = tuple(
        Bar(int(rank), float(start), row["time_s"], _letter(node.kind), node.microbatch, row["mhz"])
        for node, rank, start, row in zip(graph.nodes, graph.rank, starts, rows, strict=True)
    )
    title = f"highest clocks: {base['iteration_time_s']:.4g} s, {base['energy_j']:.4g} J"
    return Timeline(title, bars, graph.ranks, base["iteration_time_s"])


def _key(step: Instruction) -> tuple[int, str, int]:
    return step.stage, str(step.kind), step.microbatch


def _letter(kind: str) -> str:
    return LETTERS.get(Kind(kind), "+") if kind in set(Kind) else "+"


def clock_range(halves: Sequence[Timeline]) -> tuple[int, int]:
    """Lowest and highest clock of all, MHz; (0, 0) where clocks do not matter."""
    clocks = [bar.mhz for half in halves for bar in half.bars if bar.mhz is not None]
    return (min(clocks), max(clocks)) if clocks else (0, 0)


def text(halves: Sequence[Timeline], width: int) -> list[Text]:
    """The timeline for a terminal: a line per rank, a letter per moment, its background the clock (blue low, red high)."""
    from rich.text import Text

    low, high = clock_range(halves)
    total_s = max(half.iteration_time_s for half in halves)
    columns = max(20, width - 28)
    lines = []
    for half in halves:
        lines.append(Text(half.title))
        for rank in range(half.ranks):
            line = Text(f"rank {rank:3d} ")
            cells: list[Bar | None] = [None] * columns
            own = [bar for bar in half.bars if bar.rank == rank]
            for bar in own:
                first = int(bar.start_s / total_s * columns)
                for cell in range(first, max(first + 1, round((bar.start_s + bar.time_s) / total_s * columns))):
                    if cell < columns:
                        cells[cell] = bar
            for cell_bar in cells:
                if cell_bar is None:
                    line.append("·", style="bright_black")
                else:
                    line.append(cell_bar.letter, style=_style(cell_bar.mhz, low, high))
            clocks = [bar.mhz for bar in own if bar.mhz is not None]
            line.append(f" {min(clocks)}-{max(clocks)} MHz" if clocks else "")
            lines.append(line)
    return lines


def _style(mhz: int | None, low: int, high: int) -> str:
    if mhz is None:
        return "white on grey50"
    share = (mhz - low) / (high - low) if high > low else 1.0
    red, green, blue = round(60 + 180 * share), round(110 - 40 * abs(2 * share - 1)), round(220 - 180 * share)
    return f"white on rgb({red},{green},{blue})"


def draw(path: Path, halves: Sequence[Timeline], title: str) -> None:
    """The timeline as a picture: bars coloured by clock, with a strip below that says which computation it is."""
    from powerd import plot

    plot.check(path)
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch

    low, high = clock_range(halves)
    scale, colours_of = Normalize(low, max(high, low + 1)), colormaps["turbo"]

    def shade(mhz: int) -> Any:
        return colours_of((mhz - low) / max(1, high - low))

    figure = plot.new_figure(11, 1.2 + sum(0.45 + 0.32 * half.ranks for half in halves))
    grid = figure.add_gridspec(len(halves), 1)
    total_s = max(half.iteration_time_s for half in halves)
    letters: dict[str, None] = {}
    first = None
    for row, half in enumerate(halves):
        axes = figure.add_subplot(grid[row], sharex=first)
        first = first or axes
        for rank in range(half.ranks):
            own = [bar for bar in half.bars if bar.rank == rank]
            spans = [(bar.start_s, bar.time_s) for bar in own]
            colours = ["0.75" if bar.mhz is None else shade(bar.mhz) for bar in own]
            edge = 0.3 if len(half.bars) < 1000 else 0.0
            axes.broken_barh(spans, (rank - 0.42, 0.66), facecolors=colours, edgecolors="black", linewidths=edge)
            axes.broken_barh(spans, (rank + 0.24, 0.18), facecolors=[KIND_COLOURS[bar.letter] for bar in own], linewidths=0)
            letters |= dict.fromkeys(bar.letter for bar in own)
            for bar, colour in zip(own, colours, strict=True) if len(half.bars) <= 400 else ():
                ink = "black" if isinstance(colour, str) or sum(colour[:3]) > 1.2 else "white"
                middle_s = bar.start_s + bar.time_s / 2
                axes.text(middle_s, rank - 0.09, bar.microbatch, ha="center", va="center", fontsize=5, color=ink, clip_on=True)
        axes.set_ylim(half.ranks - 0.5, -0.5)
        axes.set_yticks(range(half.ranks))
        axes.set_ylabel("pipeline rank")
        axes.set_title(half.title, fontsize=9, loc="left")
        axes.set_xlim(0, total_s * 1.005)
        axes.axvline(half.iteration_time_s, color="black", linewidth=0.8)
    axes.set_xlabel("time (s)")
    figure.colorbar(ScalarMappable(scale, colours_of), ax=figure.axes, label="SM clock (MHz)", pad=0.01)
    figure.axes[0].legend(
        handles=[Patch(color=KIND_COLOURS[letter], label=KIND_NAMES[letter]) for letter in letters],
        fontsize=7, ncol=len(letters), loc="lower right", bbox_to_anchor=(1, 1.0), frameon=False,
    )  # fmt: skip
    figure.suptitle(title, fontsize=10)
    plot.save_figure(figure, path)
