"""What shall be set, what hw was last told, and what became of it, per (GPU, control).

House rules: decisions come from powerd.reconcile alone; an outcome counts only for the value that was asked for last.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from powerd.api import RefusalView
from powerd.clock import NS
from powerd.config import LimitsConfig
from powerd.hw.frames import Desired
from powerd.lease import Lease
from powerd.model import Capabilities, Control, Interval, Outcome, Refusal, Setpoint, Verdict, Want
from powerd.reconcile import Held, Key, Reconciled, reconcile

_DEFERRED = "a step down waits for the minimum dwell"


def keys_of(lease: Lease) -> list[Key]:
    """Every (GPU, control) of a lease."""
    return [(gpu, want.control) for gpu in lease.gpus for want in lease.wants]


class Setpoints:
    """The desired state and its outcomes."""

    def __init__(self) -> None:
        self.current: Mapping[Key, Setpoint] = {}
        self.outcomes: dict[Key, Outcome] = {}
        self.last_change_by: dict[Key, str] = {}
        self.on_set: Callable[[Control, float], None] = lambda control, took_s: None  # the driver's own time, once per call
        self._held: Mapping[Key, Held] = {}
        self._asked: dict[Key, tuple[Interval | None, int]] = {}  # the value hw was last told, and in which table
        self._told: frozenset[tuple[str, str, Control]] = frozenset()

    def preview(
        self, wants: Iterable[Want], gpus: Mapping[str, Capabilities], limits: LimitsConfig, now_ns: int, dwell_ns: int
    ) -> Reconciled:
        """What the rule makes of these wants; nothing is remembered."""
        return reconcile(wants, gpus, limits, self._held, now_ns, dwell_ns)

    def adopt(self, result: Reconciled) -> list[Refusal]:
        """Make a result the current one; answers the refusals that nobody has been told of yet."""
        self.current, self._held = result.setpoints, result.held
        refused = {
            (r.want.source, r.want.uuid, r.want.control): r for setpoint in self.current.values() for r in setpoint.refused
        }
        fresh = [r for key, r in refused.items() if key not in self._told]
        self._told = frozenset(refused)
        return fresh

    def values(self) -> dict[Key, Interval]:
        """Everything that shall not be at baseline."""
        return {key: s.value for key, s in self.current.items() if s.value is not None}

    def changed(self) -> list[Key]:
        """Where hw was told something else."""
        values = self.values()
        return [k for k in values.keys() | self._asked.keys() if self._asked.get(k, (None, 0))[0] != values.get(k)]

    def rows(self, expiry_ns: int) -> list[Desired]:
        """The whole table for hw."""
        rows = []
        for (uuid, control), value in self.values().items():
            setpoint = self.current[uuid, control]
            winner = next((w for w in setpoint.considered if w.source == setpoint.winner), None)
            dwell_ns = None if winner is None else winner.min_dwell_ns
            dwell_ms = 0 if dwell_ns is None else max(1, dwell_ns // 1_000_000)  # 0 would mean the node's own
            rows.append(Desired(uuid, control, value, expiry_ns, dwell_ms, zlib.crc32((setpoint.winner or "").encode())))
        return rows

    def sent(self, changed: Collection[Key], seq: int) -> None:
        """The table with this number has gone out."""
        values = self.values()
        for key in changed:
            self._asked[key] = (values.get(key), seq)
            chosen = self.current.get(key)
            self.last_change_by[key] = (chosen.winner if chosen else None) or "baseline"

    def forget_asked(self) -> None:
        """hw has gone or gave everything up by itself: the next table says everything anew."""
        self._asked.clear()

    def forget_held(self) -> None:
        """Nothing is held any more."""
        self._held = {}
        self._asked.clear()

    def take(self, outcome: Outcome) -> bool:
        """Take an outcome over; True when it says something new."""
        key = (outcome.uuid, outcome.control)
        before, self.outcomes[key] = self.outcomes.get(key), outcome
        if outcome.called_ns and (before is None or before.called_ns != outcome.called_ns):  # one call may have many outcomes
            self.on_set(outcome.control, (outcome.returned_ns - outcome.called_ns) / NS)
        return before is None or (before.verdict, before.requested) != (outcome.verdict, outcome.requested)

    def refusals(self, lease_id: str, setpoints: Mapping[Key, Setpoint] | None = None) -> tuple[RefusalView, ...]:
        """The wants of a lease that are not served, and why."""
        source = self.current if setpoints is None else setpoints
        return tuple(
            RefusalView(r.want.uuid, r.want.control, r.why)
            for s in source.values()
            for r in s.refused
            if r.want.source == lease_id
        )

    def _deferred(self, lease: Lease, key: Key) -> bool:
        setpoint = self.current.get(key)
        return lease.live and setpoint is not None and setpoint.deferred_until_ns is not None

    def _answer(self, key: Key) -> Outcome | None:
        """The outcome of what was last asked, or ``None`` while there is none."""
        value, seq = self._asked.get(key, (None, 0))
        outcome = self.outcomes.get(key)
        return None if outcome is None or outcome.seq < seq or outcome.requested != value else outcome

    def settled(self, lease: Lease) -> bool:
        """Whether all that a lease asks for (or no longer asks for) has its final outcome."""
        for key in keys_of(lease):
            if key[0] in lease.lost:
                continue
            setpoint = self.current.get(key)
            value, seq = self._asked.get(key, (None, 0))
            if value != (setpoint.value if setpoint else None) or self._deferred(lease, key):
                return False
            if seq == 0:
                continue  # never asked for anything: it is at baseline
            outcome = self._answer(key)
            if outcome is None or outcome.verdict is Verdict.PENDING:
                return False
        return True

    def answers(self, lease: Lease) -> tuple[Outcome, ...]:
        """The outcome of every (GPU, control) of a lease; PENDING where hw has not answered yet."""
        answers = []
        for key in keys_of(lease):
            value, seq = self._asked.get(key, (None, 0))
            outcome = self._answer(key) or Outcome(*key, seq=seq, requested=value, verdict=Verdict.PENDING)
            if self._deferred(lease, key):
                outcome = replace(outcome, verdict=Verdict.PENDING, detail=_DEFERRED)
            answers.append(outcome)
        return tuple(answers)
