"""Backing off: what was measured late makes a fleet reckon with more, one instance's bad luck does not, and it is forgotten."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerd_policies.dynamollm.caution import HALF_LIFE_S, MANY, MOST, Caution, missed
from powerd_policies.dynamollm.classes import Slo
from powerd_policies.dynamollm.fleet import InstanceLoad, InstanceState

SLOS = {"LL": Slo(2.0, 0.1)}
GOOD, BAD = InstanceLoad(ttft_p99_s=0.3, tbt_p99_s=0.09), InstanceLoad(ttft_p99_s=0.3, tbt_p99_s=0.101)


def fleet(late: int, of: int = 12) -> list[InstanceState]:
    return [InstanceState(f"LL-{n}", "LL", 8, 1980, load=BAD if n < late else GOOD) for n in range(of)]


def test_a_miss_is_a_measured_gap_above_the_promise() -> None:
    assert missed(BAD, SLOS["LL"])
    assert not missed(GOOD, SLOS["LL"])
    assert not missed(replace(GOOD, ttft_p99_s=2.1), SLOS["LL"])  # a wave of arrivals
    assert not missed(InstanceLoad(), SLOS["LL"])


def test_a_quarter_of_the_instances_late_raises_it_and_one_does_not() -> None:
    caution = Caution()
    caution.see(5.0, fleet(2), SLOS)
    assert caution.factor == 1.0
    caution.see(5.0, fleet(3), SLOS)
    few = caution.factor
    assert few > 1.0
    caution.see(5.0, fleet(12), SLOS)
    assert caution.factor - few > few - 1.0


def test_those_that_start_or_drain_say_nothing() -> None:
    caution = Caution()
    gone = [replace(i, phase="draining") for i in fleet(12)] + fleet(0, 1)
    caution.see(5.0, gone, SLOS)
    assert caution.factor == 1.0
    caution.see(5.0, [], SLOS)
    assert caution.factor == 1.0


@given(looks=st.lists(st.integers(0, 12), max_size=60))
def test_it_stays_within_bounds_and_half_is_forgotten_in_a_half_life(looks: list[int]) -> None:
    caution = Caution()
    for late in looks:
        before = caution.share
        caution.see(5.0, fleet(late), SLOS)
        assert 0.0 <= caution.share <= MOST
        assert (caution.share >= before) == (late / 12 >= MANY or before == 0.0)
    before = caution.share
    caution.see(HALF_LIFE_S, fleet(0), SLOS)
    assert caution.share == pytest.approx(before / 2)
