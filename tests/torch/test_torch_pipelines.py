"""torch pipelines with and without powerd: the same training, the promised order, real plans followed by beats."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.live import LiveNode
from tests.torch.rig import train, warnings
from tests.torchenv import torch_python

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.xdist_group("torch")]

INSTRUCTIONS = {"ScheduleGPipe": 8, "Schedule1F1B": 8, "ScheduleInterleaved1F1B": 16, "ScheduleZBVZeroBubble": 24}
SCHEDULES = tuple(INSTRUCTIONS)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """All trainings in one launch of four processes, because starting them is most of the time; "killed" loses its daemon."""
    torch_python()
    trainings = [f"{name}:plain" for name in SCHEDULES]
    trainings += [f"Schedule1F1B:{phase}" for phase in ("missing", "disturbed", "killed")]
    trainings += [f"{name}:alone" for name in SCHEDULES]
    with LiveNode(gpus=4) as node:
        said = train(node, *trainings, "--daemon", str(node.process.pid))
        assert node.process.wait(5) == -9
        return said


def same_training(rank: dict[str, Any], training: str) -> None:
    name = training.partition(":")[0]
    alone, with_powerd = rank[f"{name}:alone"], rank[training]
    steps = len(with_powerd["losses"])
    assert 6 <= steps <= len(alone["losses"])
    assert with_powerd["losses"] == alone["losses"][:steps]
    assert with_powerd["weights"] == alone["weights"][:steps]


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_is_bit_identical_and_every_rank_runs_the_promised_order(ranks: list[dict[str, Any]], name: str) -> None:
    for number, rank in enumerate(ranks):
        same_training(rank, f"{name}:plain")
        said = rank[f"{name}:plain"]
        assert said["promised"] is not None
        assert said["recorded"] == said["promised"], f"rank {number}"
        assert len(said["recorded"][number]) == INSTRUCTIONS[name]
        assert said["restored"], f"rank {number}: detach left something behind"
    assert any(any(rank[f"{name}:alone"]["losses"]) for rank in ranks)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_rank_profiles_plans_and_follows_its_plan(ranks: list[dict[str, Any]], name: str) -> None:
    said = [rank[f"{name}:plain"] for rank in ranks]
    for own in said:
        assert [state for state in own["states"] if state != "waiting"][:4] == ["recording", "profiling", "planning", "running"]
        assert own["plan"] is not None
        assert len(own["plan"]["clocks"][own["rank"]]) == len(own["recorded"][own["rank"]])
        assert [armed["state"] for armed in own["armed"]] == ["running"], own["armed"]
        assert own["armed"][0]["step"] >= 2
    assert len({own["plan"]["id"] for own in said}) == 1
    assert said[0]["plan"]["energy_j"] < said[0]["plan"]["baseline_j"]
    assert sum(own["armed"][0]["switches"] for own in said) > 8  # clocks really change


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_daemon_knows_the_job_and_what_its_steps_used(ranks: list[dict[str, Any]], name: str) -> None:
    said = ranks[0][f"{name}:plain"]
    state, steps, plan, energy_j, time_s = said["job"]
    assert (state, steps, plan) == ("ended", said["steps"], said["plan"]["id"])
    assert 0.5 * said["plan"]["energy_j"] < energy_j < 3 * said["plan"]["baseline_j"]
    assert said["plan"]["iteration_s"] * 0.8 < time_s


def test_an_evaluation_pass_and_a_wrong_order_are_warned_of_once_and_training_goes_on(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        same_training(rank, "Schedule1F1B:disturbed")
        said = rank["Schedule1F1B:disturbed"]
        assert said["steps"] == len(said["losses"])  # the evaluation does not count
        assert said["states"][-1] == "running"
        assert said["armed"][0]["state"] == "running"
        assert len([line for line in warnings(rank, "Schedule1F1B:disturbed") if "safe clock" in line]) == 1


def test_without_a_daemon_training_is_the_same_and_each_rank_warns_once(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        same_training(rank, "Schedule1F1B:missing")
        assert rank["Schedule1F1B:missing"]["states"][-1] == "waiting"
        assert len(warnings(rank, "Schedule1F1B:missing")) == 1, rank["stderr"]


def test_a_daemon_that_is_killed_in_the_middle_of_training_takes_nothing_with_it(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        same_training(rank, "Schedule1F1B:killed")
        assert rank["Schedule1F1B:killed"]["steps"] == len(rank["Schedule1F1B:killed"]["losses"])
        assert len(warnings(rank, "Schedule1F1B:killed")) >= 1
