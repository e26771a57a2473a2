"""Tables and pictures of a replay: what `powerctl dynamollm replay` shows.

House rules: every number shown is in report.json; everything says "modelled"; a saving is against the first policy of the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerd import plot
from powerd.cli.output import table

if TYPE_CHECKING:
    from rich.table import Table

    from powerd.sim.replay.compare import Summary

COLOURS = ("0.35", "tab:brown", "tab:olive", "tab:green", "tab:purple", "tab:orange", "tab:blue", "tab:red", "tab:pink")

WIDE = 160
NARROW = ("energy", "saving", "GPU-hours", "in SLO", "worst class", "rejected")


def energy_table(policies: dict[str, Any], title: str, width: int) -> Table:
    """One row per policy: energy, cost, promises; a narrow terminal gets what matters most."""
    rows = [_cells(made, next(iter(policies.values()))) for made in policies.values()]
    columns = [name for name in rows[0] if width >= WIDE or name in NARROW]
    shown = table("policy", *(f">{name}" for name in columns), title=title)
    for name, cells in zip(policies, rows, strict=True):
        shown.add_row(name, *(cells[column] for column in columns))
    return shown


def _cells(made: dict[str, Any], first: dict[str, Any]) -> dict[str, str]:
    shares = {n: c["slo_attainment"] for n, c in made["classes"].items() if c["slo_attainment"] is not None}
    worst = min(shares, key=lambda n: shares[n])
    return {
        "energy": f"{made['energy_kwh']:.4g} kWh",
        "saving": _saving(made, first, "energy_kwh"),
        "off GPUs at 72 W": _saving(made, first, "energy_kwh_off_72w"),
        "GPU-hours": f"{made['gpu_hours']:.4g}",
        "cost": f"{made['cost_usd']:.4g} USD",
        "carbon": "-" if made["carbon_kg"] is None else f"{made['carbon_kg']:.4g} kg",
        "power p50": f"{made['power_p50_w'] / 1000:.2f} kW",
        "p99": f"{made['power_p99_w'] / 1000:.2f} kW",
        "in SLO": f"{made['slo_attainment']:.2%}",
        "worst class": f"{worst} {shares[worst]:.1%}",
        "rejected": str(made["rejected"]),
        "unfinished": str(made["unfinished"]),
    }


def latency_table(policies: dict[str, Any]) -> Table:
    """One row per policy and class that occurs: latencies and energy of a request."""
    shown = table("policy", "class", ">requests", ">in SLO", ">TTFT p50", ">p99", ">TBT p50", ">p99", ">energy per request")
    for name, made in policies.items():
        for n, (label, row) in enumerate((label, row) for label, row in made["classes"].items() if row["requests"]):
            times = [_ms(row[key]) for key in ("ttft_p50_s", "ttft_p99_s", "tbt_p50_s", "tbt_p99_s")]
            joules = row["energy_per_request_j"]
            shown.add_row(
                "" if n else name, label, str(row["requests"]), f"{row['slo_attainment']:.2%}", *times, f"{joules:.4g} J"
            )
    return shown


def _saving(made: dict[str, Any], first: dict[str, Any], key: str) -> str:
    return "" if made is first or not first[key] else f"{1 - made[key] / first[key]:+.1%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value * 1000:.0f} ms"


def draw(path: Path, summaries: Sequence[Summary], title: str) -> None:
    """Draw energy bars, power and fleet over time, and latencies by policy."""
    figure = plot.new_figure(12, 11)
    grid = figure.add_gridspec(4, 2)
    figure.suptitle(f"{title} (modelled)", fontsize=11)
    colours = {s.policy: COLOURS[n % len(COLOURS)] for n, s in enumerate(summaries)}
    _bars(figure.add_subplot(grid[0, 0]), summaries, colours, "energy_kwh", "GPU energy (kWh)")
    _fleet(figure.add_subplot(grid[0, 1]), summaries[-1])
    _lines(figure.add_subplot(grid[1, :]), summaries, colours, "power_kw", "power of all GPUs (kW)").legend(fontsize=7, ncol=4)
    _lines(figure.add_subplot(grid[2, 0]), summaries, colours, "gpus", "GPUs that serve")
    _lines(figure.add_subplot(grid[2, 1]), summaries, colours, "clock_mhz", "mean SM clock (MHz)")
    _latencies(figure.add_subplot(grid[3, 0]), summaries, colours, "ttft", "TTFT p50 and p99 (s)")
    _latencies(figure.add_subplot(grid[3, 1]), summaries, colours, "tbt", "TBT p50 and p99 (s)")
    plot.save_figure(figure, path)


def _bars(axes: Any, summaries: Sequence[Summary], colours: dict[str, str], key: str, label: str) -> None:
    names = [s.policy for s in summaries]
    values = [s.entry[key] for s in summaries]
    axes.bar(names, values, color=[colours[name] for name in names])
    for n, value in enumerate(values):
        axes.annotate(
            f"{value / values[0] - 1:+.0%}" if n and values[0] else f"{value:.4g}",
            (n, value),
            ha="center",
            va="bottom",
            fontsize=7,
        )
    axes.set_ylabel(label, fontsize=8)
    axes.tick_params(axis="x", labelrotation=20, labelsize=7)


def _fleet(axes: Any, summary: Summary) -> None:
    """The last policy's GPUs by tensor parallelism, stacked."""
    kinds = [key for key in summary.series if key.startswith("tp")]
    times = [t / 3600 for t in summary.series["gpus"][0]]
    stacked = [[count * int(key[2:]) for count in summary.series[key][1]] for key in kinds]
    if stacked:
        axes.stackplot(times, stacked, labels=[key.upper() for key in kinds], step="post")
        axes.legend(fontsize=7)
    axes.set_ylabel(f"GPUs of {summary.policy}", fontsize=8)
    axes.set_xlabel("hours", fontsize=8)


def _lines(axes: Any, summaries: Sequence[Summary], colours: dict[str, str], key: str, label: str) -> Any:
    for summary in summaries:
        times, values = summary.series[key]
        axes.plot([t / 3600 for t in times], values, linewidth=0.9, color=colours[summary.policy], label=summary.policy)
    axes.set_ylabel(label, fontsize=8)
    axes.set_xlabel("hours", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    return axes


def _latencies(axes: Any, summaries: Sequence[Summary], colours: dict[str, str], what: str, label: str) -> None:
    classes = [name for name, row in summaries[0].entry["classes"].items() if row["requests"]]
    width = 0.8 / len(summaries)
    for n, summary in enumerate(summaries):
        rows = [summary.entry["classes"][name] for name in classes]
        low, high = ([row[f"{what}_p{q}_s"] or 0.0 for row in rows] for q in (50, 99))
        at = [c + width * (n - (len(summaries) - 1) / 2) for c in range(len(classes))]
        axes.vlines(at, low, high, color=colours[summary.policy], linewidth=2)
        axes.plot(at, high, "_", color=colours[summary.policy], markersize=5)
    axes.set_xticks(range(len(classes)), classes, fontsize=8)
    axes.set_ylabel(label, fontsize=8)
    axes.set_yscale("log")
    axes.grid(alpha=0.3, axis="y")
