"""Prefill and decode on instances of their own, each side at its clocks, beside mixed fleets: full simulation.

House rules: the same hour, load 1.0, requests and promises as everywhere; nothing is done for the split fleet that the mixed one
does not get; where it loses the table shows what it loses to; everything is modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.dynamollm.study import BASE, FULL, saving, worst_class
from benchmarks.dynamollm.traces import Case, full_load, prepared
from benchmarks.report import Progress, Report, Table
from powerd.sim.replay import compare
from powerd.sim.replay.compare import Comparison
from powerd.sim.replay.scenario import Scenario
from powerd_policies.dynamollm.phases import Links
from powerd_policies.dynamollm.splitphases import NAME

#: How fast a KV cache moves: the default first, then a node's NVLink, then not noticeably.
LINKS = (
    ("50 GB/s, 5 ms", Links()),
    ("200 GB/s, 5 ms", Links(bytes_per_s=200e9)),
    ("400 GB/s, 5 ms", Links(bytes_per_s=400e9)),
    ("at once", Links(bytes_per_s=1e15, fixed_s=0.0)),
)
LOADS_OF_LINKS = 2  # the first so many loads


def measure(report: Report, case: Case, scenario: Scenario, loads: Sequence[float], progress: Progress) -> bool:
    """Run mixed and split fleets, and the split one over faster links; whether every split fleet keeps 99 % in SLO."""
    full, steps, done = full_load(case, scenario), len(loads) + len(loads[:LOADS_OF_LINKS]), 0
    rows: list[tuple[str, ...]] = []
    for load in loads:
        comparison = prepared(case, load * full, scenario)
        entries = {name: compare.one(name, comparison).entry for name in (BASE, FULL, NAME)}
        rows += [(f"{load:g}", name, *_told(entries, name)) for name in entries]
        done += 1
        progress(done / steps)
    report.tables.append(Table(("load", "policy", *_HEADER), tuple(rows)))
    kept = all(_kept(row) for row in rows if row[1] == NAME)
    rows = []
    for load in loads[:LOADS_OF_LINKS]:
        comparison = prepared(case, load * full, scenario)
        entries = {name: compare.one(name, comparison).entry for name in (BASE, FULL)}
        rows.append((f"{load:g}", f"{FULL}: nothing moves", *_told(entries, FULL)))
        for what, links in LINKS:
            entries[NAME] = compare.one(NAME, _over(comparison, links)).entry
            rows.append((f"{load:g}", what, *_told(entries, NAME)))
        done += 1
        progress(done / steps)
    report.tables.append(Table(("load", f"KV caches of {NAME} move", *_HEADER), tuple(rows)))
    report.notes += [
        "TTFT is judged where the first token is made. The gap before the second holds the move, what is left of the iteration"
        " that the KV cache comes into, and its own first iteration; it is the P99 of every answer of fewer than 100 gaps.",
        "So short answers to long prompts decide how long an iteration of decode may take: about half of what the move leaves of"
        " the TBT. Small batches at high clocks follow; where KV caches move faster, batches grow and clocks fall.",
        "Clocks are means over GPUs and time of what was asked for. The energy of moving a KV cache is not in the model.",
    ]
    return kept and all(_kept(row) for row in rows)


_HEADER = (
    "energy (kWh)",
    "saving",
    "off GPUs at 72 W",
    "in SLO",
    "worst class",
    "GPU-hours",
    "prefill GPUs",
    "MHz",
    "decode GPUs",
    "MHz",
)


def _told(entries: dict[str, dict[str, Any]], name: str) -> tuple[str, ...]:
    entry = entries[name]
    worst, share = worst_class(entry)
    sides = [entry["sides"][role] if "sides" in entry else None for role in ("prefill", "decode")]
    clocks = [cell for side in sides for cell in ((f"{side['gpus']:.1f}", f"{side['clock_mhz']:.0f}") if side else ("", ""))]
    return (
        f"{entry['energy_kwh']:.4g}", f"{saving(entries, name):.1%}", f"{saving(entries, name, 'energy_kwh_off_72w'):.1%}",
        f"{entry['slo_attainment']:.2%}", f"{worst} {share:.1%}", f"{entry['gpu_hours']:.4g}", *clocks,
    )  # fmt: skip


def _kept(row: Sequence[str]) -> bool:
    return float(row[5].rstrip("%")) >= 99.0


def _over(comparison: Comparison, links: Links) -> Comparison:
    config = replace(comparison.setting.config, links=links)
    return replace(comparison, setting=replace(comparison.setting, config=config))
