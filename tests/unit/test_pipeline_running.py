"""The conductor plans and follows: beats in the order of the plan, the saving, stragglers, whatever goes wrong."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.unit.pipeline_rig import CLOCKS, FakeClient, Job


def test_every_rank_beats_its_plan_in_order_and_the_iteration_takes_no_longer(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.until("profiling")
    before_s = job.time_s()  # at the highest clock
    job.until("running")
    job.steps(1)
    for rank in job.ranks:
        beats = rank.client.beats[-1]
        beats.sent.clear()
        step = rank.conductor._step
        job_order = rank.order
        assert len(beats.plan.clocks_mhz) == len(job_order)
    assert job.time_s() <= before_s * 1.0001
    for rank in job.ranks:
        beats = rank.client.beats[-1]
        count = len(rank.order)
        assert beats.sent == [*((step, k) for k in range(1, count)), (step + 1, 0)]
        assert beats.safes == 0
    lowest = [min(rank.client.beats[-1].plan.clocks_mhz) for rank in job.ranks]
    assert min(lowest[:-1]) < CLOCKS[-1]  # the light stages run slower
    plan = job.ranks[0].conductor.plan
    assert plan is not None
    assert plan["energy_j"] < plan["baseline_j"]
    assert plan["iteration_s"] <= plan["deadline_s"] * (1 + 1e-9)


def test_evaluation_and_broken_steps_mean_the_safe_clock_and_training_resumes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(tmp_path)
    job.until("running")
    job.steps(2)
    with caplog.at_level(logging.WARNING, "powerd.pipeline"):
        job.steps(2, backward=False)
    counts = [rank.conductor.steps for rank in job.ranks]
    assert all(rank.client.beats[-1].safes > 0 for rank in job.ranks)
    assert len([r for r in caplog.records if "rank 0 " in r.message]) == 1  # one warning, though two passes
    for rank in job.ranks:
        rank.client.beats[-1].sent.clear()
    job.steps(1)
    for rank, before in zip(job.ranks, counts, strict=True):
        sent = rank.client.beats[-1].sent
        assert sent[0][1] == 0  # the step begins anew
        assert [index for _, index in sent] == [*range(len(rank.order)), 0]
        assert rank.conductor.steps == before + 1
    rank = job.ranks[0]
    rank.conductor.step_begin()
    rank.conductor.begin(0, "forward", 0)
    rank.conductor.step_abort()
    assert rank.client.gpu.plan_mhz is None


def test_ranks_that_disagree_are_named_once_and_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def recorded(pipeline: int, rank: int, order: list[Any]) -> list[Any]:
        return order if (pipeline, rank) != (1, 2) else [*order[2:], *order[:2]] if False else _swapped(order)

    job = Job(tmp_path, pipelines=2, recorded=recorded, name="gpipe")
    with caplog.at_level(logging.WARNING, "powerd.pipeline"):
        job.until("off")
    warnings = [r.message for r in caplog.records]
    assert len(warnings) == 1
    assert "rank 2 of pipeline 1 ran another order than rank 2 of pipeline 0" in warnings[0]
    calls = job.exchange.calls
    job.steps(3)
    assert job.exchange.calls == calls
    assert all(rank.client.released for rank in job.ranks)


def _swapped(order: list[Any]) -> list[Any]:
    half = len(order) // 2
    return [*order[:half], order[half + 1], order[half], *order[half + 2 :]]


def test_a_schedule_that_promises_another_order_is_overruled_by_the_recorded_one(tmp_path: Path) -> None:
    job = Job(tmp_path, name="gpipe", recorded=lambda pipeline, rank, order: _swapped(order))
    job.until("running")
    assert [i for i, _, _ in job.ranks[0].conductor.agreement.order[0]] == [0] * 8
    assert job.ranks[0].conductor.agreement.order[0][4:6] == ((0, "backward", 1), (0, "backward", 0))


def test_without_a_daemon_training_goes_on_and_begins_when_it_comes(tmp_path: Path) -> None:
    clients = [FakeClient(n) for n in range(3)]
    for client in clients:
        client.up = False
    job = Job(tmp_path, clients=clients)
    job.steps(10)
    assert job.states == {"waiting"}
    for client in clients:
        client.up = True
    job.until("running")


def test_a_lost_lease_in_the_sweep_waits_and_goes_on_where_it_was(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.until("profiling")
    job.steps(8)
    known = set(job.ranks[0].conductor.agreement.profile.sheets)
    assert known
    job.ranks[1].client.lose()
    job.until("waiting", 10)
    job.ranks[1].client.up = True
    job.until("running")
    assert known <= set(job.ranks[0].conductor.agreement.profile.sheets)


def test_a_lost_lease_while_running_is_acquired_and_armed_again(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.until("running")
    job.steps(3)
    client = job.ranks[1].client
    client.lose()
    job.steps(4)
    assert job.states == {"running"}
    client.up = True
    job.steps(6)
    assert client.beats[-1].alive
    assert client.beats[-1].sent
    assert job.ranks[1].conductor.plan is not None


def test_a_plan_that_the_daemon_refuses_is_offered_ever_less_often_and_taken_when_it_may(tmp_path: Path) -> None:
    job = Job(tmp_path)
    client = job.ranks[1].client
    client.refuses = True
    job.until("running")
    job.steps(80)
    assert 4 <= len(client.beats) <= 12  # of forty exchanges
    client.refuses = False
    job.steps(80)
    assert client.beats[-1].alive
    assert client.beats[-1].sent


def test_a_restart_knows_what_was_measured_and_plans_at_once(tmp_path: Path) -> None:
    first = Job(tmp_path)
    first.until("profiling")
    first.steps(12)
    first.close()
    known = len(first.ranks[0].conductor.agreement.profile.sheets)
    second = Job(tmp_path)  # goes on where the first was
    second.until("profiling")
    assert len(second.ranks[0].conductor.agreement.profile.sheets) == known > 1
    second.until("running")
    second.close()
    third = Job(tmp_path, pipelines=2)  # more pipelines, the same stages
    assert third.until("running") <= 4
    fourth = Job(tmp_path, ranks=4)  # another model
    fourth.until("profiling", 5)


def test_a_clock_that_the_daemon_cannot_tell_of_is_measured_again_then_left_out(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.until("profiling")
    job.ranks[2].client.deaf = 1
    job.until("running")
    assert CLOCKS[-1] in job.ranks[0].conductor.agreement.profile.sheets


@pytest.mark.parametrize("cause", ["slower", "ceiling", "clamped"])
def test_the_other_pipeline_follows_a_straggler_and_both_come_back(tmp_path: Path, cause: str) -> None:
    job = Job(tmp_path, pipelines=2, exchange_steps=1)
    job.until("running")
    job.steps(3)
    usual = job.ranks[0].conductor.plan
    victim = job.ranks[5].client.gpu  # the last, heaviest stage of pipeline 1
    if cause == "slower":
        victim.slower = 1.3
    else:
        victim.ceiling_mhz = 1020
    if cause == "clamped":
        victim.clamped_mhz, job.ranks[5].client.deaf = 1020, 10_000  # the beats alone tell of it
    job.steps(12)
    followed, own = job.ranks[0].conductor.plan, job.ranks[5].conductor.plan
    assert usual is not None
    assert followed is not None
    assert own is not None
    assert followed["id"] != usual["id"]
    assert followed["iteration_s"] > usual["iteration_s"] * 1.1
    assert followed["energy_j"] < usual["energy_j"] + 240 * (followed["deadline_s"] - usual["deadline_s"])
    assert own["iteration_s"] == pytest.approx(followed["deadline_s"], rel=0.05)
    plans = {rank.conductor.plan["id"] for rank in job.ranks if rank.conductor.plan}
    job.steps(10)
    assert {rank.conductor.plan["id"] for rank in job.ranks if rank.conductor.plan} == plans  # calm while nothing changes
    victim.slower, victim.ceiling_mhz, victim.clamped_mhz = 1.0, CLOCKS[-1], None
    job.steps(14)
    for rank in (job.ranks[0], job.ranks[5]):
        assert rank.conductor.plan is not None
        assert rank.conductor.plan["id"] == usual["id"]
