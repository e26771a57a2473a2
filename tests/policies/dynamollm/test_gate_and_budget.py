"""Changes that pay, and watts that are kept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from powerd.sim import enginemodels
from powerd_policies.dynamollm.budget import Draw, WattBudget
from powerd_policies.dynamollm.gate import Gate, reshard_j
from powerd_policies.dynamollm.overheads import Fixes, Overheads
from powerd_policies.dynamollm.pool import Shape

MODEL = enginemodels.load()
DRAWS = st.lists(
    st.builds(
        Draw,
        tp=st.sampled_from((2, 4, 8)),
        count=st.integers(1, 6),
        clock_mhz=st.sampled_from((1080, 1530, 1980)),
        prompt_tokens_per_s=st.floats(0, 5000),
        output_tokens_per_s=st.floats(0, 1500),
    ),
    min_size=1,
    max_size=6,
)


@given(saves_w=st.floats(-1e4, 1e4), costs_j=st.floats(0, 1e7))
def test_only_what_saves_more_than_it_costs_within_the_horizon_passes(saves_w: float, costs_j: float) -> None:
    verdict = Gate(horizon_s=600.0).ask(1000.0, "LL", saves_w, costs_j)
    assert verdict.act == (saves_w * 600.0 > costs_j)
    assert verdict.why


def test_the_same_subject_changes_once_in_five_minutes() -> None:
    gate = Gate()
    acted = []
    for at_s in range(0, 3600, 5):
        if gate.ask(float(at_s), "LL", 1e6, 1.0).act:
            gate.did(float(at_s), "LL")
            acted.append(at_s)
    assert acted == list(range(0, 3600, 300))
    assert gate.ask(1.0, "another", 1e6, 1.0).act


@given(draws=DRAWS, budget_w=st.floats(500, 40_000))
def test_a_ceiling_keeps_the_budget_or_says_that_none_does(draws: list[Draw], budget_w: float) -> None:
    budget = WattBudget(MODEL, budget_w)
    found = budget.ceiling(draws)
    power_w = budget.power_w(draws, found.clock_mhz)
    assert found.kept == (power_w <= budget_w) or found.kept
    if found.kept:
        assert power_w <= budget_w
    else:
        assert found.clock_mhz == min(clock for _, clock in MODEL.table)
    if found.clock_mhz is None:
        assert power_w == budget.power_w(draws)


def test_measured_watts_above_the_model_lower_the_ceiling_at_once_and_are_forgotten_slowly() -> None:
    draws = [Draw(4, 10, 1980, 2000.0, 500.0)]
    budget = WattBudget(MODEL, 1.15 * WattBudget(MODEL, 1.0).power_w(draws))
    assert budget.ceiling(draws).clock_mhz is None
    budget.learn(1.3, 1.0)
    low = budget.ceiling(draws).clock_mhz
    assert low is not None
    budget.learn(1.0, 1.0)
    assert budget.ceiling(draws).clock_mhz is not None
    for _ in range(100):
        budget.learn(1.0, 1.0)
    assert budget.ceiling(draws).clock_mhz is None
    budget.learn(None, 1.0)
    assert budget.ceiling(draws).clock_mhz is None


def test_a_clock_that_is_not_known_draws_as_the_highest_and_one_between_as_the_next_higher() -> None:
    """A live replica that drains says 0 where nobody holds its clock, or what its GPUs have."""
    budget = WattBudget(MODEL, 1e6)
    top, second = MODEL.clocks_mhz(4)[:2]

    def watts(clock_mhz: int) -> float:
        return budget.power_w([Draw(4, 1, clock_mhz, 2000.0, 500.0)])

    assert watts(0) == watts(top + 15) == watts(second + 1) == watts(top)
    assert watts(second - 1) == watts(second)
    assert watts(1) == watts(MODEL.clocks_mhz(4)[-1])


def test_a_reshard_costs_what_a_matching_leaves_to_be_moved_and_a_start_what_a_start_takes() -> None:
    weights = MODEL.weights_bytes
    have = {"LL": {8: 12}}
    full = reshard_j(have, {"LL": (Shape(4, 1980, 24),)}, 96, Overheads(), weights, 200.0)
    roomy = reshard_j({"LL": {8: 4}}, {"LL": (Shape(4, 1980, 8),)}, 96, Overheads(), weights, 200.0)
    assert 0 < full < 96 * 200.0 * 10  # seconds of copies
    assert roomy == 32 * 200.0 * Overheads().start_s()
    assert reshard_j(have, {"LL": (Shape(8, 1980, 12),)}, 96, Overheads(), weights, 200.0) == 0.0
    naive = reshard_j(have, {"LL": (Shape(4, 1980, 24),)}, 96, Overheads(Fixes(matching=False)), weights, 200.0)
    assert naive > full


@given(draws=DRAWS, budget_w=st.floats(500, 40_000), seen=st.floats(0.1, 1.0))
def test_a_strict_budget_holds_whatever_the_instances_compute_and_never_counts_on_less(
    draws: list[Draw], budget_w: float, seen: float
) -> None:
    budget = WattBudget(MODEL, budget_w, strict=True)
    budget.learn(seen, 1.0)  # less than the peak is drawn most of the time
    found = budget.ceiling(draws)
    top_w = 0.0
    for draw in draws:
        clocks = MODEL.clocks_mhz(draw.tp)
        asked = draw.clock_mhz if found.clock_mhz is None else min(draw.clock_mhz, found.clock_mhz)
        at = MODEL.table[draw.tp, next((clock for clock in clocks if clock <= asked), clocks[-1])]
        top_w += (
            draw.count * draw.tp * max(at.iteration_j(p, d) / at.iteration_s(p, d) for p, d in ((512, 0), (0, 256), (512, 40)))
        )
    assert top_w <= budget_w or not found.kept
