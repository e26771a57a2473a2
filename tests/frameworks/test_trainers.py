"""Callbacks of real trainers: they count steps, measure energy, set clocks, and undo them whatever happens."""

from __future__ import annotations

import pytest

from tests.e2e.live import LiveNode, wait_for
from tests.frameworks.rig import run_job

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("frameworks")]

TOP_MHZ = 1410


def test_lightning_measures_tunes_and_undoes(live: LiveNode) -> None:
    (said,) = run_job(live, "lightning_job")
    assert said["global_step"] == said["steps"] == 70, "one step is one optimizer step"
    assert said["measured_steps"] > 20
    assert 100 < said["energy_j"] / said["measured_s"] < 500, "watts of a busy GPU"
    assert 0 < said["lowest_mhz"] < TOP_MHZ, "the search has tried a lower clock"
    assert said["while_saving"] == [480], "a third of the top clock, rounded up to one that there is"
    assert (said["lock_after_mhz"], said["leases"]) == (0, 0)
    job = live.client.job("lightning_job")
    assert (job.state, job.lost_steps, job.checkpoints) == ("ended", 0, 1)
    assert 50 < job.steps <= 70, "all but the first, which are not measured"
    assert job.energy_j == pytest.approx(said["energy_j"], rel=0.05)

    (failed,) = said["before"]
    assert failed["raised"] == "a batch that does not fit"
    assert 0 < failed["lowest_mhz"] < TOP_MHZ, "it happened while a clock was set"
    assert (failed["lock_after_mhz"], failed["leases"]) == (0, 0), "an exception gives the clock back before it goes on"
    assert live.client.job("a fit that fails").exceptions == 1


def test_hugging_face_measures_and_tunes_a_training(live: LiveNode) -> None:
    (said,) = run_job(live, "huggingface_job")
    assert said["global_step"] == said["steps"] == 60, "one step is one optimizer step"
    assert said["measured_steps"] > 20
    assert 100 < said["energy_j"] / said["measured_s"] < 500, "watts of a busy GPU"
    assert 0 < said["lowest_mhz"] < TOP_MHZ, "the search has tried a lower clock"
    assert said["while_saving"][:1] == [480], "a third of the top clock, rounded up to one that there is"
    assert (said["lock_after_mhz"], said["leases"]) == (0, 0)


def test_hugging_face_tells_nobody_of_an_exception_but_the_process_ends(live: LiveNode) -> None:
    run_job(live, "huggingface_job", "fail", "exit")
    wait_for("the GPUs are unlocked", lambda: [row["locked_clocks_mhz"] for row in live.state()["gpus"]] == [None, None])
    assert [view for view in live.client.leases() if view.state != "ended"] == []
