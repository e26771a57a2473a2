"""Whole instances out of fractions: load is conserved, moved only to where it fits, and provided once."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerd_policies.dynamollm.capacity import total_of
from powerd_policies.dynamollm.classes import NAMES, dominates
from powerd_policies.dynamollm.cluster import Pools
from powerd_policies.dynamollm.fragments import PARTITIONS, allocate, routes, upward
from powerd_policies.dynamollm.predictor import Rate

NEEDS = st.fixed_dictionaries({name: st.one_of(st.just(0.0), st.floats(0.01, 6)) for name in NAMES})


@given(needs=NEEDS)
def test_load_is_conserved_and_only_the_last_pool_is_provided_too_much(needs: dict[str, float]) -> None:
    found = allocate(needs)
    served = dict.fromkeys(NAMES, 0.0)
    for owner, shares in found.shares.items():
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-6)
        for pool, share in shares.items():
            assert pool == owner or dominates(pool, owner)
            served[pool] += share * needs[owner]
    for name in NAMES:
        assert served[name] <= found.counts[name] + 1e-6
        assert found.counts[name] > 0 or served[name] <= 1e-6
        if name != "LL":
            assert served[name] == pytest.approx(found.counts[name], abs=1e-6)
    assert sum(found.counts.values()) == math.ceil(sum(needs.values()) - 1e-6)


@given(needs=NEEDS, most=st.integers(1, 12))
def test_never_more_instances_than_there_may_be(needs: dict[str, float], most: int) -> None:
    assert sum(allocate(needs, most).counts.values()) <= most


def test_a_pool_without_a_whole_instance_merges_upward() -> None:
    found = allocate({"SS": 0.4, "ML": 1.3, "LL": 0.6})
    assert found.counts == {"SS": 0, "ML": 1, "LL": 2}
    assert found.shares["SS"] == pytest.approx({"ML": 0.4 / 1.7 * 1 / 0.4 * 1.0, "LL": 1 - 1 / 1.7}, abs=1e-6)
    with pytest.raises(ValueError, match="SS cannot need"):
        allocate({"SS": -1.0})


def test_the_next_larger_pool_is_the_nearest_that_dominates() -> None:
    assert upward("SM", dict.fromkeys(NAMES))[:2] == ("SL", "MM")
    assert upward("LL", dict.fromkeys(NAMES)) == ()


@given(alive=st.sets(st.sampled_from(NAMES), min_size=1))
def test_every_class_has_a_way_and_its_own_pool_comes_first(alive: set[str]) -> None:
    for partition in PARTITIONS.values():
        counts = {pool: 1 for pool in partition if pool in alive}
        if not counts:
            continue
        ways = routes(partition, counts)
        assert set(ways) == set(NAMES)
        for pool, names in partition.items():
            for name in names:
                assert ways[name]
                assert ways[name][0] == pool or pool not in counts


@given(needs=NEEDS, rates=st.lists(st.floats(0.1, 50), min_size=9, max_size=9))
def test_what_the_pools_serve_together_is_what_arrives(needs: dict[str, float], rates: list[float]) -> None:
    load = {name: Rate(rate, 100 * rate, 50 * rate) for name, rate in zip(NAMES, rates, strict=True)}
    pools = Pools("nine", PARTITIONS["nine"], allocate(needs).shares)
    served = pools.demands(load)
    assert sum(total_of(part).requests_per_s for part in served.values()) == pytest.approx(sum(rates))
    assert sum(total_of(part).prompt_tokens_per_s for part in served.values()) == pytest.approx(100 * sum(rates))
