"""What shall be set now: powerd's last table, less what has expired, was given up with its connection, or is held back.

House rules: pure, time comes in; a setting without a living reason becomes a baseline row that names the cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from powerd.clock import NEVER_NS, NS
from powerd.hw.frames import Desired
from powerd.model import Control, Restart

_CRASH_WINDOW_NS = 60 * NS
_CRASHES = 3
_CAUSES: tuple[Restart, ...] = tuple(Restart)
#: What can hold wants back, the one that counts first; a panic file is a hold of its own because only its removal ends it.
HOLDS = ("shutdown", "quiesced", "panic", "panic_file", "safe_mode")
_RELEASED = ("quiesced", "panic", "safe_mode")  # by a resume


class DesiredTable:
    """The supervisor's memory of what powerd wants."""

    def __init__(self, grace_ns: int, *, control: bool = True) -> None:
        self.seq = 0
        self.received_ns = 0
        self.control = control  # the site lets settings be made; without it the table only ever undoes
        self._holds: set[str] = set()
        self.adopting = False  # after a hand-over nobody has said yet what the settings in the journal are for
        self._grace_ns = grace_ns
        self._rows: dict[tuple[str, Control], Desired] = {}
        self._ended: dict[tuple[str, Control], Restart] = {}
        self._grace_until_ns: int | None = None
        self._crashes: list[int] = []

    @property
    def hold(self) -> str | None:
        """Why wants are refused, one of HOLDS; ``None`` when they are not."""
        return next((h for h in HOLDS if h in self._holds), None)

    def submit(self, seq: int, rows: Sequence[Desired], now_ns: int) -> list[Desired]:
        """powerd's new table: takes the place of the old one and ends any grace; the rows that control = false refuses."""
        new = {(r.uuid, r.control): r for r in rows if self.control or r.value is None}
        self._ended = {key: Restart.LEASE_END for key in self._rows if key not in new}
        self._rows, self.seq, self.received_ns, self._grace_until_ns = new, seq, now_ns, None
        self.adopting = False
        self.expire(now_ns)
        return [r for r in rows if (r.uuid, r.control) not in new and r.value is not None] if not self.control else []

    def set_grace(self, grace_ns: int) -> None:
        """How long settings outlive the next powerd that goes."""
        self._grace_ns = grace_ns

    def forbid(self) -> None:
        """The site takes control away: everything that is set ends now."""
        self.control = self.adopting = False
        self._ended.update(dict.fromkeys(self._rows, Restart.LEASE_END))
        self._rows.clear()

    def peer_gone(self, now_ns: int) -> None:
        """powerd's connection has closed: its settings live on for the grace."""
        if self._grace_until_ns is None:
            self._grace_until_ns = now_ns + self._grace_ns

    def begin_grace(self, until_ns: int) -> None:
        """After a hand-over: what the journal holds is left alone until powerd has spoken or this moment has come."""
        if self.control and self.hold is None:
            self._grace_until_ns, self.adopting = until_ns, True

    @property
    def in_grace(self) -> bool:
        """Whether settings live on without a powerd that has asked for them."""
        return self._grace_until_ns is not None

    def expire(self, now_ns: int) -> bool:
        """Give up what has no living reason at this moment; True when that changed anything."""
        ended: dict[tuple[str, Control], Restart] = {}
        graceless = self._grace_until_ns is not None and now_ns >= self._grace_until_ns
        if graceless:
            self._grace_until_ns, self.adopting = None, False
            ended = dict.fromkeys(self._rows, Restart.GRACE_ENDED)
        for key, row in self._rows.items():
            if row.value is not None and row.expiry_ns <= now_ns:
                ended.setdefault(key, Restart.SETPOINT_EXPIRED)
        for key in ended:
            del self._rows[key]
        self._ended.update(ended)
        return bool(ended) or graceless

    def next_ns(self) -> int:
        """When ``expire`` has something to do next."""
        times = [r.expiry_ns for r in self._rows.values() if r.value is not None]
        if self._grace_until_ns is not None:
            times.append(self._grace_until_ns)
        return min(times, default=NEVER_NS)

    def drop(self, hold: str, cause: Restart) -> None:
        """Everything to baseline, and no wants until ``release``; ``hold`` is one of HOLDS."""
        self._holds.add(hold)
        self.adopting = False
        self._ended.update(dict.fromkeys(self._rows, cause))
        self._rows.clear()

    def release(self, *holds: str) -> None:
        """These holds end (default: all that a resume ends); when none is left wants count again and powerd sends them anew."""
        self._holds.difference_update(holds or _RELEASED)
        self._crashes.clear()

    def worker_died(self, now_ns: int) -> bool:
        """Count a worker that died on its own; True when that makes a crash loop."""
        self._crashes = [t for t in self._crashes if now_ns - t < _CRASH_WINDOW_NS] + [now_ns]
        return len(self._crashes) >= _CRASHES

    def holds_clock(self, uuid: str) -> bool:
        """Whether something keeps this GPU's SM clock from its baseline: what a clock plan needs above it."""
        row = self._rows.get((uuid, Control.SM_CLOCK))
        return self.hold is None and row is not None and row.value is not None

    def rows(self) -> list[Desired]:
        """The table for the worker: living rows, and a baseline row with its cause for each that ended since the last call."""
        living = [] if self.hold else list(self._rows.values())
        here = {(r.uuid, r.control) for r in living}
        causes, self._ended = self._ended, {}
        gone = [
            Desired(uuid, control, None, 0, 0, _CAUSES.index(cause))
            for (uuid, control), cause in causes.items()
            if (uuid, control) not in here
        ]
        return [replace(r, tag=0) if r.value is None else r for r in living] + gone
