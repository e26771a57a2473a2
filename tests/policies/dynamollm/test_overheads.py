"""What changes of a fleet cost, with the published fixes and without."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from powerd_policies.dynamollm.overheads import Fixes, Overheads


def test_an_unfixed_start_takes_the_published_six_to_eight_minutes() -> None:
    raw = Overheads(Fixes.none())
    assert 6 * 60 <= raw.start_s() <= 8 * 60
    assert raw.lead_s() == 0.0
    assert raw.start_s(new_node=False) < raw.start_s()
    assert set(raw.start_stages()) == {"vm", "init", "engine", "weights", "kv"}


def test_a_fixed_start_takes_less_than_a_minute_and_is_begun_before_it_is_needed() -> None:
    fixed = Overheads()
    assert fixed.start_s() < 60
    assert fixed.lead_s() == fixed.start_s()


@pytest.mark.parametrize("fix", [field.name for field in fields(Fixes)])
def test_each_fix_saves_something_of_its_own(fix: str) -> None:
    def cost(overheads: Overheads) -> float:
        reshard = overheads.reshard(8, 4, 4_000_000_000)
        return (
            overheads.start_s()
            - overheads.lead_s()
            + overheads.start_s()
            + overheads.clock_set_s
            + reshard.total_s
            + reshard.blocked_s
        )

    assert cost(Overheads(replace(Fixes(), **{fix: False}))) > cost(Overheads())


def test_a_reshard_counts_what_the_busiest_gpu_moves_in_eighths_of_the_model() -> None:
    overheads = Overheads()
    one_t = overheads.weights_bytes // 8
    assert overheads.transfer_s(one_t) == pytest.approx(0.05)
    assert overheads.reshard_s(8, 4, one_t) - overheads.reshard_s(8, 4, 0) == pytest.approx(0.05)
    assert overheads.reshard_s(4, 4) == 0.0
    assert Overheads(Fixes.none()).reshard_s(8, 4, one_t) > 120


def test_without_room_for_both_nobody_serves_during_a_reshard() -> None:
    overheads = Overheads()
    assert overheads.reshard(8, 4).blocked_s == 0.0
    cramped = overheads.reshard(8, 4, fits_memory=False)
    assert cramped.blocked_s == cramped.total_s > 0.0


def test_a_resident_process_sets_a_clock_ten_times_sooner() -> None:
    assert 0.05 <= Overheads(Fixes.none()).clock_set_s <= 0.08
    assert Overheads().clock_set_s == 0.0045
