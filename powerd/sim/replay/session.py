"""Everything between a command line and a comparison: names, files, checks before anything runs, the report as a whole.

House rules: what cannot work is refused before the first policy runs, with the class or the tensor parallelism that it is about
and what would be needed; the report says what it was made of.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from powerd import resources
from powerd.errors import ConfigError, RequestError
from powerd.sim import enginemodels
from powerd.sim.replay import scenario as scenarios
from powerd.sim.replay.compare import Comparison, Summary
from powerd.sim.replay.policies import POLICIES, cluster_config, known
from powerd.sim.replay.runner import Setting
from powerd.sim.replay.scenario import Scenario
from powerd.sim.replay.signals import carbon, energy_price
from powerd.sim.replay.trace import Trace, read
from powerd.sim.replay.workload import Workload, workload
from powerd_policies.dynamollm.classes import NAMES, Classes
from powerd_policies.dynamollm.engine_model import EngineModel


def shipped_hour() -> Path:
    """The conversation trace that ships with powerd."""
    return resources.folder("profiles") / "traces" / "azure_llm_2023_conversation.csv.gz"


def first_half(trace: Trace) -> Trace:
    """Return the first half of a trace's time: what forecasts learn lengths from when there is no history."""
    return trace.between(0.0, trace.length_s / 2)


def chosen(names: str) -> list[str]:
    """Return the policies of a comma-separated list; RequestError with the nearest name for one that there is not."""
    found = list(dict.fromkeys(name.strip().lower() for name in names.split(",") if name.strip()))
    for name in found:
        if name not in POLICIES:
            close = difflib.get_close_matches(name, POLICIES, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(POLICIES)}"
            raise RequestError(f"there is no policy {name!r}", hint=hint, code="bad_value")
    return found


def scenario(path: Path | None, load: float | None = None) -> Scenario:
    """Read a scenario; ``load`` in place of its own."""
    found = scenarios.load(path)
    return found if load is None else replace(found, run=replace(found.run, load=load))


def prepare(trace: Trace, scenario: Scenario, history: Trace | None = None, model: EngineModel | None = None) -> Comparison:
    """Return what policies are run with; RequestError or ConfigError for what cannot be served by any fleet.

    ``model`` in place of the scenario's is for studies of its assumptions.
    """
    try:
        model = model or enginemodels.load(scenario.engine.model)
    except RequestError as error:
        raise ConfigError(f"engine.model: {error.message}", hint=error.hint) from None
    classes = scenario.request_classes()
    past = history or first_half(read(shipped_hour()))
    work = workload(trace, scenario, past)
    check(model, classes, work, scenario)
    setting = Setting(
        model, classes, cluster_config(scenario), scenario.gpus, carbon(scenario.prices, trace.begin_week_s),
        energy_price(scenario.prices, trace.begin_week_s), sample_s=max(5.0, trace.length_s / 1000),
    )  # fmt: skip
    return Comparison(scenario, work, setting, known(scenario, trace, history, past))


def check(model: EngineModel, classes: Classes, work: Workload, scenario: Scenario) -> None:
    """Refuse a model without the tensor parallelism of the baseline, and promises that an idle instance at full clock breaks."""
    if scenario.cluster.gpus_per_node not in model.tps:
        held = ", ".join(map(str, model.tps))
        raise ConfigError(
            f"engine model {model.name} holds TP {held}, not TP {scenario.cluster.gpus_per_node} that SinglePool needs",
            hint="profile it, or set cluster.gpus_per_node",
        )
    chunk = scenario.engine.chunk_tokens
    for n, name in enumerate(NAMES):
        here = work.requests.true_class == n
        if not here.any():
            continue
        slo, tokens = classes.slos[name], int(np.percentile(work.requests.prompt_tokens[here], 90))
        best = [model.table[tp, model.clocks_mhz(tp)[0]] for tp in model.tps]
        ttft_s = min(sum(at.iteration_s(min(chunk, tokens - done), 0) for done in range(0, tokens, chunk)) for at in best)
        tbt_s = min(at.iteration_s(0, 1) for at in best)
        for what, least_s, promised_s in (("TTFT", ttft_s, slo.ttft_s), ("TBT", tbt_s, slo.tbt_s)):
            if least_s > promised_s:
                of_what = (
                    f"for a prompt of {tokens} tokens, which one in ten exceeds" if what == "TTFT" else "for one request alone"
                )
                raise RequestError(
                    f"class {name}: {what} of {promised_s:g} s cannot be kept: "
                    f"an idle instance at full clock needs {least_s:.3g} s {of_what}",
                    hint=f"promise at least {least_s * 1.2:.2g} s, or use an engine model that is faster", code="bad_value",
                )  # fmt: skip


def report(comparison: Comparison, summaries: Sequence[Summary]) -> dict[str, Any]:
    """Return report.json."""
    trace = comparison.workload.trace
    return {
        "trace": {"name": trace.name, "requests": len(trace), "length_s": trace.length_s, "requests_per_s": trace.requests_per_s},
        "scenario": asdict(comparison.scenario),
        "modelled": comparison.setting.model.origin,
        "policies": {summary.policy: summary.entry for summary in summaries},
    }
