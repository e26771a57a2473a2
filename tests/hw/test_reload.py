"""SIGHUP to powerd-hw: a good configuration takes effect on what is set, a bad one changes nothing."""

from __future__ import annotations

import signal
import subprocess

import pytest

from powerd.hw.frames import Table
from powerd.model import Control, Interval, Verdict
from tests.hw.rig import LIMIT, LOCK, Powerd, Rig


@pytest.fixture
def serve(rig: Rig) -> subprocess.Popen[str]:
    return rig.serve()


@pytest.fixture
def powerd(rig: Rig, serve: subprocess.Popen[str]) -> Powerd:
    """Connected, with a limit and a lock set on GPU 0."""
    powerd = rig.connect()
    uuid = rig.uuids[0]
    seq = powerd.desire((uuid, Control.POWER_LIMIT, LIMIT), (uuid, Control.SM_CLOCK, LOCK), dwell_ms=60_000)
    powerd.outcome(seq, uuid, Control.POWER_LIMIT)
    powerd.outcome(seq, uuid, Control.SM_CLOCK)
    powerd.outcomes.clear()
    return powerd


def reload(powerd: Powerd, serve: subprocess.Popen[str], kind: str = "config_reloaded") -> str:
    powerd.events.clear()
    serve.send_signal(signal.SIGHUP)
    return str(powerd.event(kind)["detail"])


def test_a_setting_within_the_new_limits_is_not_touched(rig: Rig, powerd: Powerd, serve: subprocess.Popen[str]) -> None:
    generation = powerd.tables[Table.STATUS]["generation"]
    rig.configure(hw="sample_hz = 50\nwrite_deadline_s = 5", extra="[limits]\npower_limit_max_w = 500")
    reload(powerd, serve)
    begin = powerd.snapshots
    powerd.until(lambda: powerd.snapshots > begin + 20)
    assert powerd.tables[Table.STATUS]["generation"] == generation
    assert (rig.truth(0)["setter_calls"], rig.truth(0)["limit_mw"]) == (2, 400_000)


def test_a_setting_outside_the_new_limits_is_cut_to_them_at_once(rig: Rig, powerd: Powerd, serve: subprocess.Popen[str]) -> None:
    rig.configure(extra="[limits]\npower_limit_max_w = 350\nsm_clock_max_mhz = 900")
    reload(powerd, serve)
    outcome = powerd.outcome(powerd.seq, rig.uuids[0], Control.POWER_LIMIT, Verdict.APPLIED)
    assert (outcome.requested, outcome.accepted) == (LIMIT, Interval(350_000, 350_000))
    powerd.outcome(powerd.seq, rig.uuids[0], Control.SM_CLOCK)
    assert (rig.truth(0)["limit_mw"], rig.truth(0)["locked_clocks_mhz"]) == (350_000, [900, 900])


def test_a_setting_for_which_the_new_limits_leave_no_value_is_restored(
    rig: Rig, powerd: Powerd, serve: subprocess.Popen[str]
) -> None:
    rig.configure(extra="[limits]\nsm_clock_min_mhz = 1201\nsm_clock_max_mhz = 1202")
    reload(powerd, serve)
    outcome = powerd.outcome(powerd.seq, rig.uuids[0], Control.SM_CLOCK, Verdict.FAILED)
    assert "site's limits" in outcome.detail
    powerd.event("restored", uuid=rig.uuids[0], subject="sm_clock")
    assert rig.truth(0)["locked_clocks_mhz"] is None
    assert rig.truth(0)["limit_mw"] == 400_000


def test_a_baseline_declared_since_is_what_a_setting_ends_at(rig: Rig, powerd: Powerd, serve: subprocess.Popen[str]) -> None:
    rig.configure(extra="[baseline]\npower_limit_w = 600")
    reload(powerd, serve)
    powerd.outcome(powerd.desire(), rig.uuids[0], Control.POWER_LIMIT)
    assert rig.truth(0)["limit_mw"] == 600_000


def test_control_taken_away_undoes_everything_and_given_back_sets_again(
    rig: Rig, powerd: Powerd, serve: subprocess.Popen[str]
) -> None:
    row = (rig.uuids[0], Control.POWER_LIMIT, LIMIT)
    rig.configure(control=False)
    reload(powerd, serve)
    powerd.event("restored", subject="power_limit")
    powerd.event("restored", subject="sm_clock")
    assert rig.at_baseline()
    assert powerd.outcome(powerd.desire(row), rig.uuids[0], Control.POWER_LIMIT, Verdict.FAILED).detail
    rig.configure()
    reload(powerd, serve)
    powerd.until(lambda: powerd.tables[Table.STATUS]["control"])
    powerd.outcome(powerd.desire(row), rig.uuids[0], Control.POWER_LIMIT, Verdict.APPLIED)


@pytest.mark.parametrize(("text", "says"), [("drfit = 1", "did you mean 'drift'"), ("sample_hz = 0", "outside")])
def test_a_bad_configuration_keeps_the_last_good_one_and_says_so(
    rig: Rig, powerd: Powerd, serve: subprocess.Popen[str], text: str, says: str
) -> None:
    rig.configure(hw=text, extra="[limits]\npower_limit_max_w = 300")
    assert says in reload(powerd, serve, "config_refused")
    assert says in powerd.until(lambda: powerd.tables[Table.STATUS]["config_error"])
    powerd.outcome(powerd.desire((rig.uuids[1], Control.POWER_LIMIT, LIMIT)), rig.uuids[1], Control.POWER_LIMIT, Verdict.APPLIED)
    assert rig.truth(1)["limit_mw"] == 400_000


def test_what_cannot_change_while_it_runs_is_named_and_kept(rig: Rig, powerd: Powerd, serve: subprocess.Popen[str]) -> None:
    rig.journal = rig.journal.with_name("elsewhere")
    rig.configure()
    assert "hw.journal_dir" in reload(powerd, serve)
    assert not rig.journal.exists()


def test_the_grace_is_the_new_one(rig: Rig, powerd: Powerd, serve: subprocess.Popen[str]) -> None:
    rig.configure(grace_s=30)
    reload(powerd, serve)
    powerd.close()
    back = rig.connect()
    begin = back.snapshots
    back.until(lambda: back.snapshots > begin + 10)  # longer than the old grace
    assert rig.truth(0)["limit_mw"] == 400_000
