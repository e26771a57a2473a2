"""Named places at which a test may kill this process, so that every crash boundary is a listed one.

House rules: a name is listed in KILL_POINTS or it is an error; without the environment variable a point costs one comparison.
``POWERD_KILL_AT=NAME[:N]`` sends SIGKILL to the process when it passes NAME for the N-th time (default 1).
``POWERD_KILL_ONCE=PATH`` makes it once for all: whoever can remove PATH dies, its successors with the same environment live.
"""

from __future__ import annotations

import difflib
import os
import signal

from powerd.errors import ConfigError

KILL_POINTS: tuple[str, ...] = (
    # powerd-hw worker: one set, from journal to verification
    "hw.intent.before",
    "hw.intent.written",
    "hw.call.before",
    "hw.call.returned",
    "hw.readback.before",
    "hw.verified",
    "hw.done.written",
    # powerd-hw worker: one restore
    "hw.restore.before",
    "hw.restore.called",
    "hw.restore.written",
    # powerd-hw worker: compaction of its journal
    "hw.journal.compacted",
    # powerd-hw worker: a clock plan
    "hw.plan.armed",
    "hw.plan.followed",
    # powerd-hw supervisor
    "hw.generation.raised",
    "hw.desired.received",
    "hw.plan.received",
    "hw.worker.started",
    # powerd
    "powerd.lease.accepted",
    "powerd.lease.saved",
    "powerd.desired.sent",
    "powerd.outcome.received",
    "powerd.lease.answered",
    "powerd.plan.sent",
    "powerd.plan.armed",
    # client
    "client.lease.requested",
    "client.lease.granted",
    "client.attached",
    "client.wants.changed",
    "client.plan.armed",
    "client.release.before",
)

_name, _, _count = os.environ.get("POWERD_KILL_AT", "").partition(":")
_once = os.environ.get("POWERD_KILL_ONCE", "")
if _name and _name not in KILL_POINTS:
    _close = difflib.get_close_matches(_name, KILL_POINTS, n=1)
    raise ConfigError(
        f"POWERD_KILL_AT: unknown kill point {_name!r}", hint=f"did you mean {_close[0]!r}?" if _close else "unset it"
    )
if _count and not _count.isdecimal():
    raise ConfigError(f"POWERD_KILL_AT: {_count!r} is no number of passes", hint="write NAME or NAME:N")
_left = int(_count or "1")


def killpoint(name: str) -> None:
    """Die here by SIGKILL if a test asked for it."""
    global _left
    if _name and name == _name:
        _left -= 1
        if _left <= 0 and _may_die():
            os.kill(os.getpid(), signal.SIGKILL)


def _may_die() -> bool:
    if not _once:
        return True
    try:
        os.unlink(_once)
    except OSError:
        return False
    return True
