"""Every published policy as a configuration of one controller, and fixed fleets to compare them with.

House rules: a policy is a name and its knobs; what it knows beforehand is given to it; one controller, one predictor, one fleet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from powerd_policies.dynamollm import predictor as forecasts
from powerd_policies.dynamollm.capacity import Capacity, Lengths, assumed
from powerd_policies.dynamollm.classes import Classes
from powerd_policies.dynamollm.controller import Fleet, Predictor
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import FleetController, FleetPlan, FleetState, InstanceWant
from powerd_policies.dynamollm.fragments import PARTITIONS, routes
from powerd_policies.dynamollm.knobs import POLICIES, Knobs
from powerd_policies.dynamollm.overheads import Overheads
from powerd_policies.dynamollm.pool import Shape
from powerd_policies.dynamollm.reconcile import reconcile


def build(
    name: str,
    *,
    model: EngineModel,
    classes: Classes,
    gpus: int,
    lengths: Mapping[str, Lengths] | None = None,
    chunk_tokens: int = 512,
    overheads: Overheads | None = None,
    predictor: Predictor | None = None,
    knobs: Knobs | None = None,
) -> FleetController:
    """Return the controller of a policy by name (``knobs.POLICIES``); ``knobs`` in place of the policy's own.

    ``lengths`` is what is known beforehand of each class (``capacity.measured`` on a past trace; None: ``capacity.assumed``).
    A predictor belongs to one controller. Raises ValueError for an unknown name and for a model without the needed parallelism.
    """
    if knobs is None:
        if name not in POLICIES:
            raise ValueError(f"there is no policy {name!r}; there are {', '.join(POLICIES)}")
        knobs = POLICIES[name]
    if knobs.tp not in model.tps:
        raise ValueError(f"{name} needs tensor parallelism {knobs.tp}; the profile of {model.name} holds {model.tps}")
    classes = classes if knobs.pace is None else knobs.pace.apply(classes)
    known = {**assumed(classes), **(lengths or {})}
    capacity = Capacity(model, classes, known, chunk_tokens, knobs.share_late, tbt_margin=knobs.tbt_margin)
    return Fleet(name, knobs, capacity, gpus, overheads or Overheads(), predictor or forecaster())


#: The predictor as these controllers want it: they react within seconds, so the recent past is short.
FORECAST: Final = forecasts.Knobs(level_s=120.0, peak_s=120.0)


def forecaster(
    *,
    epoch_s: float = 0.0,
    history: Iterable[forecasts.Observed] = (),
    injected: forecasts.Injected | None = None,
    knobs: forecasts.Knobs = FORECAST,
) -> forecasts.LoadPredictor:
    """Return the predictor of one controller.

    ``history`` as ``LoadPredictor.learn`` takes it; ``epoch_s`` is where in the week time 0 lies.
    """
    found = forecasts.LoadPredictor(epoch_s=epoch_s, knobs=knobs, injected=injected)
    found.learn(history)
    return found


def static(
    tp: int, count: int, clock_mhz: int, *, model: EngineModel, classes: Classes | None = None, name: str = ""
) -> FleetController:
    """Return the controller of a fixed fleet; ValueError when the model has no such parallelism and clock."""
    if (tp, clock_mhz) not in model.table:
        raise ValueError(
            f"{model.name} holds no TP{tp} at {clock_mhz} MHz; it holds {model.tps} and {model.clocks_mhz(model.tps[0])}"
        )
    return Static(name or f"TP{tp}x{count}@{clock_mhz}", tp, count, clock_mhz)


class Static:
    """A fleet that never changes; who stops is replaced."""

    period_s = 60.0

    def __init__(self, name: str, tp: int, count: int, clock_mhz: int) -> None:
        self.name, self.tp, self.count, self.clock_mhz = name, tp, count, clock_mhz

    def decide(self, state: FleetState) -> FleetPlan:
        """Return the fixed fleet."""
        partition = PARTITIONS["one"]
        (pool,) = partition
        members = reconcile(state.instances, {pool: (Shape(self.tp, self.clock_mhz, self.count),)}, state.gpus)
        wants = tuple(InstanceWant(m.id, pool, m.tp, self.clock_mhz, reason="fixed") for m in members)
        return FleetPlan(wants, routes(partition, {pool: self.count}))
