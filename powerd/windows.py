"""Energy windows: begin, end, and the energy between the two requests with method and uncertainty.

House rules: the two instants are the clock's at the requests, whatever the sampler's phase; ``observe`` only feeds ledgers;
the number of open windows is bounded, and a GPU that is gone is told, never guessed.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from powerd.api import EnergyFigure, WindowView
from powerd.clock import NS, Clock
from powerd.closing import ClosingSample
from powerd.energy import Edge, SensorErrors, Track, figure
from powerd.errors import RequestError
from powerd.model import Snapshot

MAX_OPEN = 1024
_PATIENCE_NS = 2 * NS  # an edge is settled by then with what there is (a wedged GPU, a counter that stands still)


@dataclass(slots=True)
class _Window:
    id: str
    name: str
    job: str | None
    gpus: tuple[str, ...]
    begin_ns: int
    breaks: dict[str, int]  # of each GPU's ledger when the window began
    edges: dict[str, Edge | None] = field(default_factory=dict)  # of the beginning, as they become final


class EnergyWindows:
    """All open windows of a node; use it from one thread (the daemon's loop)."""

    def __init__(self, clock: Clock, period_ns: int, errors: SensorErrors | None = None, max_open: int = MAX_OPEN) -> None:
        self._clock = clock
        self._samples = ClosingSample(clock, period_ns)
        self._errors = errors or SensorErrors()
        self._max_open = max_open
        self._tracks: dict[str, Track] = {}
        self._open: dict[str, _Window] = {}
        self._unsettled: list[_Window] = []

    def sampled_every(self, period_ns: int) -> None:
        """Samples come at another rate from now on."""
        self._samples.period_ns = period_ns
        for track in self._tracks.values():
            track.period_ns = period_ns

    def __len__(self) -> int:
        """How many windows are open."""
        return len(self._open)

    def observe(self, snapshot: Snapshot) -> None:
        """Feed one snapshot; call it at every tick, whether windows are open or not."""
        tracks = self._tracks
        for reading in snapshot.readings:
            track = tracks.get(reading.uuid)
            if track is None:
                track = tracks[reading.uuid] = Track(self._errors, self._samples.period_ns)
            track.add(reading)
        if self._unsettled:
            self._unsettled = [w for w in self._unsettled if not self._settle(w, snapshot.time_ns)]
        self._samples.come()

    def _settle(self, window: _Window, now_ns: int) -> bool:
        """Read off the edges of the beginning as soon as the samples after it are there."""
        late = now_ns - window.begin_ns >= _PATIENCE_NS
        for uuid in window.gpus:
            if uuid in window.edges:
                continue
            edge = self._begin_edge(window, uuid)
            if late or (edge is not None and edge.final):
                window.edges[uuid] = edge
        return len(window.edges) == len(window.gpus)

    def _begin_edge(self, window: _Window, uuid: str) -> Edge | None:
        if uuid in window.edges:
            return window.edges[uuid]
        track = self._tracks[uuid]
        # A ledger that broke off since knows nothing of the beginning.
        return track.edge(window.begin_ns) if track.breaks == window.breaks[uuid] else None

    def begin(self, gpus: Sequence[str], name: str = "", job: str | None = None) -> WindowView:
        """Open a window over these GPUs at this instant; RequestError ``bad_request``, ``unknown_gpu`` or ``too_many``."""
        now = self._clock.now_ns()
        unique = tuple(dict.fromkeys(gpus))
        if not unique:
            raise RequestError("an energy window needs at least one GPU")
        if missing := [uuid for uuid in unique if uuid not in self._tracks]:
            raise RequestError(f"unknown GPU {missing[0]}", code="unknown_gpu", hint="powerctl status lists the GPUs")
        if len(self._open) >= self._max_open:
            raise RequestError(f"{self._max_open} energy windows are open", code="too_many", hint="end or drop some")
        breaks = {uuid: self._tracks[uuid].breaks for uuid in unique}
        # Random, so that an id from before a restart never names somebody else's window.
        window = _Window(f"w-{secrets.token_hex(8)}", name, job, unique, now, breaks)
        window.edges.update({uuid: None for uuid in unique if self._tracks[uuid].lost})
        self._open[window.id] = window
        self._unsettled.append(window)
        return self._view(window, None, ())

    async def end(self, id: str, wait: bool = True) -> WindowView:
        """Close a window at this instant and answer its energy; ``wait`` for the closing sample, else a wider interval."""
        now = self._clock.now_ns()
        window = self._take(id)
        if wait:
            tracks = [self._tracks[uuid] for uuid in window.gpus]
            await self._samples.wait(now, lambda: any(not track.lost and track.newest_ns < now for track in tracks))
        figures = tuple(
            figure(uuid, self._tracks[uuid], self._begin_edge(window, uuid), self._tracks[uuid].edge(now)) for uuid in window.gpus
        )
        return self._view(window, now, figures)

    def drop(self, id: str) -> None:
        """Forget a window whose owner is gone; an unknown id is a RequestError ``not_found``."""
        self._take(id)

    def _take(self, id: str) -> _Window:
        window = self._open.pop(id, None)
        if window is None:
            raise RequestError(
                f"no open energy window {id!r}", code="not_found", hint="it was ended, dropped, or the daemon restarted"
            )
        if window in self._unsettled:
            self._unsettled.remove(window)
        return window

    @staticmethod
    def _view(window: _Window, end_ns: int | None, figures: tuple[EnergyFigure, ...]) -> WindowView:
        duration_s = None if end_ns is None else (end_ns - window.begin_ns) / NS
        return WindowView(window.id, window.name, window.job, window.begin_ns, end_ns, duration_s, figures)
