"""What a powerd that comes back does with the leases it finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from powerd.api import WantSpec
from powerd.clock import NS, RealClock
from powerd.events import EventLog
from powerd.lease import Lease
from powerd.leasebook import LeaseBook
from powerd.leasefile import LeaseFile
from powerd.model import Control, LeaseState

GPU = "GPU-00000000-0000-0000-0000-000000000001"


def lease(name: str, pid: int, now_ns: int) -> Lease:
    wants = (WantSpec(Control.SM_CLOCK, 1200, 1200),)
    return Lease(name, "hash", 0, "root", pid, (GPU,), wants, "test", 60 * NS, now_ns, now_ns + 60 * NS)


def test_only_leases_whose_holder_lives_wait_for_it(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    clock = RealClock()
    file = LeaseFile(tmp_path / "leases.json", "this boot")
    file.save([lease("of-the-dead", gone.pid, clock.now_ns()), lease("of-the-living", os.getpid(), clock.now_ns())], False)
    events = EventLog(clock)
    book = LeaseBook(clock, file, events)
    book.load(True, 5 * NS)
    assert {name: found.state for name, found in book.live_leases.items()} == {"of-the-living": LeaseState.DETACHED}
    assert [(e.subject, e.detail) for e in events.since(0) if e.kind == "lease_ended"] == [("of-the-dead", "holder_died")]
