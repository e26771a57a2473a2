"""SIGKILL at every listed boundary: what is left is baseline or a live setpoint, never a setting that nobody answers for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from powerd.hw import fence
from powerd.hw.frames import Command, Table
from powerd.killpoint import KILL_POINTS
from powerd.model import Control, Verdict
from tests.hw.rig import LIMIT, LOCK, PATIENCE_S, Rig

_SET_POINTS = [
    p for p in KILL_POINTS if p.startswith("hw.") and p.split(".")[1] in ("intent", "call", "readback", "verified", "done")
]
_RESTORE_POINTS = [p for p in KILL_POINTS if p.startswith("hw.restore.")]
_SUPERVISOR_POINTS = ["hw.desired.received", "hw.generation.raised"]
_PLAN_POINTS = [p for p in KILL_POINTS if p.startswith("hw.plan.")]  # in test_plan_ends
_START_POINTS = ["hw.worker.started", "hw.journal.compacted"]

_READ = """
import pynvml as n
n.nvmlInit()
for i in range(n.nvmlDeviceGetCount()):
    h = n.nvmlDeviceGetHandleByIndex(i)
    print(n.nvmlDeviceGetPowerManagementLimit(h), n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM))
"""


def seen_by_another_process(rig: Rig) -> list[tuple[int, int]]:
    """(limit, SM clock) per GPU as any other NVML client reads them."""
    run = subprocess.run(
        [sys.executable, "-c", _READ],
        env={**os.environ, **rig.node.env()},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    return [(int(a), int(b)) for a, b in (line.split() for line in run.stdout.splitlines())]


def test_every_hw_kill_point_is_tried_here() -> None:
    tried = {*_SET_POINTS, *_RESTORE_POINTS, *_SUPERVISOR_POINTS, *_START_POINTS, *_PLAN_POINTS}
    assert tried == {p for p in KILL_POINTS if p.startswith("hw.")}


@pytest.mark.parametrize("point", _SET_POINTS)
def test_worker_killed_while_setting_is_followed_by_one_that_sets_what_is_still_wanted(rig: Rig, point: str) -> None:
    rig.serve(kill_at=point)
    powerd = rig.connect()
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT), (rig.uuids[1], Control.SM_CLOCK, LOCK))
    powerd.event("worker_died")
    assert powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT).verdict is Verdict.APPLIED
    powerd.outcome(seq, rig.uuids[1], Control.SM_CLOCK, Verdict.PENDING_LOAD)
    assert rig.truth(0)["limit_mw"] == 400_000
    assert rig.truth(1)["locked_clocks_mhz"] == [1200, 1200]
    seq = powerd.desire()
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    powerd.outcome(seq, rig.uuids[1], Control.SM_CLOCK)
    assert rig.at_baseline()


@pytest.mark.parametrize("point", _SET_POINTS)
def test_worker_killed_while_setting_for_a_powerd_that_dies_too_ends_at_baseline(rig: Rig, point: str) -> None:
    serve = rig.serve("--exit-with-peer", kill_at=point)
    powerd = rig.connect()
    powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT), (rig.uuids[0], Control.SM_CLOCK, LOCK))
    powerd.event("worker_died")
    powerd.close()
    assert serve.wait(PATIENCE_S) == 0
    with rig.load(0):
        limit_mw, clock_mhz = seen_by_another_process(rig)[0]
    assert limit_mw == 700_000
    assert clock_mhz > 1200


@pytest.mark.parametrize("point", _RESTORE_POINTS)
def test_worker_killed_while_restoring_is_followed_by_one_that_restores(rig: Rig, point: str) -> None:
    rig.serve(kill_at=point)
    powerd = rig.connect()
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT), (rig.uuids[1], Control.POWER_LIMIT, LIMIT))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    powerd.outcome(seq, rig.uuids[1], Control.POWER_LIMIT)
    seq = powerd.desire((rig.uuids[1], Control.POWER_LIMIT, LIMIT))
    powerd.event("worker_died")
    powerd.outcome(seq, rig.uuids[1], Control.POWER_LIMIT, Verdict.APPLIED)
    if point != "hw.restore.written":
        powerd.event("restored", uuid=rig.uuids[0], cause="journal_replay")
    assert [row["limit_mw"] for row in rig.node.show()["gpus"]] == [700_000, 400_000]


@pytest.mark.parametrize("point", _SUPERVISOR_POINTS)
def test_supervisor_killed_leaves_nothing_once_restore_has_run(rig: Rig, point: str) -> None:
    serve = rig.serve(kill_at=f"{point}:2" if point == "hw.desired.received" else point)
    if point == "hw.desired.received":
        powerd = rig.connect()
        seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT), (rig.uuids[1], Control.SM_CLOCK, LOCK))
        powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
        powerd.outcome(seq, rig.uuids[1], Control.SM_CLOCK)
        powerd.desire()
    assert serve.wait(PATIENCE_S) == -9
    code, text = rig.restore()
    assert code == 0, text
    assert rig.at_baseline()


@pytest.mark.parametrize("point", _START_POINTS)
def test_a_worker_killed_at_its_start_is_an_end_with_one_line_and_leaves_nothing(rig: Rig, point: str) -> None:
    serve = rig.serve(kill_at=point)
    assert serve.wait(PATIENCE_S) == 75
    assert serve.stderr is not None
    assert "worker died (signal 9)" in serve.stderr.read()
    assert rig.restore()[0] == 0
    assert rig.at_baseline()


@pytest.mark.parametrize("point", _RESTORE_POINTS)
def test_restore_killed_half_way_is_finished_by_the_next(rig: Rig, point: str) -> None:
    killed_while_set(rig)
    first = rig.command("restore", kill_at=point)
    assert first.wait(PATIENCE_S) == -9
    code, text = rig.restore()
    assert code == 0, text
    assert rig.at_baseline()


def killed_while_set(rig: Rig) -> None:
    """A node on which powerd-hw set things and then died with all its processes at once."""
    serve = rig.serve()
    powerd = rig.connect()
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT), (rig.uuids[1], Control.SM_CLOCK, LOCK))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    powerd.outcome(seq, rig.uuids[1], Control.SM_CLOCK)
    kill_all(rig, powerd.until(lambda: powerd.tables.get(Table.STATUS))["worker_pid"], serve)
    assert rig.truth(0)["limit_mw"] == 400_000
    assert rig.truth(1)["locked_clocks_mhz"] == [1200, 1200]


def kill_all(rig: Rig, worker_pid: int, serve: subprocess.Popen[str]) -> None:
    """As systemd does: nobody of the unit is left to restore anything."""
    os.kill(serve.pid, 19)  # SIGSTOP, so that it starts no other worker
    os.kill(worker_pid, 9)
    serve.kill()
    serve.wait(PATIENCE_S)


def test_restore_after_sigkill_of_everything_says_what_it_restored(rig: Rig) -> None:
    killed_while_set(rig)
    code, text = rig.restore()
    assert code == 0, text
    assert sorted(text.splitlines()) == sorted(
        [
            f"restored {rig.uuids[0]} power_limit back at 700000 mW",
            f"restored {rig.uuids[1]} sm_clock back at unlocked",
        ]
    )
    assert rig.at_baseline()
    assert rig.restore() == (0, "")


def test_the_next_start_restores_what_a_killed_one_left(rig: Rig) -> None:
    killed_while_set(rig)
    rig.serve()
    powerd = rig.connect()
    powerd.until(rig.at_baseline)


def test_a_worker_restores_by_itself_when_its_supervisor_dies(rig: Rig) -> None:
    serve = rig.serve()
    powerd = rig.connect()
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    serve.kill()
    code, text = rig.restore()  # waits for the worker's lock, then finds nothing left to do
    assert (code, text) == (0, "")
    assert rig.at_baseline()


def test_after_a_hand_over_mark_settings_stay_for_the_next_powerd_hw(rig: Rig) -> None:
    serve = rig.serve()
    powerd = rig.connect()
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    mark = rig.command("hand-over")
    assert mark.wait(PATIENCE_S) == 0
    serve.terminate()
    assert serve.wait(PATIENCE_S) == 0
    assert rig.truth(0)["limit_mw"] == 400_000
    assert rig.restore()[0] == 0
    assert rig.truth(0)["limit_mw"] == 400_000
    rig.serve()
    powerd = rig.connect()
    calls = rig.truth(0)["setter_calls"]
    powerd.seq = 7
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT, Verdict.APPLIED)
    assert rig.truth(0)["setter_calls"] == calls + 1  # the same value once more, never the baseline between
    seq = powerd.desire()
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    assert rig.at_baseline()


def test_generations_rise_and_an_old_one_cannot_write(rig: Rig) -> None:
    rig.journal.mkdir(mode=0o700)
    old = fence.next_generation(rig.journal, lambda _: False)
    mine = fence.Fence(rig.journal, old)
    with mine.held():
        waited: list[int] = []

        def wait(attempt: int) -> bool:
            waited.append(attempt)
            return attempt < 2

        new = fence.next_generation(rig.journal, wait)
        assert waited == [0, 1, 2]  # the new one waits for a call in progress, but not for ever
    assert new == old + 1
    with pytest.raises(fence.StaleGenerationError), mine.held():
        pytest.fail("an old generation got through its fence")


def test_three_crashes_in_a_minute_are_safe_mode_until_resume(rig: Rig) -> None:
    rig.serve()
    powerd = rig.connect()
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    killed: set[int] = set()
    for _ in range(3):
        fresh = powerd.until(
            lambda: powerd.tables[Table.STATUS]["serving"] and powerd.tables[Table.STATUS]["worker_pid"] not in killed
        )
        assert fresh
        killed.add(powerd.tables[Table.STATUS]["worker_pid"])
        os.kill(powerd.tables[Table.STATUS]["worker_pid"], 9)
    powerd.event("safe_mode")
    powerd.event("restored", uuid=rig.uuids[0], cause="journal_replay")
    powerd.until(rig.at_baseline)
    powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    powerd.event("desired_refused")
    powerd.command(Command.RESUME)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT, Verdict.APPLIED)


def test_restore_says_what_it_could_not_do_and_does_it_the_next_time(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(time="x20")
    killed_while_set(rig)
    rig.node.fault("lost", 0)
    code, text = rig.restore()
    assert code == 75
    assert f"{rig.uuids[0]} power_limit: not restored" in text
    assert rig.truth(1)["locked_clocks_mhz"] is None
    rig.node.fault("hang-node")
    rig.node.clear_faults(0)
    code, text = rig.restore()
    assert code == 75, text
    rig.node.clear_faults()
    assert rig.restore()[0] == 0
    assert rig.at_baseline()
