"""`python -m benchmarks.dynamollm.accuracy`: what predicting the length of answers is worth, from 60 % right to knowing them.

House rules: the second half of the conversation trace is served, at load 1.0 of the whole; the real model learned from the
first; the same requests for every row, only the class by which they are routed and counted changes; everything is modelled.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np

from benchmarks.dynamollm import traces
from benchmarks.report import Progress, Report, Table, run
from powerd.sim.replay import compare, session
from powerd.sim.replay.compare import Comparison
from powerd_policies.dynamollm.lengths import Hints, LengthPredictor, LengthTable, NoisyOracle, Oracle, sizes_of

ACCURACIES = (0.6, 0.7, 0.8, 0.9)
#: With pools merged where that is cheaper, and with nine pools as published.
POLICIES = ("dynamollm", "dynamollm-paper")


def routed(comparison: Comparison, predictor: LengthPredictor) -> tuple[Comparison, float]:
    """Return the comparison with requests classified by a predictor, and the share of sizes that it said right."""
    requests, classes = comparison.workload.requests, comparison.setting.classes
    hints = Hints(requests.output_tokens, np.arange(len(requests)))
    said = predictor.predict(requests.prompt_tokens, hints)
    tokens = np.maximum(predictor.tokens(requests.prompt_tokens, hints), 1)
    told = replace(requests, routed_class=requests.true_class // 3 * 3 + said, predicted_tokens=tokens)
    right = float((said == sizes_of(requests.output_tokens, classes)).mean())
    return replace(comparison, workload=replace(comparison.workload, requests=told)), right


def measure(report: Report, progress: Progress) -> bool:
    """Energy and SLO against the accuracy of the output-length predictor."""
    report.title = "energy and SLO by accuracy of the output-length predictor (modelled)"
    scenario, hour = session.scenario(None), traces.hour()
    load = traces.full_load(hour, scenario)
    first, second = session.first_half(hour.trace), traces.lengths()
    comparison = traces.prepared(replace(hour, trace=second), load, scenario)
    table = LengthTable.train(first.prompt_tokens, first.output_tokens, comparison.setting.classes)
    noisy = [NoisyOracle(share, scenario.run.seed, comparison.setting.classes) for share in ACCURACIES]
    predictors: list[LengthPredictor] = [*noisy, Oracle(comparison.setting.classes), table]
    rows = []
    for n, predictor in enumerate(predictors):
        told, right = routed(comparison, predictor)
        cells = [predictor.name, f"{100 * right:.1f}"]
        for policy in POLICIES:
            entry = compare.one(policy, told).entry
            worst = min(found["slo_attainment"] for found in entry["classes"].values() if found["requests"])
            cells += [f"{entry['energy_kwh']:.2f}", f"{100 * entry['slo_attainment']:.2f}", f"{100 * worst:.1f}"]
        rows.append(tuple(cells))
        progress((n + 1) / len(predictors))
    head = [f"{policy}: {what}" for policy in POLICIES for what in ("kWh", "in SLO %", "worst class %")]
    report.tables.append(Table(("predictor", "right %", *head), tuple(rows)))
    report.notes += [
        f"Second half of the conversation trace at {load:.2f} times its own load (load 1.0); the table learned from the first.",
    ]
    return True


if __name__ == "__main__":
    sys.exit(run("dynamollm-accuracy", "python -m benchmarks.dynamollm.accuracy", measure))
