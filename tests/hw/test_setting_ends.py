"""Everything that ends a setting: expiry, powerd staying away, SIGTERM, panic and quiesce."""

from __future__ import annotations

import os

from powerd.hw.frames import Command, Table
from powerd.model import Control, Verdict
from tests.hw.rig import LIMIT, LOCK, PATIENCE_S, Rig, served, truth_until

# ends of settings


def test_a_setpoint_that_expires_is_restored_without_powerd(rig: Rig) -> None:
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT), ttl_s=0.3)
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    powerd.event("restored", uuid=rig.uuids[0], cause="setpoint_expired")
    assert rig.at_baseline()


def test_settings_outlive_a_powerd_that_comes_back_within_the_grace(rig: Rig) -> None:
    rig.configure(grace_s=20)
    powerd = served(rig)
    powerd.outcome(powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT)), rig.uuids[0], Control.POWER_LIMIT)
    powerd.close()
    back = rig.connect()
    back.seq = 100
    outcome = back.outcome(back.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT)), rig.uuids[0], Control.POWER_LIMIT)
    assert outcome.verdict is Verdict.APPLIED
    assert (rig.truth(0)["limit_mw"], rig.truth(0)["setter_calls"]) == (400_000, 1)


def test_settings_end_with_the_grace_when_powerd_stays_away(rig: Rig) -> None:
    powerd = served(rig)
    powerd.outcome(powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT)), rig.uuids[0], Control.POWER_LIMIT)
    powerd.close()
    truth_until(rig, rig.at_baseline)


def test_sigterm_restores_everything_and_exits_0(rig: Rig) -> None:
    serve = rig.serve()
    powerd = rig.connect()
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT), (rig.uuids[1], Control.SM_CLOCK, LOCK))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    powerd.outcome(seq, rig.uuids[1], Control.SM_CLOCK)
    serve.terminate()
    powerd.event("restored", uuid=rig.uuids[0], cause="shutdown")
    assert serve.wait(PATIENCE_S) == 0
    assert rig.at_baseline()


def test_panic_restores_and_refuses_until_resume(rig: Rig) -> None:
    powerd = served(rig)
    row = (rig.uuids[0], Control.POWER_LIMIT, LIMIT)
    powerd.outcome(powerd.desire(row), rig.uuids[0], Control.POWER_LIMIT)
    powerd.command(Command.PANIC)
    powerd.event("restored", uuid=rig.uuids[0], cause="panic")
    powerd.desire(row)
    powerd.event("desired_refused")
    assert rig.at_baseline()
    powerd.command(Command.RESUME)
    powerd.outcome(powerd.desire(row), rig.uuids[0], Control.POWER_LIMIT, Verdict.APPLIED)
    assert rig.truth(0)["limit_mw"] == 400_000


def test_quiesce_restores_closes_every_handle_and_resumes(rig: Rig) -> None:
    powerd = served(rig)
    row = (rig.uuids[0], Control.POWER_LIMIT, LIMIT)
    powerd.outcome(powerd.desire(row), rig.uuids[0], Control.POWER_LIMIT)
    worker = powerd.until(lambda: powerd.tables.get(Table.STATUS, {}).get("worker_pid"))
    powerd.command(Command.QUIESCE)
    powerd.until(lambda: powerd.tables[Table.STATUS]["hold"] == "quiesced" and not powerd.tables[Table.STATUS]["worker_pid"])
    assert not os.path.exists(f"/proc/{worker}")  # with the process all its handles are gone
    assert rig.at_baseline()
    powerd.command(Command.RESUME)
    powerd.until(lambda: powerd.tables[Table.STATUS]["serving"])
    powerd.outcome(powerd.desire(row), rig.uuids[0], Control.POWER_LIMIT, Verdict.APPLIED)


def test_quiesce_with_a_limit_resumes_by_itself(rig: Rig) -> None:
    powerd = served(rig)
    before = powerd.until(lambda: powerd.tables.get(Table.STATUS, {}).get("generation"))
    powerd.command(Command.QUIESCE, 300)
    powerd.until(lambda: powerd.tables[Table.STATUS]["serving"] and powerd.tables[Table.STATUS]["generation"] > before)
