"""The InfluxDB v2 sink: rows -> lines -> spool -> server; two threads of its own, nothing of the daemon ever waits for it.

House rules: on disk before anything is sent; a batch leaves the spool only after the server took it, so sending twice must be
harmless (explicit times make it so); a line is put aside only while the server takes others; influxdb-client is imported lazily.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from powerd.api import LeaseView
from powerd.clock import NS, Clock
from powerd.config import InfluxConfig
from powerd.jobs import JobRestored, JobRow, Record
from powerd.model import Event, Snapshot
from powerd.records import JobStepRow
from powerd.sinks.delivery import Delivery
from powerd.sinks.lines import InferenceRow, Lines
from powerd.sinks.spool import Spool, age_s

_QUEUE = 4096  # items on their way to the spool: minutes at 10 Hz
_BATCH = 64  # a fuller queue wakes the thread before its second is over
_PENDING_LINES = 50_000  # kept in memory while the disk refuses them
FLUSH_S = 5.0

Row = Snapshot | Event | Record | LeaseView | InferenceRow
Item = tuple[int, Row]


@dataclass(frozen=True, slots=True)
class InfluxStats:
    """All that the metrics page and the health check say of the sink."""

    up: bool  # the server took the newest batch, or nothing was tried yet
    spool_bytes: int
    spool_points: int
    lag_s: float  # age of the oldest point that has not arrived
    lines: int  # the server took them
    dropped: dict[str, int]  # by why: bounds of the spool, a full queue, a disk that refused, an odd row
    dead_letters: int
    other_tags: int
    errors: dict[str, int] = field(default_factory=dict)  # by status: HTTP's, or network, or timeout
    problem: str = ""  # the present one in words, empty when all is well


class InfluxSink:
    """Takes rows from the daemon's loop and sees to it that they arrive. ``tell`` is called from a thread."""

    def __init__(
        self, config: InfluxConfig, path: Path, clock: Clock, host: str, hw_hz: float, token: Callable[[], str],
        tell: Callable[[str, str], None] = lambda kind, detail: None,
    ) -> None:  # fmt: skip
        self._clock = clock
        self._lines = Lines(
            host, sample_hz=config.sample_hz, every=config.sample_hz >= hw_hz, values_per_day=config.tag_values_per_day
        )
        self.spooled = 0  # lines that are safe on disk
        self.spool = Spool(path, config.spool_max_mib << 20, round(config.spool_max_days * 86_400) * NS)
        self.delivery = Delivery(config, self.spool, clock, token, tell)
        self._tell = tell
        self._queue: deque[Item] = deque()
        self._pending: list[str] = []
        self._queue_dropped = self._disk_dropped = self._odd_dropped = 0
        self._disk_failing = self._dropping = False
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="influx-spool", daemon=True)

    def start(self) -> None:
        """Begin to spool and to send."""
        self._thread.start()
        self.delivery.start()

    # ---- in: from the daemon's loop, without waiting

    def append(self, snapshot: Snapshot) -> None:
        """Take a snapshot."""
        self._put(snapshot.wall_ns, snapshot)

    def append_event(self, event: Event) -> None:
        """Take an event."""
        self._put(event.wall_ns, event)

    def append_lease(self, lease: LeaseView) -> None:
        """Take a lease as it stands now."""
        self._put(self._clock.wall_ns(), lease)

    def append_job(self, record: Record) -> None:
        """Take what a job reported."""
        self._put(self._clock.wall_ns(), record)

    def append_inference(self, row: InferenceRow) -> None:
        """Take how a pool did."""
        self._put(row.wall_ns, row)

    def _put(self, wall_ns: int, item: Row) -> None:
        if self._stopping or len(self._queue) >= _QUEUE:
            self._queue_dropped += len(item.readings) if isinstance(item, Snapshot) else 1
            return
        self._queue.append((wall_ns, item))
        if len(self._queue) >= _BATCH:
            self._wake.set()

    @property
    def backlog(self) -> int:
        """How many items wait for the spool."""
        return len(self._queue)

    # ---- the spooling thread

    def _run(self) -> None:
        with contextlib.suppress(sqlite3.Error, OSError):
            self.spool.open()  # so that what an earlier powerd left is told; the first put tries again
        while True:
            self._wake.wait(1.0)
            self._wake.clear()
            stopping = self._stopping
            self.tick(last=stopping)
            if stopping:
                return

    def tick(self, *, last: bool = False) -> None:
        """One round of the spooling thread: what is in the queue is on disk afterwards, unless the disk refuses."""
        self._drain()
        if last:
            self._pending += self._lines.finish()
        self._spool()

    def _drain(self) -> None:
        while self._queue:
            item = self._queue.popleft()
            try:
                self._pending += self._made(*item)
            except Exception as error:  # one odd row must not end all that come after it
                self._odd_dropped += 1
                self._tell("influx_row_dropped", repr(error))

    def _made(self, wall_ns: int, item: Row) -> list[str]:
        if isinstance(item, Snapshot):
            return self._lines.snapshot(item)
        if isinstance(item, Event):
            return self._lines.event(item)
        if isinstance(item, (JobStepRow, JobRestored, JobRow)):
            return self._lines.job(wall_ns, item)
        if isinstance(item, LeaseView):
            return self._lines.lease(wall_ns, item)
        return self._lines.inference(item)

    def _spool(self) -> None:
        lines = self._pending
        try:
            dropped = self.spool.put(lines, self._clock.wall_ns()) if lines else 0
        except (sqlite3.Error, OSError) as error:
            if not self._disk_failing:
                self._tell("influx_spool_failed", str(error))
            self._disk_failing = True
            over = max(0, len(lines) - _PENDING_LINES)
            del lines[:over]
            self._disk_dropped += over
            return
        self._disk_failing = False
        self.spooled += len(lines)
        self._pending = []
        if lines:
            self.delivery.wake()
        if dropped and not self._dropping:
            self._tell("influx_dropping", "the spool is full: the oldest points make room for new ones")
        self._dropping = bool(dropped) or (self._dropping and not self.delivery.up)

    # ---- about, and the end

    def stats(self) -> InfluxStats:
        """How it stands; never waits for disk or network."""
        spool, delivery = self.spool.stats(), self.delivery
        return InfluxStats(
            up=delivery.up, spool_bytes=spool.bytes, spool_points=spool.points, lag_s=age_s(spool, self._clock.wall_ns()),
            lines=delivery.lines, dead_letters=delivery.dead_letters, other_tags=self._lines.refused,
            dropped={"bounds": spool.dropped_points, "queue": self._queue_dropped, "disk": self._disk_dropped,
                     "row": self._odd_dropped},
            errors=dict(delivery.errors), problem=delivery.problem or spool.problem,
        )  # fmt: skip

    def close(self, timeout_s: float = FLUSH_S) -> None:
        """Spool what is there, send for what is left of the time, and keep the rest for the next start."""
        self._stopping = True
        until_ns = self.delivery.last_call(timeout_s)
        self._wake.set()
        self._thread.join(timeout_s)
        self.delivery.finish(until_ns)
        self.spool.close()
