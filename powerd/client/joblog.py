"""What a training job tells of itself, without making it wait: a bounded queue and one thread that sends it in batches.

House rules: nothing here raises into training or blocks it; what does not fit is dropped and counted; on a stepped node the
thread waits on the node's clock, so that what is sent when is the same in every run.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from powerd.api import JobEvent, JobStep
from powerd.client.background import nothing, pacer, start
from powerd.client.nodetime import node_now_ns
from powerd.errors import PowerdError, RequestError

if TYPE_CHECKING:
    from powerd.client.core import Client

CAPACITY = 4096  # events on their way
STEPS_AT_ONCE = 500
CLOSE_S = 2.0  # real seconds that a close waits at most
_PATIENT_S = 10.0  # so often a daemon that is away is tried again


class JobLog:
    """One rank's reports of one job; ``with`` ends the job as ended or, on an exception, as failed.

    ``gpus`` are the UUIDs of this rank, for steps that name none. Every method returns at once, also without a daemon.
    """

    def __init__(
        self, client: Client, job: str, *, rank: int = 0, gpus: Sequence[str] = (), interval_s: float = 1.0,
        capacity: int = CAPACITY,
    ) -> None:  # fmt: skip
        self.job, self.rank = job, rank
        self.dropped = 0  # events that did not fit or that the daemon refused
        self._client, self._gpus, self._interval_s = client, tuple(gpus), interval_s
        self._capacity = capacity
        self._queue: deque[JobEvent] = deque()
        self._lock = threading.Lock()
        self._closing = False
        self._closed = threading.Event()
        self._pid = os.getpid()
        self._stop, self._wake = threading.Event(), nothing
        ready = threading.Event()
        start(lambda: self._run(ready), "powerd-job-log")
        # On a stepped node a thread is the participant that it last joined as, so the new one joins by itself; until it has, this
        # one does not go on and time cannot pass it by.
        ready.wait(CLOSE_S)
        atexit.register(self.close)

    # -- what a job says -------------------------------------------------------------------------------------------------

    def start(self, detail: str = "") -> None:
        """Training begins, or begins again."""
        self._put("start", detail=detail)

    def step(
        self, step: int, begin_ns: int, end_ns: int, *, energy_j: float | None = None, clock_mhz: float | None = None,
        plan: str | None = None, gpus: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """One step of this rank, by ``client.now_ns()``; ``plan`` "baseline" marks full clock, "profile" a sweep."""
        known = [None if v is None or not math.isfinite(v) else float(v) for v in (energy_j, clock_mhz)]
        self._put("step", steps=(JobStep(step, begin_ns, end_ns, tuple(gpus) or self._gpus, plan, *known),))

    def restore(self, step: int) -> None:
        """Training goes on after this step: later ones were for nothing (-1: all of them)."""
        self._put("restore", step=step)

    def checkpoint_begin(self) -> None:
        """A checkpoint is being written."""
        self._put("checkpoint_begin")

    def checkpoint_end(self, energy_j: float | None = None) -> None:
        """It is written, and what it used where that is known."""
        self._put("checkpoint_end", energy_j=energy_j)

    def exception(self, detail: str) -> None:
        """Training has failed."""
        self._put("exception", detail=detail)

    def note(self, detail: str) -> None:
        """Something to remember with the job."""
        self._put("note", detail=detail)

    def end(self, detail: str = "") -> None:
        """Training is over."""
        self._put("end", detail=detail)

    def _put(
        self, kind: str, *, detail: str = "", steps: tuple[JobStep, ...] = (), step: int | None = None,
        energy_j: float | None = None,
    ) -> None:  # fmt: skip
        event = JobEvent(kind, self.rank, steps, step, detail[:500], node_now_ns(), energy_j)
        with self._lock:
            if self._closing or len(self._queue) >= self._capacity or os.getpid() != self._pid:
                self.dropped += 1
                return
            self._queue.append(event)

    # -- the thread ------------------------------------------------------------------------------------------------------

    def _put_back(self, events: Sequence[JobEvent]) -> None:
        with self._lock:
            self._queue.extendleft(reversed(events))
            while len(self._queue) > self._capacity:
                self._queue.pop()
                self.dropped += 1

    def _run(self, ready: threading.Event) -> None:
        leave = nothing
        try:
            wait, self._wake, leave = pacer(self._stop, self._client.time_scale)
            ready.set()
            wait_s = self._interval_s
            while not self._closing:
                wait(wait_s)
                wait_s = self._interval_s if self._send() else min(_PATIENT_S, 2 * wait_s)
            self._send()
        except Exception as error:
            self._client.warn("job log", error)
        finally:
            leave()
            ready.set()
            with self._lock:
                self._closing = True
                self.dropped += len(self._queue)
            self._closed.set()

    def _send(self) -> bool:
        """Send all there is; False when the daemon is away, and what it has not got is kept."""
        with self._lock:
            events, self._queue = list(self._queue), deque()
        sent = 0
        for batch in batches(events):
            size = max(1, len(batch.steps))  # every step came as an event of its own
            try:
                self._client.job_event_strict(self.job, batch, timeout_s=CLOSE_S if self._closing else None)
            except PowerdError as error:
                self._client.warn(f"job log of {self.job!r}", error)
                if not isinstance(error, RequestError) or error.code.name == "too_many":
                    self._put_back(events[sent:])
                    return False
                self.dropped += size  # it will never be taken
            sent += size
        return True

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Send what there is, two seconds at most; a second call changes nothing."""
        atexit.unregister(self.close)
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closing = True
        self._stop.set()
        self._wake()
        self._closed.wait(timeout_s)

    def __enter__(self) -> JobLog:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.end()
        else:
            self.exception(f"{type(error).__name__}: {error}")
        self.close()


def batches(events: Sequence[JobEvent]) -> list[JobEvent]:
    """Consecutive step events as one event each, in order."""
    out: list[JobEvent] = []
    for event in events:
        last = out[-1] if out else None
        joins = last is not None and last.kind == event.kind == "step" and len(last.steps) < STEPS_AT_ONCE
        if last is not None and joins:
            out[-1] = replace(last, steps=last.steps + event.steps)
        else:
            out.append(event)
    return out
