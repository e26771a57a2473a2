"""The traces that policies are judged on, what may be known before each, and the load that is called 1.0.

House rules: knobs were fixed under other seeds than ``SEED`` (of the hour's jitter, of a day); what is reported is of it,
histories are of ``HISTORY_SEED``; load 1.0 is the largest at which SinglePool keeps 99 % of requests within their SLO, found
by bisection.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

from powerd.sim import enginemodels
from powerd.sim.replay import policies, report, runner, scale, search, session
from powerd.sim.replay.compare import Comparison
from powerd.sim.replay.generate import DAY_S, Shape, generate
from powerd.sim.replay.scenario import Scenario
from powerd.sim.replay.trace import WEEK_S, Trace, read
from powerd_policies.dynamollm.engine_model import EngineModel

SEED, HISTORY_SEED = 101, 7
SHAPE = Shape(requests_per_s=20.0)
CACHE = Path(".cache/dynamollm")
TOLERANCE = 0.005


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A trace at its own load, and the weeks before it."""

    name: str
    trace: Trace
    history: Trace | None


@cache
def hour() -> Case:
    """The published conversation trace; nobody published what came before it."""
    return Case("hour", read(session.shipped_hour()), None)


@cache
def lengths() -> Trace:
    """The requests whose lengths generated traces draw: the second half, as predictors learned from the first."""
    whole = hour().trace
    return whole.between(whole.length_s / 2, whole.length_s)


@cache
def past() -> Trace:
    """A week of another seed."""
    return generate(session.first_half(hour().trace), WEEK_S, HISTORY_SEED, SHAPE)


def day(seed: int = SEED) -> Case:
    """A Wednesday."""
    return Case("day", generate(lengths(), DAY_S, seed, SHAPE, begin_week_s=2 * DAY_S), past())


def week(seed: int = SEED) -> Case:
    """Monday to Sunday."""
    return Case("week", generate(lengths(), WEEK_S, seed, SHAPE), past())


def prepared(case: Case, load: float, scenario: Scenario, model: EngineModel | None = None) -> Comparison:
    """The case at a load, as policies are run on it; the history is at the same load, as a service's own past would be."""
    history = None if case.history is None else _scaled(case.history, load, HISTORY_SEED)
    return session.prepare(_scaled(case.trace, load, scenario.run.seed), scenario, history, model)


@lru_cache(maxsize=4)
def _scaled(trace: Trace, load: float, seed: int) -> Trace:
    return scale.scaled(trace, load, seed)


def full_load(case: Case, scenario: Scenario, told: Callable[[str], None] = lambda text: None) -> float:
    """Return load 1.0 of a case; kept on disk, as the search takes minutes for a week."""
    model = enginemodels.load(scenario.engine.model)
    given = asdict(scenario)
    for key in ("energy_mean_usd_per_kwh", "energy_midday_dip", "energy_evening_rise"):
        del given["prices"][key]  # no price changes what SinglePool keeps
    made_of = repr((case.name, case.trace.name, len(case.trace), sorted(model.table.items()), given, TOLERANCE))
    kept = CACHE / f"load-{case.name}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.json"
    if kept.exists():
        return float(json.loads(kept.read_text())["load"])

    def keeps(factor: float) -> bool:
        inner = session.prepare(scale.scaled(case.trace, factor, scenario.run.seed), scenario)
        controller = policies.single_pool(inner.setting, scenario.cluster.gpus_per_node)
        outcome = runner.replay(controller, inner.workload, inner.setting)
        kept, _ = report.attainment(outcome, inner.workload, inner.setting.classes)
        told(f"{case.name} at {factor:.3f}: {kept:.3%} in SLO")
        return kept >= search.KEPT

    load = search.largest_load(keeps, tolerance=TOLERANCE)
    CACHE.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"load": load, "case": case.name}))
    return load


def without(scenario: Scenario, section: str, **changes: object) -> Scenario:
    """The scenario with other values in one section."""
    return replace(scenario, **{section: replace(getattr(scenario, section), **changes)})  # type: ignore[arg-type]
