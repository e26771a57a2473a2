"""When an instruction begins and ends: by this process's clock, or by a device's.

House rules: a mark costs microseconds and never waits; marks become times of the node's clock only where the conductor may wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

Send = Callable[[int, int], object]


class Timing(Protocol):
    """How an adapter tells moments; ``Any`` marks are the adapter's own."""

    #: Whether the newest step's marks have not all come when the step ends: the conductor then asks for those of the one before.
    lags: bool

    def mark(self) -> Any:
        """Now, as the work that was queued so far will see it."""

    def announce(self, mark: Any, send: Send, step: int, index: int) -> None:
        """Call ``send(step, index)`` when the moment of this mark has come, without waiting for it here."""

    def resolve(self, marks: Sequence[Any]) -> list[int]:
        """Nanoseconds of the node's clock for each mark; may wait for the device."""

    def close(self) -> None:
        """Nothing is marked any more."""


class HostTiming:
    """The process's own clock: exact where begin and end mean that the work has begun and ended."""

    lags = False

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self.mark: Callable[[], Any] = now_ns

    def announce(self, mark: Any, send: Send, step: int, index: int) -> None:
        send(step, index)

    def resolve(self, marks: Sequence[Any]) -> list[int]:
        return list(marks)

    def close(self) -> None:
        return None
