"""The cheapest fixed fleet: the same as trying all, with far fewer evaluations."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from powerd.sim import enginemodels
from powerd_policies.dynamollm.beststatic import Evaluation, StaticFleet, search
from powerd_policies.dynamollm.capacity import Capacity, assumed, scaled
from powerd_policies.dynamollm.classes import Classes
from powerd_policies.dynamollm.predictor import Rate

MODEL, GPUS = enginemodels.load(), 32
CAPACITY = Capacity(MODEL, Classes(), assumed(Classes()))
SHAPE = {"MM": Rate(1.0, 500.0, 200.0), "LL": Rate(0.5, 1500.0, 200.0)}


@settings(max_examples=10, deadline=None)
@given(load=st.floats(1, 12), off=st.floats(0.8, 1.25))
def test_found_what_trying_all_finds(load: float, off: float) -> None:
    """``off`` is how wrong the model is about what a fleet holds."""
    demand = scaled(SHAPE, load)

    def evaluate(fleet: StaticFleet) -> Evaluation:
        served = CAPACITY.serve(fleet.tp, fleet.clock_mhz, fleet.count, scaled(demand, off))
        return Evaluation(1.0 if served.feasible else 0.9, 1.0, served.power_w)

    found = search(evaluate, CAPACITY, demand, demand, GPUS)
    everything = {
        fleet: evaluate(fleet)
        for tp, clock in MODEL.table
        for n in range(1, GPUS // tp + 1)
        for fleet in [StaticFleet(tp, n, clock)]
    }
    kept = {fleet: each.energy_j for fleet, each in everything.items() if each.keeps}
    if not kept:
        assert found.fleet is None
        return
    assert found.fleet is not None
    assert everything[found.fleet].keeps
    assert kept[found.fleet] <= 1.03 * min(kept.values())
    assert len(found.tried) < len(everything) / 3
