"""The autoscaling policy of Ray Serve, called as Serve's controller calls it; without Ray."""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from powerd_integrations.fleet.published import Group, PublishedPlan, write_plan
from powerd_integrations.ray_serve.policy import PowerdPolicy
from tests.e2e.live import wait_for


@dataclass
class Context:
    """What the policy reads of Serve's AutoscalingContext."""

    target_num_replicas: int
    total_queued_requests: float = 0.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.json"


def decide(path: Path, now: int, queued: float = 0.0, tp: int = 8) -> tuple[int, str]:
    policy = PowerdPolicy(str(path), "LL", tp, stale_after_s=30.0)
    if path.exists():
        wait_for("the plan is read", lambda: policy(Context(now))[1]["why"] != "no plan yet")
    count, state = policy(Context(now, queued))
    return count, str(state["why"])


def publish(path: Path, replicas: int, age_s: float = 0.0) -> None:
    write_plan(PublishedPlan(1, None, time.time() - age_s, desired={Group("LL", 8): replicas}), path)


def test_without_a_plan_the_count_stays(path: Path) -> None:
    assert decide(path, 3) == (3, "no plan yet")


def test_a_deployment_that_the_plan_does_not_know_stays(path: Path) -> None:
    publish(path, 5)
    assert decide(path, 2, tp=4) == (2, "the plan does not know this deployment")


@pytest.mark.parametrize(("now", "wanted"), [(1, 5), (5, 1), (2, 0), (0, 2)])
def test_the_count_follows_the_plan(path: Path, now: int, wanted: int) -> None:
    publish(path, wanted)
    assert decide(path, now) == (wanted, "")


def test_a_silent_planner_takes_nobody_away_but_its_last_word_may_add(path: Path) -> None:
    publish(path, 2, age_s=300.0)
    assert decide(path, 4) == (4, "the planner has been silent for 300 s: nothing shrinks")
    assert decide(path, 1) == (2, "")


def test_nobody_waits_for_ever_at_a_deployment_that_goes(path: Path) -> None:
    publish(path, 0)
    assert decide(path, 1, queued=2.0) == (1, "somebody still waits here")
    assert decide(path, 0, queued=1.0) == (1, "somebody still waits here")


def test_it_travels_to_serves_controller(path: Path) -> None:
    publish(path, 2)
    copy = pickle.loads(pickle.dumps(PowerdPolicy(str(path), "LL", 8)))
    wait_for("the copy reads the plan", lambda: copy(Context(1))[0] == 2)
