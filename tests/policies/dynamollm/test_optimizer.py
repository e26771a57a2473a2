"""Sharding pools: exact against enumeration, within GPUs and watts, and plain about what cannot be done."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerd_policies.dynamollm import optimizer
from powerd_policies.dynamollm.optimizer import InfeasibleError, Option, Pool, Weights, optimise

OPTIONS = st.builds(
    Option,
    tp=st.sampled_from((2, 4, 8)),
    clock_mhz=st.just(1980),
    holds=st.floats(0.5, 10),
    base_w=st.floats(50, 2000),
    load_w=st.floats(0, 300),
    have=st.integers(0, 3),
    start_w=st.floats(0, 200),
)


def enumerated(pools: list[Pool], gpus: int, budget_w: float | None = None) -> float | None:
    """The least cost over all counts; loads go to the cheapest instances first, which is optimal for one load."""
    columns = [(n, option) for n, pool in enumerate(pools) for option in pool.options]
    best = None
    for counts in itertools.product(*(range(gpus // option.tp + 1) for _, option in columns)):
        if sum(k * option.tp for k, (_, option) in zip(counts, columns, strict=True)) > gpus:
            continue
        power_w = cost = 0.0
        for n, pool in enumerate(pools):
            mine = [(k, option) for k, (owner, option) in zip(counts, columns, strict=True) if owner == n]
            if pool.gpus is not None and sum(k * option.tp for k, option in mine) != pool.gpus:
                break
            left = pool.load
            for k, option in sorted(mine, key=lambda each: each[1].load_w):
                part = min(left, k * option.holds)
                left -= part
                power_w += k * option.base_w + part * option.load_w
                cost += option.start_w * max(0, k - option.have)
            if left > 1e-9:
                break
        else:
            if budget_w is None or power_w <= budget_w:
                best = power_w + cost if best is None else min(best, power_w + cost)
    return best


@settings(max_examples=40, deadline=None)
@given(
    options=st.lists(OPTIONS, min_size=1, max_size=3),
    load=st.floats(0.5, 20),
    gpus=st.sampled_from((8, 16, 32)),
    exact=st.booleans(),
)
def test_one_pool_costs_what_enumeration_finds(options: list[Option], load: float, gpus: int, exact: bool) -> None:
    pool = Pool("LL", load, tuple(options), gpus if exact else None)
    expected = enumerated([pool], gpus)
    if expected is None:
        with pytest.raises(InfeasibleError, match="LL"):
            optimise([pool], gpus)
        return
    found = optimise([pool], gpus)
    assert found.cost == pytest.approx(expected, rel=1e-5)
    assert found.gpus <= gpus
    assert not exact or found.gpus == gpus
    assert sum(share.load for share in found.pools["LL"]) == pytest.approx(load, rel=1e-5)
    assert all(share.load <= share.count * share.option.holds * (1 + 1e-6) for share in found.pools["LL"])


@settings(max_examples=15, deadline=None)
@given(one=st.lists(OPTIONS, min_size=1, max_size=2), other=st.lists(OPTIONS, min_size=1, max_size=2), share=st.floats(0.6, 1.0))
def test_pools_that_compete_for_gpus_and_watts_cost_what_enumeration_finds(
    one: list[Option], other: list[Option], share: float
) -> None:
    pools = [Pool("MM", 4.0, tuple(one)), Pool("LL", 3.0, tuple(other))]
    free = enumerated(pools, 16)
    budget_w = None if free is None else share * free
    expected = enumerated(pools, 16, budget_w)
    if expected is None:
        with pytest.raises(InfeasibleError):
            optimise(pools, 16, budget_w=budget_w)
        return
    found = optimise(pools, 16, budget_w=budget_w)
    assert found.cost == pytest.approx(expected, rel=1e-5)
    assert budget_w is None or found.power_w <= budget_w * (1 + 1e-6)


def test_what_cannot_be_met_is_said_with_what_would_be_needed() -> None:
    option = Option(4, 1980, holds=2.0, base_w=1000.0)
    with pytest.raises(InfeasibleError, match="20 GPUs would be needed in all, and there are 16"):
        optimise([Pool("LL", 10.0, (option,))], 16)
    with pytest.raises(InfeasibleError, match="LL: 5000 W would be needed, and the budget is 3000 W"):
        optimise([Pool("LL", 10.0, (option,))], 96, budget_w=3000.0)
    with pytest.raises(InfeasibleError, match="SS: no tensor parallelism and clock keeps its SLO"):
        optimise([Pool("SS", 1.0, (Option(8, 1980, 0.0, 1000.0),))], 96)
    with pytest.raises(InfeasibleError, match="are to have 24 GPUs, and there are 16"):
        optimise([Pool("LL", 1.0, (option,), gpus=24)], 16)


def test_an_instance_that_runs_already_is_kept_unless_another_saves_its_start() -> None:
    running = Option(8, 1980, holds=2.0, base_w=1000.0, have=1, start_w=100.0)
    better = Option(4, 1530, holds=2.0, base_w=950.0, have=0, start_w=100.0)
    assert optimise([Pool("LL", 1.0, (running, better))], 16).pools["LL"][0].option is running
    much_better = Option(4, 1530, holds=2.0, base_w=850.0, have=0, start_w=100.0)
    assert optimise([Pool("LL", 1.0, (running, much_better))], 16).pools["LL"][0].option is much_better


def test_a_price_on_gpus_trades_watts_for_fewer_of_them() -> None:
    wide, narrow = Option(8, 1000, 2.0, 600.0), Option(2, 1980, 2.0, 700.0)
    assert optimise([Pool("LL", 1.0, (wide, narrow))], 16).pools["LL"][0].option is wide
    assert optimise([Pool("LL", 1.0, (wide, narrow))], 16, weights=Weights(1.0, 50.0)).pools["LL"][0].option is narrow


def many_pools() -> list[Pool]:
    return [
        Pool(f"{name}", 40.0 + n, tuple(Option(tp, 1980, 0.4 * tp + 0.01 * n, 210.0 * tp + 9 * n) for tp in (2, 4, 8)))
        for n, name in enumerate(("SS", "SM", "SL", "MS", "MM", "ML", "LS", "LM", "LL"))
    ]


def test_a_thousand_gpus_are_sharded_within_them() -> None:
    pools = many_pools()
    found = optimise(pools, 1000)
    assert found.gpus <= 1000
    for pool in pools:
        assert sum(share.count * share.option.holds for share in found.pools[pool.name]) >= pool.load - 1e-6


def test_a_machine_too_busy_for_the_solver_makes_no_fleet_infeasible(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = optimise(many_pools(), 1000)
    monkeypatch.setattr(optimizer, "LIMIT_S", 0.0)
    assert optimise(many_pools(), 1000).cost == pytest.approx(wanted.cost, rel=optimizer.GAPS[1])


def test_a_hundred_gpus_get_the_same_fleet_however_busy_the_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = [Pool(pool.name, pool.load / 20, pool.options) for pool in many_pools()]
    wanted = optimise(pools, 100)
    monkeypatch.setattr(optimizer, "LIMIT_S", 0.0)
    assert optimise(pools, 100) == wanted
