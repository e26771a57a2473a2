"""The picture of the serving part: power, SM clock, TTFT and TBT of both policies over time.

House rules: nothing is computed here that the table does not show; one colour per policy; the title says simulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerd.plot import new_figure, save_figure

if TYPE_CHECKING:
    from powerd.demo.service import Served

COLORS = ("0.45", "tab:blue")


def draw(paths: Sequence[Path], served: Sequence[Served], setting: dict[str, Any]) -> None:
    """Draw all policies into one picture per path."""
    figure = new_figure(9.0, 8.0)
    power, clock, ttft, tbt = figure.subplots(4, 1, sharex=True)
    for policy, color in zip(served, COLORS, strict=False):
        times = [sample["at_s"] for sample in policy.samples]
        label = f"{policy.name}: {policy.energy.energy_j / 1000:.0f} kJ"
        power.plot(times, [_number(sample["power_w"]) for sample in policy.samples], color=color, linewidth=1, label=label)
        clock.step(times, [_number(sample["clock_mhz"]) for sample in policy.samples], where="post", color=color, linewidth=1,
                   label=policy.fleets)  # fmt: skip
        for axes, what in ((ttft, "ttft_s"), (tbt, "tbt_p99_s")):
            points = [(request["at_s"], request[what]) for request in policy.requests if request[what] is not None]
            axes.plot([x for x, _ in points], [y for _, y in points], ".", color=color, markersize=3, alpha=0.6, rasterized=True)
    for event in served[-1].events:
        if event["kind"] == "reconfigured" and event["at_s"] > 0:
            clock.axvline(event["at_s"], color=COLORS[-1], linewidth=0.8, linestyle=":")
            clock.annotate(event["detail"], (event["at_s"], 0.04), xycoords=("data", "axes fraction"), fontsize=7, rotation=90)
    for axes, limits in ((ttft, sorted(set(setting["ttft_s"].values()))), (tbt, [setting["tbt_s"]])):
        for limit_s in limits:
            axes.axhline(limit_s, color="tab:orange", linewidth=0.8, linestyle="--")
    for axes, text in (
        (power, "all GPUs (W), every 5 s"),
        (clock, "mean SM clock (MHz)"),
        (ttft, "TTFT (s)"),
        (tbt, "p99 of TBT (s)"),
    ):
        axes.set_ylabel(text, fontsize=8)
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    power.legend(fontsize=8, loc="upper right")
    clock.legend(fontsize=8, loc="lower right")
    tbt.set_xlabel("time (s); dashed: SLO", fontsize=8)
    power.set_title(
        f"Llama-2-70B on {setting['gpus']} H100, {setting['requests']} conversation requests (simulated)", fontsize=10
    )
    for path in paths:
        save_figure(figure, path)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
