"""Prefill and decode apart or together: who wins when, on the shipped engine model of Llama-2-70B on H100."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from powerd_policies.dynamollm.classes import Classes, Slo
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.models import load
from powerd_policies.dynamollm.phases import Links, better, mixed, second_late, split
from powerd_policies.dynamollm.steady import Lengths, Work

MODEL = Path(__file__).parents[3] / "policies/profiles/llm/llama2-70b_h100.engine.csv"


@cache
def engine() -> EngineModel:
    return load(MODEL)


def work(requests_per_s: float, prompt: int = 600, output: int = 200, name: str = "MM") -> dict[str, Work]:
    return {name: Work(requests_per_s, Lengths.fixed(prompt, output))}


def test_a_busy_service_is_cheaper_apart_and_a_quiet_one_together() -> None:
    busy_mixed, busy_split = mixed(engine(), work(40.0), 96), split(engine(), work(40.0), 96)
    quiet_mixed, quiet_split = mixed(engine(), work(2.0), 96), split(engine(), work(2.0), 96)
    assert busy_mixed
    assert busy_split
    assert quiet_mixed
    assert quiet_split
    assert busy_split.power_w < busy_mixed.power_w
    assert quiet_split.power_w > quiet_mixed.power_w, "one instance has room for both, two are half empty"
    assert better(engine(), work(40.0), 96) == busy_split
    assert better(engine(), work(2.0), 96) == quiet_mixed


def test_each_side_has_the_clock_of_its_own_promise() -> None:
    found = split(engine(), work(10.0, 3000, 50, "LS"), 96)
    assert found
    prefill, decode = found.sides
    assert (prefill.role, decode.role) == ("prefill", "decode")
    assert prefill.power_w > decode.power_w, "much to read and little to write"
    assert prefill.clock_mhz < decode.clock_mhz, "the TTFT is long; the gap before the second token of a short answer is not"
    assert found.gpus == prefill.gpus + decode.gpus <= 96
    strict = split(engine(), work(10.0), 96, replace(Classes(), slos={"MM": Slo(0.4, 0.045)}))
    loose = split(engine(), work(10.0), 96)
    assert strict
    assert loose
    assert strict.sides[1].power_w > loose.sides[1].power_w, "faster tokens cost more on the decode side"
    assert strict.sides[0] == loose.sides[0], "and nothing on the other"


def test_the_way_of_the_kv_cache_counts_where_answers_are_short() -> None:
    short = work(20.0, output=90, name="MS")
    near = split(engine(), short, 96, links=Links(bytes_per_s=400e9))
    far = split(engine(), short, 96, links=Links(bytes_per_s=7e9))
    assert near
    assert far
    assert near.sides[0] == far.sides[0], "the first token comes before the move"
    assert near.power_w < far.power_w
    assert split(engine(), short, 96, links=Links(bytes_per_s=2e9)) is None, "the move alone takes longer than the TBT"
    assert split(engine(), work(20.0), 96, links=Links(bytes_per_s=2e9)), "in 200 gaps one is not the P99"


def test_who_just_misses_an_iteration_waits_for_all_of_it() -> None:
    assert second_late(0.1, 50, 0.02, 0.04) == 0.0, "the move and two iterations"
    assert second_late(0.1, 50, 0.02, 0.05) == pytest.approx(0.4)
    assert second_late(0.1, 50, 0.12, 0.01) == 1.0
    assert (second_late(0.1, 100, 0.12, 0.01), second_late(0.1, 101, 0.12, 0.01)) == (1.0, 0.0), "99 and 100 gaps"


def test_what_does_not_fit_is_none() -> None:
    assert mixed(engine(), work(40.0), 8) is None
    assert split(engine(), work(40.0), 8) is None
    assert better(engine(), work(40.0), 8) is None


def test_gpus_that_draw_much_when_off_are_better_used() -> None:
    free = mixed(engine(), work(20.0), 96)
    charged = mixed(engine(), work(20.0), 96, off_w=72.0)
    assert free
    assert charged
    assert charged.power_w + 72.0 * (96 - charged.gpus) <= free.power_w + 72.0 * (96 - free.gpus)
    assert free.power_w <= charged.power_w


@pytest.mark.parametrize("requests_per_s", [0.5, 3.0, 12.0, 30.0])
def test_no_fleet_of_fewer_watts_was_overlooked(requests_per_s: float) -> None:
    """Against every tensor parallelism, clock and count."""
    from powerd_policies.dynamollm.steady import steady

    slos, best_w = Classes().slos, float("inf")
    for (tp, _), at in engine().table.items():
        for count in range(1, 96 // tp + 1):
            state = steady(at, engine().kv_tokens[tp], work(requests_per_s / count))
            if state.meets(slos):
                best_w = min(best_w, state.power_w * tp * count)
    found = mixed(engine(), work(requests_per_s), 96)
    assert found
    assert found.power_w == pytest.approx(best_w)
