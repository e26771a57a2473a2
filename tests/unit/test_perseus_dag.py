"""The graph of an order, and what is said about orders that are none."""

from __future__ import annotations

import pytest

from powerd.errors import RequestError
from powerd_policies.perseus import dag, profile, schedules
from powerd_policies.perseus.problem import Dag, Instruction

Steps = list[list[Instruction]]


def lists(name: str = "1f1b", stages: int = 3, microbatches: int = 4) -> Steps:
    return [list(steps) for steps in schedules.order(name, stages, microbatches)]


def edges(graph: Dag) -> set[tuple[str, str]]:
    names = [f"{node.kind[0].upper()}{node.stage}.{node.microbatch}" for node in graph.nodes]
    return {(names[a], names[b]) for a, b in graph.edges.tolist()}


def test_the_edges_are_those_of_the_pipeline() -> None:
    graph = dag.build(schedules.order("1f1b", 2, 2))
    assert edges(graph) == {
        ("F0.0", "F0.1"), ("F0.1", "B0.0"), ("B0.0", "B0.1"),  # rank 0
        ("F1.0", "B1.0"), ("B1.0", "F1.1"), ("F1.1", "B1.1"),  # rank 1
        ("F0.0", "F1.0"), ("F0.1", "F1.1"), ("B1.0", "B0.0"), ("B1.1", "B0.1"),
    }  # fmt: skip
    assert graph.ranks == 2
    assert [int(r) for r in graph.rank] == [node.stage for node in graph.nodes]


@pytest.mark.parametrize(
    ("name", "stages", "microbatches", "nodes", "count"),
    [("1f1b", 2, 8, 32, 46), ("1f1b", 4, 8, 64, 108), ("gpipe", 4, 8, 64, 108)],
)
def test_graphs_have_the_size_that_was_recorded_on_real_pipelines(
    name: str, stages: int, microbatches: int, nodes: int, count: int
) -> None:
    graph = dag.build(schedules.order(name, stages, microbatches))
    assert (len(graph.nodes), len(graph.edges)) == (nodes, count)


def test_the_numbers_are_topological_and_edges_sorted() -> None:
    for name in schedules.SCHEDULES:
        graph = dag.build(schedules.order(name, 4, 9, recompute=True))
        assert (graph.edges[:, 0] < graph.edges[:, 1]).all()
        assert (graph.edges[1:, 1] >= graph.edges[:-1, 1]).all()


def test_only_the_input_gradient_is_waited_for() -> None:
    found = edges(dag.build(schedules.order("zb-h1", 2, 1)))
    assert ("I1.0", "I0.0") in found
    assert ("W1.0", "I0.0") not in found


def test_an_operation_of_ones_own_keeps_its_place() -> None:
    order = lists(stages=2, microbatches=1)
    order[1].insert(1, Instruction(1, "loss", 0))
    assert ("F1.0", "L1.0") in edges(dag.build(order))


def test_a_recorded_order_that_goes_in_a_circle_is_told_with_rank_and_instruction() -> None:
    order = lists(stages=2, microbatches=2)
    order[0] = [order[0][i] for i in (0, 2, 1, 3)]  # backward of 0 before forward of 1,
    order[1] = [order[1][i] for i in (0, 2, 1, 3)]  # which rank 1 wants before it gives the gradient
    with pytest.raises(RequestError) as told:
        dag.build(order)
    assert "rank 0 waits at backward of microbatch 0 on stage 0" in str(told.value)
    assert "rank 1 waits at forward of microbatch 1 on stage 1" in str(told.value)


def test_a_backward_before_its_own_forward_is_a_circle_on_one_rank() -> None:
    order = lists(stages=1, microbatches=1)
    order[0].reverse()
    with pytest.raises(RequestError, match="rank 0 waits at backward of microbatch 0 on stage 0"):
        dag.build(order)


def edit(order: Steps, what: str) -> None:
    if what == "missing":
        del order[1][2]
    elif what == "twice":
        order[1].append(order[1][2])
    elif what == "on two ranks":
        order[2].append(order[1][2])
    elif what == "fewer microbatches":
        order[2] = [step for step in order[2] if step.microbatch < 3]
    elif what == "no such stage":
        del order[1]
    elif what == "empty":
        order[1] = []
    elif what == "weight missing":
        order[1] = [Instruction(s.stage, "input" if s.kind == "backward" else s.kind, s.microbatch) for s in order[1]]
    elif what == "split and whole":
        order[1].append(Instruction(1, "weight", 0))


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("missing", "rank 1 does not run backward of microbatch 0 on stage 1"),
        ("twice", "rank 1 runs backward of microbatch 0 on stage 1 twice"),
        ("on two ranks", "rank 2 runs backward of microbatch 0 on stage 1 too, and so does rank 1"),
        ("fewer microbatches", "rank 2 runs 3 microbatches, rank 0 runs 4"),
        ("no such stage", "no rank runs stage 1"),
        ("empty", "rank 1 has no instructions"),
        ("weight missing", "rank 1 does not run weight of microbatch 0 on stage 1"),
        ("split and whole", "rank 1 runs weight of microbatch 0 on stage 1 and the whole backward"),
    ],
)
def test_a_broken_order_is_told_with_rank_and_instruction(what: str, told: str) -> None:
    order = lists()
    edit(order, what)
    with pytest.raises(RequestError, match=told):
        dag.build(order)


def test_a_problem_names_what_the_profile_lacks() -> None:
    rows = [profile.Row(0, kind, mhz, 1000 / mhz, mhz / 10) for kind in ("forward", "backward") for mhz in (1400, 1200)]
    graph = dag.build(schedules.order("1f1b", 2, 1))
    with pytest.raises(RequestError, match="no rows for forward of stage 1"):
        dag.problem(graph, profile.options(rows, 70.0), 70.0)
    with pytest.raises(RequestError, match="blocking_power_w"):
        dag.problem(graph, profile.options(rows, 70.0), float("nan"))
