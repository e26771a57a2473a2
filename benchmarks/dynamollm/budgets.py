"""What a watt budget costs and how well it is kept: the hour by load and budget, for the mean and at every moment.

House rules: budgets are shares of the most that the fleet draws without one in five seconds; everything is modelled; windows are
the replay's ticks, the first ones, in which nothing is known of the load, among them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.dynamollm import traces
from benchmarks.report import Progress, Table
from powerd.sim.replay import policies, report, session
from powerd.sim.replay.compare import Comparison
from powerd.sim.replay.runner import replay
from powerd_policies.dynamollm.knobs import POLICIES, Knobs

LOADS, SHARES = (1.0, 0.5), (0.85, 0.7)


def table(progress: Progress) -> Table:
    """Return one row for each load, budget and way of keeping it; of each load the fleet without a budget first."""
    scenario, case, rows = session.scenario(None), traces.hour(), []
    for n, load in enumerate(LOADS):
        comparison = traces.prepared(case, load * traces.full_load(case, scenario), scenario)
        power_w, energy_kwh, kept = _run(comparison, POLICIES["dynamollm"])
        most_w = float(power_w.max())
        rows.append((f"{load:g}", "none", "", "", "", f"{energy_kwh:.4g}", f"{kept:.2%}"))
        for share, strict in [(share, strict) for share in SHARES for strict in (False, True)]:
            budget_w = share * most_w
            power_w, energy_kwh, kept = _run(comparison, replace(POLICIES["dynamollm"], budget_w=budget_w, budget_strict=strict))
            rows.append((
                f"{load:g}", f"{budget_w / 1000:.1f} kW", "every moment" if strict else "mean", f"{power_w.max() / budget_w:.1%}",
                f"{(power_w > budget_w).mean():.2%}", f"{energy_kwh:.4g}", f"{kept:.2%}",
            ))  # fmt: skip
        progress((n + 1) / len(LOADS))
    header = ("load", "watt budget", "kept for", "highest 5 s of it", "windows above it", "energy (kWh)", "in SLO")
    return Table(header, tuple(rows))


def _run(comparison: Comparison, knobs: Knobs) -> tuple[NDArray[np.float64], float, float]:
    """Return the watts of every tick, kWh and the share in SLO."""
    setting, workload = comparison.setting, comparison.workload
    known = replace(comparison.known, knobs={"dynamollm": knobs})
    built = policies.build("dynamollm", comparison.scenario, workload, setting, known)
    outcome = replay(built.controller, workload, setting, config=built.config)
    kept, _ = report.attainment(outcome, workload, setting.classes)
    watts = np.asarray(outcome.results.power_w)[: int(workload.length_s // setting.config.tick_s)]
    return watts, outcome.results.total_j / report.J_PER_KWH, kept
