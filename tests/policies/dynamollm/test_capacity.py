"""What fleets hold: pooled, with whole chunks, and with short prompts behind long ones."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerd.sim import enginemodels
from powerd_policies.dynamollm.capacity import Capacity, Lengths, assumed, measured, scaled
from powerd_policies.dynamollm.classes import NAMES, Classes, Slo
from powerd_policies.dynamollm.predictor import Rate

CHAT = {
    "SS": Lengths(181, 55, ((1.0, 181),), 0.04), "SM": Lengths(168, 170, ((1.0, 168),), 0.1),
    "MS": Lengths(446, 78, ((0.8, 400), (0.2, 800)), 0.2), "ML": Lengths(985, 421, ((1.0, 985),), 0.1),
    "LS": Lengths(2981, 61, ((0.8, 2600), (0.2, 4100)), 0.15), "LL": Lengths(1111, 428, ((1.0, 1111),), 0.41),
}  # fmt: skip
LOAD = {n: Rate(k.share, k.share * k.prompt_tokens, k.share * k.output_tokens) for n, k in CHAT.items()}


@functools.cache
def capacity(chunk_tokens: int = 512, ttft_s: float | None = None, tbt_s: float = 0.1) -> Capacity:
    known = Classes() if ttft_s is None else Classes(slos={name: Slo(ttft_s, tbt_s) for name in NAMES})
    return Capacity(enginemodels.load(), known, {**assumed(known), **CHAT}, chunk_tokens)


def test_a_fleet_holds_more_than_its_instances_alone() -> None:
    one, four, sixteen = (capacity().holds(4, 1605, n, LOAD) / n for n in (1, 4, 16))
    assert one < four < sixteen
    assert sixteen > 1.3 * four  # the headroom goes with the square root


@settings(max_examples=40, deadline=None)
@given(tp=st.sampled_from((4, 8)), n=st.integers(1, 23), clock=st.sampled_from((1380, 1605, 1980)), factor=st.floats(0.1, 60))
def test_more_instances_and_less_load_never_serve_worse(tp: int, n: int, clock: int, factor: float) -> None:
    here = capacity().serve(tp, clock, n, scaled(LOAD, factor))
    if here.feasible:
        assert capacity().serve(tp, clock, n + 1, scaled(LOAD, factor)).feasible
        assert capacity().serve(tp, clock, n, scaled(LOAD, 0.8 * factor)).feasible
        assert here.late <= capacity().share_late
    else:
        assert here.lacks


def test_the_fewest_instances_keep_the_load_and_one_fewer_do_not() -> None:
    demand = scaled(LOAD, 30.0)
    n = capacity().least(4, 1605, demand, 24)
    assert n is not None
    assert capacity().serve(4, 1605, n, demand).feasible
    assert not capacity().serve(4, 1605, n - 1, demand).feasible
    assert capacity().least(4, 1605, scaled(LOAD, 500.0), 24) is None
    assert capacity().least(4, 1605, {}, 24) == 0


def test_a_chunk_that_takes_longer_than_a_gap_may_is_said_to() -> None:
    assert capacity(512).serve(4, 1980, 8, scaled(LOAD, 4.0)).feasible
    told = capacity(2048).serve(4, 1980, 8, scaled(LOAD, 4.0))
    assert not told.feasible
    assert "TBT of" in told.lacks
    assert capacity(2048, 2.0, 0.5).serve(4, 1980, 8, scaled(LOAD, 4.0)).feasible


def test_short_prompts_wait_behind_long_ones() -> None:
    short = {"SS": Rate(20.0, 20 * 181.0, 20 * 55.0)}
    mixed = short | {"LS": Rate(5.0, 5 * 2981.0, 5 * 61.0)}
    assert capacity().serve(4, 1605, 4, short).late < 0.2 * capacity().serve(4, 1605, 4, mixed).late


def test_lengths_are_of_the_trace_that_was_measured() -> None:
    found = measured(Classes(), [(100, 50), (200, 60), (3000, 400), (9000, 5)])
    assert set(found) == {"SS", "LL"}
    assert (found["SS"].prompt_tokens, found["SS"].output_tokens) == (150, 55)
    assert found["SS"].share == pytest.approx(2 / 3)
    assert sum(weight for weight, _ in found["SS"].prompts) == pytest.approx(1.0)
