"""The online search for a clock, scored on measured and invented curves: how much of the possible saving it misses.

House rules: seeded and exact; blocks are noisy, 0.3 % in time and 0.6 % in energy (standard deviations), on top of a drift of
+-3 % over some tens of blocks, as of a GPU that warms up; reports come one block late, as from a daemon.
"""

from __future__ import annotations

import csv
import math
import random
from collections import defaultdict

from benchmarks.report import Progress, Report
from powerd.resources import folder
from powerd_integrations.search import Search, SearchOptions, SearchState

Curve = dict[int, tuple[float, float]]  # clock -> seconds and joules per step

TIME_NOISE, ENERGY_NOISE, DRIFT = 0.003, 0.006, 0.03


def measured() -> dict[str, Curve]:
    """Forward and backward of every stage of the measured profiles, as one step."""
    curves: dict[str, Curve] = {}
    for gpu in ("a100_sxm", "a40"):
        rows: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
        with (folder("profiles") / f"stage_profile_gpt3-175b_{gpu}.csv").open() as file:
            for row in csv.DictReader(file):
                rows[int(row["stage"]), int(row["frequency"])].append((float(row["time"]), float(row["energy"])))
        for (stage, clock), both in rows.items():
            if len(both) == 2:
                curves.setdefault(f"{gpu} stage {stage}", {})[clock] = (both[0][0] + both[1][0], both[0][1] + both[1][1])
    return curves


def invented(number: int) -> Curve:
    """Some share of time that follows the clock, a knee of the voltage curve, perhaps a power cap above some clock."""
    rng = random.Random(number)  # noqa: S311
    share, knee, static = rng.uniform(0, 1), rng.uniform(0.4, 0.75), rng.uniform(0.1, 0.5)
    cap = rng.choice([1.0, 1.0, rng.uniform(0.85, 1)])
    curve = {}
    for clock in range(210, 1981, 15):
        x = min(clock / 1980, cap)
        time_s = (1 - share) + share / x
        curve[clock] = (time_s, 400 * time_s * (static + (1 - static) * x * max(x, knee) ** 2))
    return curve


CURVES = {**measured(), **{f"invented {n}": invented(n) for n in range(12)}}


def run(curve: Curve, options: SearchOptions, seed: str, noise: float = 1.0) -> tuple[Search, int]:
    """A whole search on a curve; the search and how many blocks it took."""
    rng = random.Random(seed)  # noqa: S311
    search, late, blocks = Search(list(curve), options), [], 0
    phase, pace = rng.uniform(0, 6), rng.uniform(0.02, 0.2)
    while search.state is SearchState.SEARCHING:
        trial = search.propose()
        time_s, energy_j = curve[trial.clock_mhz]
        drift = 1 + noise * DRIFT * math.sin(phase + pace * blocks)
        late.append(
            (
                trial.number,
                time_s * drift * math.exp(noise * rng.gauss(0, TIME_NOISE)),
                energy_j * drift * math.exp(noise * rng.gauss(0, ENERGY_NOISE)),
            )
        )
        blocks += 1
        if len(late) > 1:
            search.report(*late.pop(0))
    return search, blocks


def missed(curve: Curve, search: Search, slowdown: float) -> float:
    """The share of the energy at the top clock that a better choice within the slowdown would have saved more."""
    top_s, top_j = curve[max(curve)]
    least_j = min(e for t, e in curve.values() if t <= (1 + slowdown) * top_s)
    return (curve[search.clock_mhz][1] - least_j) / top_j


def search_clocks(report: Report, progress: Progress, seeds: int = 20) -> None:
    """The online search for a clock on measured and invented curves."""
    report.title = "online search for the clock of least energy, simulated blocks of steps with noise"
    slowdowns = (0.02, 0.05, 0.10)
    for number, slowdown in enumerate(slowdowns):
        regrets, over, blocks = [], [], []
        for name, curve in CURVES.items():
            for seed in range(seeds):
                search, count = run(curve, SearchOptions(slowdown=slowdown), f"{name}/{seed}")
                regrets.append(100 * missed(curve, search, slowdown))
                over.append(100 * (curve[search.clock_mhz][0] / curve[max(curve)][0] - 1 - slowdown))
                blocks.append(count)
        label = f"{100 * slowdown:.0f} % slowdown allowed"
        promised = "<= 1.5" if slowdown == 0.05 else ""
        for what, values, share, unit in (
            ("missed saving, median", regrets, 0.5, "points"), ("missed saving, 95 % of searches", regrets, 0.95, "points"),
            ("over the slowdown, worst", over, 1.0, "points"), ("blocks, median", blocks, 0.5, "blocks"),
        ):  # fmt: skip
            value = sorted(values)[min(len(values) - 1, int(share * len(values)))]
            report.add(f"{label}: {what}", value, unit, promised if "95 %" in what else "")
        progress((number + 1) / len(slowdowns))
    report.notes.append(
        f"{len(CURVES)} curves (every stage of the measured A100 and A40 profiles, the others invented), {seeds} seeds each."
    )
