"""One trace at several loads under all policies: the table, and the promises that it keeps or breaks.

House rules: SinglePool is what savings are against; BestStatic is searched anew for every load; a promise that is broken says by
how much and fails the command; everything is modelled.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.dynamollm.traces import Case, full_load, prepared
from benchmarks.report import Progress, Report, Table
from powerd.sim.replay.compare import compare
from powerd.sim.replay.scenario import Scenario

BASE, FULL, STATIC = "singlepool", "dynamollm", "beststatic"
SINGLE_KNOBS = ("scaleinst", "scaleshard", "scalefreq")
ALL = (BASE, "multipool", *SINGLE_KNOBS, STATIC, FULL)
LOADS = (1.0, 0.7, 0.5)
#: The least saving of the full policy, by case and load.
LEAST = {("hour", 1.0): 0.25, ("hour", 0.7): 0.40, ("day", 1.0): 0.40, ("week", 1.0): 0.40}
#: By how much it has to be ahead of BestStatic at load 1.0.
AHEAD = {"hour": -0.01, "day": 0.08, "week": 0.08}
KNOB_SLACK = 0.005


@dataclass(slots=True)
class Study:
    """What came of one case."""

    case: Case
    load: float  # the factor that is called 1.0
    rows: dict[float, dict[str, dict[str, Any]]] = field(default_factory=dict)  # load -> policy -> entry of report.json


def run(case: Case, scenario: Scenario, loads: Sequence[float], names: Sequence[str], jobs: int, progress: Progress) -> Study:
    """Find load 1.0 and replay every policy at every load."""
    study = Study(case, full_load(case, scenario, _say))
    for n, load in enumerate(loads):
        comparison = prepared(case, load * study.load, scenario)
        done = compare(names, comparison, jobs, lambda at, of, n=n: progress((n + at / of) / len(loads)))  # type: ignore[misc]
        study.rows[load] = {summary.policy: summary.entry for summary in done}
        for summary in done:
            _say(f"{case.name} at {load:g}: {summary.policy} {summary.entry['energy_kwh']:.4g} kWh, "
                 f"{summary.entry['slo_attainment']:.3%} in SLO")  # fmt: skip
    progress(1.0)
    return study


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def saving(rows: dict[str, dict[str, Any]], name: str, key: str = "energy_kwh") -> float:
    """Return by what share a policy is below SinglePool."""
    return 1.0 - float(rows[name][key]) / float(rows[BASE][key])


def worst_class(entry: dict[str, Any]) -> tuple[str, float]:
    """Return the class that keeps its SLO least often."""
    shares = {name: made["slo_attainment"] for name, made in entry["classes"].items() if made["slo_attainment"] is not None}
    return min(shares.items(), key=lambda item: item[1])


def table(study: Study) -> Table:
    """One row per load and policy."""
    header = ("load", "policy", "energy (kWh)", "saving", "saving, off GPUs at 72 W", "GPU-hours", "power p50", "power p99",
              "in SLO", "worst class", "TTFT p99 of it", "rejected")  # fmt: skip
    made = []
    for load, rows in study.rows.items():
        for name, entry in rows.items():
            worst, share = worst_class(entry)
            made.append((
                f"{load:g}", name, f"{entry['energy_kwh']:.4g}", f"{saving(rows, name):.1%}",
                f"{saving(rows, name, 'energy_kwh_off_72w'):.1%}", f"{entry['gpu_hours']:.4g}",
                f"{entry['power_p50_w'] / 1000:.1f} kW", f"{entry['power_p99_w'] / 1000:.1f} kW",
                f"{entry['slo_attainment']:.2%}",
                f"{worst} {share:.1%}", f"{1000 * (entry['classes'][worst]['ttft_p99_s'] or 0):.0f} ms", str(entry["rejected"]),
            ))  # fmt: skip
    return Table(header, tuple(made))


def promises(study: Study) -> list[tuple[str, bool]]:
    """Return every promise about this study with whether it is kept."""
    found: list[tuple[str, bool]] = []
    name = study.case.name
    for load, rows in study.rows.items():
        where = f"{name} at {load:g}"
        for policy in (BASE, FULL, STATIC):
            if policy in rows:
                kept, (worst, share) = rows[policy]["slo_attainment"], worst_class(rows[policy])
                found.append(
                    (
                        f"{where}: {policy} keeps {kept:.2%} in SLO (99 %), {worst} {share:.1%} (95 %)",
                        kept >= 0.99 and share >= 0.95,
                    )
                )
        if (least := LEAST.get((name, load))) is not None:
            found.append(
                (f"{where}: dynamollm saves {saving(rows, FULL):.1%} (at least {least:.0%})", saving(rows, FULL) >= least)
            )
        if load == 1.0 and STATIC in rows:
            ahead = saving(rows, FULL) - saving(rows, STATIC)
            text = f"{where}: dynamollm is {100 * ahead:+.1f} points ahead of beststatic (at least {100 * AHEAD[name]:+.0f})"
            found.append((text, ahead >= AHEAD[name]))
        for policy in SINGLE_KNOBS:
            if policy in rows:
                alone = saving(rows, policy)
                found.append((f"{where}: {policy} alone saves {alone:.1%} (from -0.5 points to the full policy's less 0.5)",
                              -KNOB_SLACK <= alone <= saving(rows, FULL) - KNOB_SLACK))  # fmt: skip
    return found


def tell(report: Report, study: Study) -> bool:
    """Put a study into a report; whether all its promises are kept."""
    report.tables.append(table(study))
    report.notes.append(
        f"Load 1.0 is {study.load:.3f} times the trace's own: {study.load * study.case.trace.requests_per_s:.1f} requests/s."
    )
    for rows_load, rows in study.rows.items():
        if told := rows.get(STATIC, {}).get("fleet"):
            report.notes.append(f"BestStatic at {rows_load:g}: {told}.")
    verdicts = promises(study)
    report.notes += [f"{'kept' if kept else 'NOT KEPT'}: {text}" for text, kept in verdicts]
    return all(kept for _, kept in verdicts)
