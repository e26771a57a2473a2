"""The sample that closes what was asked about: whoever needs it waits for it, so long and no longer.

House rules: one thread (the daemon's loop); nobody waits, no event is made; time is the clock's, real or simulated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from powerd.clock import NS, Clock

_PATIENCE_NS = NS


class ClosingSample:
    """News of samples that come every ``period_ns``, which may change."""

    def __init__(self, clock: Clock, period_ns: int) -> None:
        self._clock = clock
        self.period_ns = period_ns
        self._news: asyncio.Event | None = None

    def come(self) -> None:
        """Samples have come: whoever waits looks again."""
        if self._news is not None:
            self._news.set()
            self._news = None

    async def wait(self, end_ns: int, missing: Callable[[], bool]) -> None:
        """Until nothing is ``missing``, a second after ``end_ns`` or four periods if these are longer."""
        deadline_ns = end_ns + max(_PATIENCE_NS, 4 * self.period_ns)
        while missing():
            left_ns = deadline_ns - self._clock.now_ns()
            if left_ns <= 0:
                return
            if self._news is None:
                self._news = asyncio.Event()
            try:
                await asyncio.wait_for(self._news.wait(), left_ns / NS)
            except TimeoutError:
                return
