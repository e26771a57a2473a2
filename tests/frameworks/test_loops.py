"""Plain loops, DDP and FSDP2: steps by hand or by the optimizer's hook, one clock on all ranks, nothing that raises."""

from __future__ import annotations

import pytest

from tests.e2e.live import LiveNode
from tests.frameworks.rig import run_job

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("frameworks")]

TOP_MHZ, IDLE_MHZ = 1410, 480


def test_a_plain_loop_is_measured_tuned_lowered_and_reset(live: LiveNode) -> None:
    (said,) = run_job(live, "plain_job")
    assert said["measured_steps"] > 40
    assert 100 < said["energy_j"] / said["measured_s"] < 500, "watts of a busy GPU"
    assert 0 < said["lowest_mhz"] < TOP_MHZ, "the search has tried a lower clock"
    assert said["caught"] == "an exception of the step's own"
    assert said["reset_mhz"] == 0, "an exception gives the clock back before it goes on"
    assert (said["lock_after_mhz"], said["leases"]) == (0, 0)
    assert said["waiting_mhz"] == IDLE_MHZ, "a long wait for input lowers the clock"
    assert said["busy_mhz"] != IDLE_MHZ, "a GPU that works is not idle, whatever nobody said"
    assert said["after_mhz"] != IDLE_MHZ, "the next step has its clock again"
    assert "goes on without it" not in said["stderr"]


def test_without_a_daemon_training_goes_on_after_one_warning(live: LiveNode) -> None:
    (said,) = run_job(live, "plain_job", "nodaemon", env={"POWERD_SOCKET": "/nowhere/powerd.sock"})
    assert said["caught"] == "an exception of the step's own"
    assert said["steps"] == 32
    assert said["measured_steps"] == 0
    warnings = [line for line in said["stderr"].splitlines() if line.startswith("WARNING") and "goes on without it" in line]
    assert len(warnings) <= 2, "one of the steps', one of the test's own client"
    assert "Traceback" not in said["stderr"]


def test_a_rank_without_powerd_makes_the_others_go_on_without_it(live: LiveNode) -> None:
    with_it, without_it = run_job(live, "lonely_job", ranks=2)
    assert with_it["made"] == without_it["made"] == 20
    assert with_it["clock_mhz"] is None
    assert with_it["stderr"].count("goes on without it") == 1


def test_ranks_share_one_clock(live: LiveNode) -> None:
    both = run_job(live, "ddp_job", ranks=2)
    for said in [row for rank in both for row in (rank, *rank["before"])]:
        assert said["same"], "both ranks wanted the same clock after every step"
        assert said["tried"] >= 1
        assert 0 < said["lowest_mhz"] < TOP_MHZ
        assert said["energy_j"] > 0
        assert (said["lock_after_mhz"], said["leases"]) == (0, 0)
    assert [row["kind"] for row in (*both[0]["before"], both[0])] == ["ddp", "fsdp"]
