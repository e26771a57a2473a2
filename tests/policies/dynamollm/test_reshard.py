"""Re-sharding: nobody moves fewer bytes, nothing is lost, and memory decides who has to drain."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerd_policies.dynamollm.reshard import Layout, ReshardPlan, plan_reshard, shard

W = 140_000_000_000
EIGHTH = W // 8


def layout(*tps: int) -> Layout:
    names = iter(f"g{n}" for n in range(100))
    return tuple(tuple(next(names) for _ in range(tp)) for tp in tps)


def held(old: Layout) -> dict[str, tuple[int, int]]:
    return {gpu: shard(rank, len(gpus), W) for gpus in old for rank, gpu in enumerate(gpus)}


def common(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))


def kept_by(old: Layout, new: Layout) -> int:
    have = held(old)
    return sum(common(have.get(gpu, (0, 0)), part) for gpu, part in held(new).items())


def test_eight_to_twice_four_moves_an_eighth_to_each_and_takes_one_t() -> None:
    plan = plan_reshard(layout(8), (4, 4), weights_bytes=W)
    assert plan.moved_bytes == 8 * EIGHTH
    assert plan.kept_bytes == 8 * EIGHTH
    assert plan.t_units == pytest.approx(1.0)
    assert plan.moved_bytes < plan.naive_bytes


def test_twice_four_to_eight_moves_nothing_where_halves_are_there() -> None:
    plan = plan_reshard(layout(4, 4), (8,), weights_bytes=W)
    assert plan.moved_bytes == 0
    assert plan.t_units == 0.0
    assert plan.steps[0].stop == (0, 1)


def test_an_instance_that_can_stay_is_left_alone() -> None:
    plan = plan_reshard(layout(4, 4), (2, 4, 2), weights_bytes=W)
    assert len(plan.kept) == 1
    assert len(plan.steps) == 1
    stays, becomes = plan.kept[0]
    assert plan.layout[becomes] == layout(4, 4)[stays]
    assert plan.steps[0].stop == (1 - stays,)


def test_instances_that_need_not_hang_together_change_one_after_another() -> None:
    plan = plan_reshard(layout(4, 4), (2, 2, 2, 2), weights_bytes=W)
    assert [len(step.stop) for step in plan.steps] == [1, 1]
    together = plan_reshard(layout(4, 4), (2, 2, 2, 2), weights_bytes=W, at_a_time=2)
    assert [len(step.stop) for step in together.steps] == [2]
    assert together.moved_bytes == plan.moved_bytes


@pytest.mark.parametrize(
    ("old", "new", "memory_bytes", "how"),
    [
        (8, (4, 4), 80_000_000_000, "overlap"),
        (4, (2,), 80_000_000_000, "drain"),
        (4, (2,), 60_000_000_000, "reload"),
        (8, (4, 4), None, "drain"),
    ],
)
def test_memory_decides_whether_the_old_instance_serves_on(
    old: int, new: tuple[int, ...], memory_bytes: int | None, how: str
) -> None:
    """With 20 GB of KV cache; a rank of 4 holds 35 GB, one of 2 holds 70 and would need half of it beside."""
    plan = plan_reshard(layout(old), new, weights_bytes=W, memory_bytes=memory_bytes, kv_bytes=20_000_000_000)
    assert [step.how for step in plan.steps] == [how]


def test_the_last_to_hold_weights_stops_last() -> None:
    plan = plan_reshard(layout(2, 2), (2, 2, 1), weights_bytes=W, spare=("s0",))
    assert len(plan.kept) == 2
    assert {transfer.source for transfer in plan.transfers} <= {"g0", "g1", "g2", "g3"}
    shrinking = plan_reshard(layout(8, 4), (4,), weights_bytes=W)
    assert shrinking.steps[-1].start == ()


def test_spare_gpus_are_filled_from_those_that_hold_weights() -> None:
    plan = plan_reshard(layout(4), (4, 4), weights_bytes=W, spare=("s0", "s1", "s2", "s3"))
    assert plan.kept == ((0, 0),) or plan.kept == ((0, 1),)
    assert plan.moved_bytes == W
    assert {transfer.target for transfer in plan.transfers} == {"s0", "s1", "s2", "s3"}
    assert plan.t_units == pytest.approx(2.0), "each quarter comes from another GPU, all at once"


@pytest.mark.parametrize(
    ("old", "new", "says"), [((), (4,), "a start"), ((4,), (8,), "need 8; there are 4"), ((4,), (), "at least one")]
)
def test_what_cannot_be_is_refused(old: tuple[int, ...], new: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan_reshard(layout(*old), new, weights_bytes=W)


def check_bytes(old: Layout, plan: ReshardPlan) -> None:
    """Carry the steps out: every new rank ends up with its shard, and nobody sends what it no longer has."""
    have = {gpu: {part} for gpu, part in held(old).items()}
    wanted = held(plan.layout)
    for step in plan.steps:
        mine = {gpu for number in step.start for gpu in plan.layout[number]}
        for gpu in mine:
            missing = wanted[gpu][1] - wanted[gpu][0] - sum(common(part, wanted[gpu]) for part in have.get(gpu, ()))
            assert missing == sum(transfer.bytes for transfer in step.transfers if transfer.target == gpu)
        for transfer in step.transfers:
            assert transfer.target in mine
            assert transfer.source != transfer.target
            has = sum(common(part, wanted[transfer.target]) for part in have[transfer.source])
            assert transfer.bytes <= has, "it sends what it holds at this time"
        for gpu in (gpu for number in step.stop for gpu in old[number]):
            del have[gpu]
        have.update({gpu: {wanted[gpu]} for gpu in mine})
    assert {gpu: {part} for gpu, part in wanted.items()} == have
    assert sum(transfer.bytes for transfer in plan.transfers) == plan.moved_bytes


TPS = st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(TPS, TPS, st.integers(1, 3))
def test_nothing_is_lost_and_no_more_moves_than_without_thought(old_tps: list[int], new_tps: list[int], at_a_time: int) -> None:
    old = layout(*old_tps)
    spare = tuple(f"s{n}" for n in range(max(0, sum(new_tps) - sum(old_tps))))
    plan = plan_reshard(old, new_tps, weights_bytes=W, spare=spare, at_a_time=at_a_time)
    assert [len(gpus) for gpus in plan.layout] == new_tps
    assert len({gpu for gpus in plan.layout for gpu in gpus}) == sum(new_tps)
    assert plan.moved_bytes <= plan.naive_bytes <= plan.loaded_bytes
    check_bytes(old, plan)
    changed = [n for step in plan.steps for n in step.start]
    assert sorted([*changed, *(new for _, new in plan.kept)]) == list(range(len(new_tps))), "each new instance exactly once"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=3).filter(lambda tps: sum(tps) <= 6), st.data())
def test_no_placement_of_few_gpus_moves_less(old_tps: list[int], data: st.DataObject) -> None:
    new_tps = data.draw(
        st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4).filter(lambda tps: sum(tps) <= sum(old_tps))
    )
    old = layout(*old_tps)
    plan = plan_reshard(old, new_tps, weights_bytes=W)
    best = 0
    for order in itertools.permutations([gpu for gpus in old for gpu in gpus], sum(new_tps)):
        names = iter(order)
        best = max(best, kept_by(old, tuple(tuple(next(names) for _ in range(tp)) for tp in new_tps)))
    assert plan.kept_bytes == best
