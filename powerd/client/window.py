"""An energy window as a context manager: begin, end, and what the daemon measured in between.

House rules: the daemon measures, not this process; unknown is ``None``; the window never hides or replaces an exception of the
code inside it.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from powerd.api import EnergyFigure, WindowView

if TYPE_CHECKING:
    from powerd.client.core import Client, Which


class EnergyWindow:
    """Energy of some GPUs between ``begin`` and ``end``: per GPU the true value lies in ``low_j..high_j`` (95 %)."""

    def __init__(self, client: Client, name: str, gpus: Which, job: str | None) -> None:
        self._client, self._name, self._gpus, self._job = client, name, gpus, job
        self.view: WindowView | None = None

    def begin(self) -> EnergyWindow:
        """Start measuring."""
        self.view = self._client.window_begin(self._gpus, self._name, self._job)
        return self

    def end(self, *, wait: bool = True) -> EnergyWindow:
        """Stop measuring; a second call changes nothing."""
        if self.view is not None and self.view.id and self.view.end_ns is None:
            self.view = self._client.window_end(self.view.id, wait=wait)
        return self

    def __enter__(self) -> EnergyWindow:
        return self.begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.end()
            return
        try:
            self.end(wait=False)
        except Exception as own:  # the caller's exception is the one that matters
            self._client.warn("energy window", own)

    @property
    def figures(self) -> tuple[EnergyFigure, ...]:
        """One figure per GPU; empty until the window has ended."""
        return () if self.view is None else self.view.figures

    @property
    def duration_s(self) -> float | None:
        """Seconds between begin and end as the daemon saw them."""
        return None if self.view is None else self.view.duration_s

    @property
    def energy_j(self) -> float | None:
        """Joules of all GPUs together, ``None`` when any of them is unknown."""
        return _sum([f.energy_j for f in self.figures])

    @property
    def low_j(self) -> float | None:
        """The sum of the lower bounds: at least 95 % confidence."""
        return _sum([f.low_j for f in self.figures])

    @property
    def high_j(self) -> float | None:
        """The sum of the upper bounds: at least 95 % confidence."""
        return _sum([f.high_j for f in self.figures])


def _sum(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if known and len(known) == len(values) else None
