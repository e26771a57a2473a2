"""The orders of pipeline schedules: what frameworks run, for any number of ranks and microbatches."""

from __future__ import annotations

import numpy as np
import pytest

from powerd.errors import RequestError
from powerd_policies.perseus import dag, schedules
from powerd_policies.perseus.problem import Order

SHORT = {"forward": "F", "backward": "B", "input": "I", "weight": "W", "recompute": "R"}


def shown(order: Order) -> list[str]:
    """Each rank's list as the zero-bubble papers write it; the stage where a rank has several."""
    made = []
    for steps in order:
        several = len({step.stage for step in steps}) > 1
        made.append(" ".join((f"{s.stage}" if several else "") + f"{SHORT[s.kind]}{s.microbatch}" for s in steps))
    return made


@pytest.mark.parametrize(
    ("name", "stages", "microbatches", "chunks", "lists"),
    [
        ("gpipe", 2, 3, 1, ["F0 F1 F2 B0 B1 B2"] * 2),
        ("1f1b", 3, 4, 1, [
            "F0 F1 F2 B0 F3 B1 B2 B3",
            "F0 F1 B0 F2 B1 F3 B2 B3",
            "F0 B0 F1 B1 F2 B2 F3 B3",
        ]),
        ("1f1b", 4, 2, 1, ["F0 F1 B0 B1", "F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"]),
        ("zb-h1", 2, 3, 1, ["F0 F1 I0 W0 F2 I1 W1 I2 W2", "F0 I0 F1 I1 W0 F2 I2 W1 W2"]),
        ("interleaved", 2, 2, 2, [
            "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
            "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1",
        ]),
        ("zbv", 1, 2, 1, ["0F0 1F0 1I0 1W0 0F1 0I0 0W0 1F1 1I1 1W1 0I1 0W1"]),
    ],
)  # fmt: skip
def test_an_order_is_the_one_of_the_paper(name: str, stages: int, microbatches: int, chunks: int, lists: list[str]) -> None:
    assert shown(schedules.order(name, stages, microbatches, chunks)) == lists


def test_activations_are_recomputed_in_front_of_every_backward() -> None:
    assert shown(schedules.order("1f1b", 2, 2, recompute=True))[1] == "F0 R0 B0 F1 R1 B1"
    assert shown(schedules.order("zb-h1", 2, 2, recompute=True))[0] == "F0 F1 R0 I0 W0 R1 I1 W1"


@pytest.mark.parametrize("name", list(schedules.SCHEDULES))
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_every_size_can_be_run(name: str, ranks: int) -> None:
    for microbatches in (1, 2, 3, 7, 8, 11, 16, 23):
        for chunks in (1, 2, 3) if name in ("interleaved", "zb-h1") else (1,):
            order = schedules.order(name, ranks, microbatches, chunks)
            graph = dag.build(order)
            backward = 2 if name in ("zb-h1", "zbv") else 1
            assert len(graph.nodes) == (1 + backward) * microbatches * schedules.stage_count(name, ranks, chunks)


def test_a_1f1b_pipeline_of_equal_stages_takes_what_the_formula_says() -> None:
    stages, microbatches, forward_s, backward_s = 4, 8, 1.0, 2.0
    graph = dag.build(schedules.order("1f1b", stages, microbatches))
    times = np.array([forward_s if node.kind == "forward" else backward_s for node in graph.nodes])
    assert graph.schedule(times)[2] == pytest.approx((microbatches + stages - 1) * (forward_s + backward_s))


def test_zero_bubble_schedules_leave_less_of_the_pipeline_empty() -> None:
    def bubble(name: str, stages: int) -> float:
        graph = dag.build(schedules.order(name, stages, 12))
        # One rank holds the same layers under each schedule: zbv cuts them in two stages.
        seconds = {"forward": 1.0, "backward": 2.0, "input": 1.0, "weight": 1.0}
        times = np.array([seconds[node.kind] for node in graph.nodes]) / (2 if name == "zbv" else 1)
        return graph.schedule(times)[2] - 12 * 3.0

    assert bubble("1f1b", 4) == pytest.approx(9.0)
    assert bubble("zbv", 4) < bubble("zb-h1", 4) < bubble("1f1b", 4)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("1f1b2", 2, 2), "1f1b"),
        (("1f1b", 0, 2), "stages"),
        (("1f1b", 2, 0), "microbatches"),
        (("interleaved", 2, 2, 0), "chunks"),
        (("gpipe", 2, 2, 2), "one stage per rank"),
        (("zbv", 2, 2, 3), "two stages"),
    ],
)
def test_what_is_no_schedule_is_refused(arguments: tuple[str, int, int], word: str) -> None:
    with pytest.raises(RequestError, match=word):
        schedules.order(*arguments)
