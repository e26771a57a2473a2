"""What powerd-hw itself refuses: a site that only monitors, the panic file, with powerd alive or dead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from powerd.hw.frames import Command, Table
from powerd.model import Control, Verdict
from tests.hw.rig import LIMIT, PATIENCE_S, Rig
from tests.hw.test_crash import killed_while_set


def truth_until(rig: Rig, condition: Callable[[], bool]) -> None:
    """For what no frame announces."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, rig.node.show()
        threading.Event().wait(0.01)


def test_a_node_that_only_monitors_sets_nothing_whatever_powerd_sends(rig: Rig) -> None:
    rig.configure(control=False)
    rig.serve()
    powerd = rig.connect()
    row = (rig.uuids[0], Control.POWER_LIMIT, LIMIT)
    outcome = powerd.outcome(powerd.desire(row), rig.uuids[0], Control.POWER_LIMIT)
    assert (outcome.verdict, outcome.requested) == (Verdict.FAILED, LIMIT)
    assert "control = false" in outcome.detail
    assert "control = false" in powerd.event("desired_refused")["detail"]
    powerd.outcome(powerd.desire(row), rig.uuids[0], Control.POWER_LIMIT)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, None))
    assert powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT).verdict is Verdict.APPLIED
    assert [e["kind"] for e in powerd.events].count("desired_refused") == 1
    assert powerd.hello["control"] is False
    assert powerd.tables[Table.STATUS]["control"] is False
    assert rig.truth(0)["setter_calls"] == 0


def test_a_node_that_only_monitors_still_undoes_what_a_killed_one_left(rig: Rig) -> None:
    killed_while_set(rig)
    rig.configure(control=False)
    rig.serve()
    again = rig.connect()
    again.event("restored", uuid=rig.uuids[0], cause="journal_replay")
    truth_until(rig, rig.at_baseline)  # the other control has an event of its own


def test_the_panic_file_is_baseline_without_powerd_and_wants_count_again_when_it_is_gone(rig: Rig) -> None:
    rig.configure(grace_s=60)
    rig.serve()
    powerd = rig.connect()
    row = (rig.uuids[0], Control.POWER_LIMIT, LIMIT)
    powerd.outcome(powerd.desire(row), rig.uuids[0], Control.POWER_LIMIT)
    powerd.close()
    rig.panic_file.touch()
    truth_until(rig, rig.at_baseline)
    back = rig.connect()
    back.seq = 100
    assert back.until(lambda: back.tables.get(Table.STATUS))["hold"] == "panic"
    back.desire(row)
    back.event("desired_refused")
    back.command(Command.RESUME)
    back.event("resume_refused")
    assert rig.at_baseline()
    rig.panic_file.unlink()
    back.until(lambda: back.tables[Table.STATUS]["hold"] is None)
    assert back.outcome(back.desire(row), rig.uuids[0], Control.POWER_LIMIT).verdict is Verdict.APPLIED
    assert rig.truth(0)["limit_mw"] == 400_000


def test_a_panic_that_was_asked_for_outlives_the_panic_file(rig: Rig) -> None:
    rig.panic_file.touch()
    rig.serve()
    powerd = rig.connect()
    powerd.until(lambda: powerd.tables.get(Table.STATUS, {}).get("hold") == "panic")
    powerd.command(Command.PANIC)
    rig.panic_file.unlink()
    assert "panic" in powerd.event("panic_file_gone")["detail"]
    powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    powerd.event("desired_refused")
    powerd.command(Command.RESUME)
    powerd.until(lambda: powerd.tables[Table.STATUS]["hold"] is None)
    assert rig.truth(0)["setter_calls"] == 0
