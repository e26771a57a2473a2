"""The saving over what no public measurement says: how decode slows with the clock, and where the voltage's knee is.

House rules: the worst end comes first; every model is built anew from the measurements; load 1.0 is the reference's, since at the
highest clock nothing of this matters to SinglePool's latency; no knob is turned for any of them.
"""

from __future__ import annotations

import functools

from benchmarks.dynamollm.study import BASE, FULL, STATIC, saving, worst_class
from benchmarks.dynamollm.traces import Case, full_load, prepared, without
from benchmarks.report import Progress, Table
from powerd import resources
from powerd.sim.replay.compare import compare
from powerd.sim.replay.scenario import Scenario
from powerd_policies.dynamollm import fit
from powerd_policies.dynamollm.engine_model import EngineModel

SENSITIVITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
CHUNKS = (384, 512, 640, 768)
KNEES = (0.65, 0.77, 0.9)


@functools.cache
def model(sensitivity: float, knee: float) -> EngineModel:
    """Return Llama-2-70B on H100 under these assumptions."""
    folder = resources.folder("profiles") / "llm"
    rows = fit.latencies((folder / "splitwise_llama2-70b.csv").read_text(encoding="utf-8"))
    watts = fit.batch_powers((folder / "mlenergy_v2.csv").read_text(encoding="utf-8"))
    assumed = fit.Assumptions(sensitivity=sensitivity, knee=knee)
    return fit.build(rows, fit.H100, fit.LLAMA2_70B, assumed, fit.of_gpu(watts, fit.H100))


def by_chunk(case: Case, scenario: Scenario, progress: Progress) -> Table:
    """Return load 1.0 and the savings at it for other sizes of a chunk, the same for every policy; each has its own load 1.0."""
    rows = []
    for n, chunk in enumerate(CHUNKS):
        own = without(scenario, "engine", chunk_tokens=chunk)
        load = full_load(case, own)
        made = {summary.policy: summary.entry for summary in compare((BASE, STATIC, FULL), prepared(case, load, own))}
        cells = (f"{saving(made, STATIC):.1%}", made[STATIC]["fleet"], f"{saving(made, FULL):.1%}")
        rows.append((str(chunk), f"{load * case.trace.requests_per_s:.1f}", *cells, f"{made[FULL]['slo_attainment']:.2%}"))
        progress((n + 1) / len(CHUNKS))
    header = ("chunk (tokens)", "load 1.0 (requests/s)", f"{STATIC} saves", "its fleet", f"{FULL} saves", f"{FULL} in SLO")
    return Table(header, tuple(rows))


def table(case: Case, scenario: Scenario, progress: Progress, names: tuple[str, ...] = (BASE, STATIC, FULL)) -> Table:
    """Return the savings at load 1.0 for every pair of assumptions."""
    load, rows = full_load(case, scenario), []
    pairs = [(sensitivity, knee) for sensitivity in SENSITIVITIES for knee in KNEES]
    for n, (sensitivity, knee) in enumerate(pairs):
        comparison = prepared(case, load, scenario, model(sensitivity, knee))
        made = {summary.policy: summary.entry for summary in compare(names, comparison)}
        worst, share = worst_class(made[FULL])
        cells = [f"{sensitivity:g}", f"{knee:g}", *(f"{saving(made, name):.1%}" for name in names[1:])]
        rows.append(
            (*cells, f"{made[FULL]['slo_attainment']:.2%}", f"{worst} {share:.1%}", f"{made[BASE]['slo_attainment']:.2%}")
        )
        progress((n + 1) / len(pairs))
    header = ("sensitivity", "knee", *(f"{name} saves" for name in names[1:]), f"{FULL} in SLO", "worst class", f"{BASE} in SLO")
    return Table(header, tuple(rows))
