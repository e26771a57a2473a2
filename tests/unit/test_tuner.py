"""Blocks of steps: when they end, what all ranks make of them, and what the counting of Megatron's timers says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from threading import Barrier, Thread

import pytest

from powerd_integrations.keeper import without
from powerd_integrations.megatron import Counter
from powerd_integrations.search import Search, SearchState
from powerd_integrations.tuner import Tuner

S = 1_000_000_000
CLOCKS = range(900, 1411, 15)


class Ranks:
    """An exchange between threads: every rank hears what all say at the same step."""

    def __init__(self, count: int) -> None:
        self.said: list[list[float]] = [[] for _ in range(count)]
        self._barrier = Barrier(count, timeout=20)

    def of(self, rank: int, mine: list[float]) -> Sequence[Sequence[float]]:
        self.said[rank] = mine
        self._barrier.wait()
        heard = [list(row) for row in self.said]
        self._barrier.wait()
        return heard


def drive(tuner: Tuner, steps: int, energy_j: float = 300.0) -> list[int]:
    """Steps whose time and energy follow the clock; the clock wanted after each."""
    now, wanted = 0, []
    for _ in range(steps):
        block = tuner.begin_step(now)
        if block is not None:
            share = block.clock_mhz / 1410
            tuner.measured(block.number, 0.5 / share**0.5, energy_j * share**1.5)
        wanted.append(tuner.clock_mhz)
        now += round(0.5 * S)
    return wanted


def test_blocks_last_as_long_as_asked_and_the_search_ends() -> None:
    tuner = Tuner(Search(CLOCKS), block_s=3.0)
    wanted = drive(tuner, 600)
    assert wanted[:18] == [1410] * 18, "warm-up and two blocks of six steps at the top clock"
    assert tuner.search.state is SearchState.SETTLED
    assert wanted[-1] == tuner.search.clock_mhz < 1410


def test_ranks_that_measure_differently_decide_alike() -> None:
    ranks = Ranks(3)
    tuners = [Tuner(Search(CLOCKS), exchange=partial(ranks.of, rank)) for rank in range(3)]
    wanted: list[list[int]] = [[], [], []]

    def train(rank: int) -> None:
        wanted[rank] = drive(tuners[rank], 400, energy_j=200.0 + 50 * rank)

    threads = [Thread(target=train, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wanted[0] == wanted[1] == wanted[2]
    assert min(wanted[0]) < 1410


def test_one_rank_that_cannot_measure_keeps_all_at_the_top() -> None:
    ranks = Ranks(2)
    tuners = [Tuner(Search(CLOCKS), exchange=partial(ranks.of, rank)) for rank in range(2)]
    wanted: list[list[int]] = [[], []]

    def train(rank: int) -> None:
        wanted[rank] = drive(tuners[rank], 200, energy_j=math.nan if rank else 300.0)

    threads = [Thread(target=train, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(wanted[0]) == set(wanted[1]) == {1410}
    assert {tuner.search.state for tuner in tuners} == {SearchState.BLIND}


@pytest.mark.parametrize(
    ("apart", "left"),
    [
        ([], [(10, 50)]),
        ([(20, 30)], [(10, 20), (30, 50)]),
        ([(0, 5), (10, 12), (48, 70)], [(12, 48)]),
        ([(5, 15), (14, 20), (60, 70)], [(20, 50)]),
        ([(0, 100)], []),
    ],
)
def test_what_is_no_step_is_cut_out(apart: list[tuple[int, int]], left: list[tuple[int, int]]) -> None:
    assert without(10, 50, apart) == left


def table(microbatches: int, chunks: int, group: int) -> list[tuple[int, int]]:
    """(microbatch, chunk) in sequence: groups of microbatches, each through all chunks (Megatron-LM, section 2.2.2)."""
    rounds = [range(start, min(start + group, microbatches)) for start in range(0, microbatches, group)]
    return [(m, chunk) for members in rounds for chunk in range(chunks) for m in members]


@pytest.mark.parametrize(("microbatches", "chunks", "group"), [(8, 2, 4), (6, 3, 2), (10, 2, 4), (4, 1, 4)])
def test_counting_names_chunk_and_microbatch(microbatches: int, chunks: int, group: int) -> None:
    counter = Counter(rank=1, stages=4, chunks=chunks, group=group)
    for number, (microbatch, chunk) in enumerate(table(microbatches, chunks, group)):
        assert counter.of("forward", number, microbatches) == (4 * chunk + 1, microbatch)
        assert counter.of("backward", number, microbatches) == (4 * (chunks - 1 - chunk) + 1, microbatch)
