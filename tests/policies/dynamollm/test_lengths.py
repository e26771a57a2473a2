"""Length predictors: exact, as wrong as wished, and what a table learns."""

from __future__ import annotations

import csv
import gzip
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerd_policies.dynamollm.classes import Classes
from powerd_policies.dynamollm.lengths import Hints, LengthTable, NoisyOracle, Oracle, accuracy, sizes_of

TRACE = Path(__file__).parents[3] / "policies/profiles/traces/azure_llm_2023_conversation.csv.gz"


@cache
def trace() -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(TRACE, "rt", newline="") as file:
        rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    return np.array([row[0] for row in rows]), np.array([row[1] for row in rows])


@given(st.lists(st.integers(0, 2000)))
def test_sizes_of_an_array_are_those_of_its_elements(outputs: list[int]) -> None:
    classes = Classes()
    assert sizes_of(outputs, classes).tolist() == [classes.size_of_output(tokens) for tokens in outputs]


def test_who_needs_the_truth_says_so() -> None:
    for predictor in (Oracle(), NoisyOracle(0.8)):
        with pytest.raises(ValueError, match="true output tokens"):
            predictor.predict([100, 200])
        with pytest.raises(ValueError, match="2 prompts and 1 outputs"):
            predictor.predict([100, 200], Hints([7]))
    with pytest.raises(ValueError, match=r"accuracy 1\.2"):
        NoisyOracle(1.2)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.8, 0.7, 0.6])
def test_a_noisy_oracle_is_as_often_right_as_wished_and_wrong_both_ways(share: float) -> None:
    prompts, outputs = trace()
    hints = Hints(outputs, np.arange(len(outputs)))
    predictor = NoisyOracle(share, seed=3)
    said, truth = predictor.predict(prompts, hints), sizes_of(outputs, Classes())
    assert (said == truth).mean() == pytest.approx(share, abs=0.012)
    for size in range(3):
        wrong = said[(truth == size) & (said != truth)]
        for other in {0, 1, 2} - {size}:
            assert (wrong == other).sum() == pytest.approx(len(wrong) / 2, rel=0.15)
    assert (sizes_of(predictor.tokens(prompts, hints), Classes()) == said).all()


def test_one_by_one_is_the_same_as_all_at_once_and_seeds_differ() -> None:
    prompts, outputs = (part[:300] for part in trace())
    ids = np.arange(300)
    table = LengthTable.train(prompts, outputs)
    for predictor in (Oracle(), NoisyOracle(0.6, seed=1), table):
        together = predictor.predict(prompts, Hints(outputs, ids))
        alone = [int(predictor.predict([p], Hints([o], [n]))[0]) for p, o, n in zip(prompts, outputs, ids, strict=True)]
        assert together.tolist() == alone
    one, other = (NoisyOracle(0.6, seed=seed).predict(prompts, Hints(outputs, ids)) for seed in (1, 2))
    assert (one != other).any()


def test_a_table_of_the_first_half_is_far_better_on_the_second_than_the_commonest_size() -> None:
    prompts, outputs = trace()
    half = len(prompts) // 2
    commonest = int(np.bincount(sizes_of(outputs[:half], Classes())).argmax())
    table = LengthTable.train(prompts[:half], outputs[:half])
    found = accuracy(table, prompts[half:], outputs[half:], commonest)
    assert found.commonest < 0.4
    assert found.right > 0.7
    cautious = accuracy(LengthTable.train(prompts[:half], outputs[:half], caution=3.0), prompts[half:], outputs[half:], commonest)
    assert cautious.too_small < 0.4 * found.too_small, "who fears long answers in short pools is wrong the other way"


def test_planned_tokens_are_the_mean_of_the_size_that_was_said() -> None:
    table = LengthTable.train([100] * 10 + [2000] * 10, [10, 30] * 5 + [400, 600] * 5)
    assert table.tokens([100, 2000]).tolist() == [20, 500]


def test_a_table_that_knows_nothing_says_long_and_learns_from_what_finishes() -> None:
    table = LengthTable()
    assert table.predict([5, 500, 5000]).tolist() == [2, 2, 2]
    table.learn([500] * 20, [10] * 20)
    assert table.predict([500]).tolist() == [0]
    table.learn([5000] * 60, [200] * 60)
    assert table.predict([500, 5000]).tolist() == [0, 1]
    with pytest.raises(ValueError, match="1 prompts and 0 outputs"):
        table.learn([1], [])
