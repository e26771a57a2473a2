"""Whatever order and profile come in: a graph that holds every dependency, or an error that says where."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerd.errors import RequestError
from powerd_policies.perseus import dag, document, profile, schedules
from powerd_policies.perseus.problem import Dag, Instruction, Kind
from powerd_policies.perseus.profile import Row

NAMES = st.sampled_from(sorted(schedules.SCHEDULES))


def dependencies(nodes: list[Instruction]) -> set[tuple[int, int]]:
    """Pairs (before, after) that any pipeline must respect, written down a second time and naively."""
    number = {(n.stage, str(n.kind), n.microbatch): i for i, n in enumerate(nodes)}
    last = max(node.stage for node in nodes)
    found = set()
    for after, node in enumerate(nodes):
        backward = [(node.stage + 1, "backward"), (node.stage + 1, "input"), (node.stage, "forward"), (node.stage, "recompute")]
        wanted = {
            Kind.FORWARD: [(node.stage - 1, "forward")],
            Kind.BACKWARD: backward,
            Kind.INPUT: backward,
            Kind.WEIGHT: [(node.stage, "input")],
            Kind.RECOMPUTE: [(node.stage, "forward")],
        }[Kind(node.kind)]  # fmt: skip
        for stage, kind in wanted:
            if 0 <= stage <= last and (stage, kind, node.microbatch) in number:
                found.add((number[stage, kind, node.microbatch], after))
    return found


def reachable(graph: Dag) -> list[set[int]]:
    before: list[set[int]] = [set() for _ in graph.nodes]
    for source, target in graph.edges.tolist():
        before[target] |= before[source] | {source}
    return before


@settings(max_examples=60, deadline=None)
@given(NAMES, st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.booleans())
def test_every_dependency_holds_in_every_schedule(
    name: str, stages: int, microbatches: int, chunks: int, recompute: bool
) -> None:
    chunks = chunks if name in ("interleaved", "zb-h1") else 1
    order = schedules.order(name, stages, microbatches, chunks, recompute)
    graph = dag.build(order)
    before = reachable(graph)
    for source, target in dependencies(list(graph.nodes)):
        assert source in before[target], (str(graph.nodes[source]), str(graph.nodes[target]))
    for rank, steps in enumerate(order):
        ran = [node for node, r in zip(graph.nodes, graph.rank, strict=True) if r == rank]
        assert ran == list(steps), "a rank runs its own list, in order"
    assert len({tuple(edge) for edge in graph.edges.tolist()}) == len(graph.edges)


@settings(max_examples=150, deadline=None)
@given(st.data(), NAMES, st.integers(1, 4), st.integers(1, 5))
def test_a_disturbed_order_is_run_or_told_with_its_rank(data: st.DataObject, name: str, stages: int, microbatches: int) -> None:
    order = [list(steps) for steps in schedules.order(name, stages, microbatches)]
    for _ in range(data.draw(st.integers(1, 3))):
        rank = data.draw(st.integers(0, stages - 1))
        a, b = (data.draw(st.integers(0, len(order[rank]) - 1)) for _ in range(2))
        order[rank][a], order[rank][b] = order[rank][b], order[rank][a]
    try:
        graph = dag.build(order)
    except RequestError as error:
        told = str(error)
    else:
        before = reachable(graph)
        assert all(source in before[target] for source, target in dependencies(list(graph.nodes)))
        return
    assert re.search(r"rank \d", told), told
    assert re.search(r"(on|runs) stage \d", told), told


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_disturbed_profile_is_read_or_told_with_its_line(data: st.DataObject) -> None:
    lines = ["stage,instruction,frequency,time,energy"]
    lines += [
        f"{s},{kind},{mhz},{100 / mhz},{mhz / 20}"
        for s in (0, 1)
        for kind in ("forward", "backward")
        for mhz in (1400, 1200, 1000)
    ]
    line = data.draw(st.integers(1, len(lines) - 1))
    cells = lines[line].split(",")
    column = data.draw(st.integers(0, 4))
    cells[column] = data.draw(
        st.sampled_from(["", "nan", "-1", "0", "1e400", "x", "7", "2.5", "1400", '"', "0.1,0.2", "forward"])
    )
    lines[line] = ",".join(cells)
    try:
        rows = profile.read("\n".join(lines) + "\n")
    except RequestError as error:
        told = str(error)
    else:
        assert all(profile.options(rows, 50.0).values())
        return
    assert told.startswith("profile: ")
    assert any(word in told for word in ("line", "stage", "columns")), told


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8,
)  # fmt: skip
GOOD = {"schedule": "1f1b", "stages": 2, "microbatches": 2, "blocking_power_w": 50.0}
KEYS = sorted(document.JobFile.__dataclass_fields__)


@settings(max_examples=300, deadline=None)
@given(JSON | st.dictionaries(st.sampled_from(KEYS), JSON).map(lambda changes: {**GOOD, **changes}))
def test_a_job_is_read_or_told(content: object) -> None:
    try:
        job = document.parse(content)
    except RequestError:
        return
    assert document.parse(job.to_json()).to_json() == job.to_json()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(0.1, 500.0)), min_size=1, max_size=12), st.floats(0, 300.0)
)  # fmt: skip
def test_no_option_that_is_left_is_beaten_and_none_is_lost(points: list[tuple[float, float]], blocking_power_w: float) -> None:
    rows = [Row(0, "forward", 2000 - 15 * n, time_s, energy_j) for n, (time_s, energy_j) in enumerate(points)]
    kept = profile.options(rows, blocking_power_w)[0, "forward"]
    cost = [(o.time_s, o.energy_j - blocking_power_w * o.time_s) for o in kept]
    assert cost == sorted(cost)
    assert [c[1] for c in cost] == sorted({c[1] for c in cost}, reverse=True)
    for row in rows:
        own = (row.time_s, row.energy_j - blocking_power_w * row.time_s)
        assert any(c[0] <= own[0] and c[1] <= own[1] + 1e-12 * abs(own[1]) for c in cost)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.tuples(st.floats(0.01, 1), st.floats(1, 100)), min_size=3, max_size=3), min_size=1, max_size=4))
def test_parallel_ranks_collapse_to_the_slowest_and_the_sum(ranks: list[list[tuple[float, float]]]) -> None:
    by_rank = {r: [Row(0, "forward", 1400 - 100 * n, t, e) for n, (t, e) in enumerate(rows)] for r, rows in enumerate(ranks)}
    for n, row in enumerate(profile.collapse(by_rank)):
        assert row.time_s == max(rows[n][0] for rows in ranks)
        assert row.energy_j == pytest.approx(sum(rows[n][1] for rows in ranks))
