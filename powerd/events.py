"""What happened lately: numbered events for people, logs and streams.

House rules: bounded; only state changes; one event is one log line.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from powerd.clock import Clock
from powerd.log import log
from powerd.model import Event, Outcome

_KEPT = 1000


class EventLog:
    """The newest events of this daemon; listeners hear each one once."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._events: deque[Event] = deque(maxlen=_KEPT)
        self._seq = 0
        self.listeners: list[Callable[[Event], None]] = []

    @property
    def seq(self) -> int:
        """The number of the newest event."""
        return self._seq

    def add(
        self,
        kind: str,
        *,
        uuid: str | None = None,
        subject: str | None = None,
        detail: str = "",
        data: Mapping[str, str | int | float | bool | None] | None = None,
    ) -> Event:
        """Record, log and publish one event."""
        self._seq += 1
        event = Event(self._seq, self._clock.now_ns(), self._clock.wall_ns(), kind, uuid, subject, detail, dict(data or {}))
        self._events.append(event)
        log(kind, uuid=uuid, subject=subject, detail=detail or None, **event.data)
        for listener in self.listeners:
            listener(event)
        return event

    def add_outcome(self, outcome: Outcome) -> Event:
        """Record what became of a setpoint, or that a control is back at baseline."""
        data: dict[str, str | int | float | bool | None] = {"verdict": outcome.verdict.value}
        if outcome.requested is not None:
            data |= {"low": outcome.requested.low, "high": outcome.requested.high}
        kind = "setpoint" if outcome.requested is not None else "baseline"
        return self.add(kind, uuid=outcome.uuid, subject=outcome.control.value, detail=outcome.detail, data=data)

    def since(self, seq: int, limit: int = _KEPT) -> list[Event]:
        """Events with a higher number than ``seq``: the newest ``limit`` of them, oldest first."""
        newer = [e for e in self._events if e.seq > seq]
        return newer[-limit:] if limit > 0 else []

    def of(self, uuid: str, limit: int = 10) -> tuple[Event, ...]:
        """The newest events of one GPU, oldest first."""
        return tuple([e for e in self._events if e.uuid == uuid][-limit:])
