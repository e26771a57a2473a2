"""From what is to what shall be: start before stop, never more GPUs than there are, nothing lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from powerd_policies.dynamollm.fleet import InstanceState, Phase
from powerd_policies.dynamollm.pool import Shape
from powerd_policies.dynamollm.reconcile import reconcile


def serving(name: str, tp: int, pool: str = "LL") -> InstanceState:
    return InstanceState(name, pool, tp, 1980)


def test_old_ones_serve_until_new_ones_do() -> None:
    old = [serving(f"LL-{n}", 8) for n in range(4)]
    members = reconcile(old, {"LL": (Shape(4, 1980, 6),)}, 96)
    assert sum(member.id is None for member in members) == 6
    assert {member.id for member in members if member.spare} == {state.id for state in old}
    new = [serving(f"LL-{n}", 4) for n in range(4, 10)]
    assert {member.id for member in reconcile([*old, *new], {"LL": (Shape(4, 1980, 6),)}, 96)} == {state.id for state in new}


def test_where_gpus_are_short_a_few_at_a_time_change_hands() -> None:
    old = [serving(f"LL-{n}", 8) for n in range(12)]
    members = reconcile(old, {"LL": (Shape(4, 1980, 24),)}, 96, at_a_time=2)
    assert sum(member.id is None for member in members) == 4
    assert sum(member.id is not None for member in members) == 10
    draining = [*old[:10], *(InstanceState(s.id, "LL", 8, 1980, "draining") for s in old[10:])]
    assert all(member.id is not None for member in reconcile(draining, {"LL": (Shape(4, 1980, 24),)}, 96, at_a_time=2))


def test_instances_change_pool_rather_than_stop() -> None:
    members = reconcile([serving("SL-0", 4, "SL"), serving("SL-1", 4, "SL")], {"LL": (Shape(4, 1980, 2),)}, 96)
    assert [(member.id, member.pool) for member in members] == [("SL-0", "LL"), ("SL-1", "LL")]


PHASES: tuple[Phase, ...] = ("serving", "starting", "draining")
STATES = st.lists(
    st.tuples(st.sampled_from((2, 4, 8)), st.sampled_from(("SL", "LL")), st.sampled_from(PHASES)),
    max_size=12,
).map(lambda rows: [InstanceState(f"{pool}-{n}", pool, tp, 1980, phase) for n, (tp, pool, phase) in enumerate(rows)])
SHAPES = st.fixed_dictionaries(
    {
        pool: st.lists(
            st.builds(Shape, tp=st.sampled_from((2, 4, 8)), clock_mhz=st.just(1980), count=st.integers(0, 4)), max_size=1
        )
        for pool in ("SL", "LL")
    }
)


@given(states=STATES, shapes=SHAPES)
def test_never_more_gpus_than_there_are_and_the_goal_is_reached(
    states: list[InstanceState], shapes: dict[str, list[Shape]]
) -> None:
    goal = sum(shape.tp * shape.count for own in shapes.values() for shape in own)
    gpus = max(goal, sum(state.tp for state in states), 1)
    for number in range(100, 200):
        members = reconcile(states, shapes, gpus)
        assert sum(member.tp for member in members) <= gpus
        named = [member.id for member in members if member.id is not None]
        assert len(named) == len(set(named))
        kept = {member.id: member for member in members}
        # The next state: whoever was draining is gone, newcomers serve, who is not named drains.
        after = []
        for state in states:
            if state.phase == "draining":
                continue
            if state.id in kept:
                after.append(InstanceState(state.id, kept[state.id].pool, state.tp, 1980))
            else:
                after.append(InstanceState(state.id, state.pool, state.tp, 1980, "draining"))
        new = [member for member in members if member.id is None]
        after += [InstanceState(f"new-{number}-{n}", member.pool, member.tp, 1980) for n, member in enumerate(new)]
        if after == states:
            break
        states = after
    have = sorted((state.pool, state.tp) for state in states)
    assert have == sorted((pool, shape.tp) for pool, own in shapes.items() for shape in own for _ in range(shape.count))
