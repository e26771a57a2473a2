"""The background thread of a training process: its lease, its clock, its energy figures, its job's log.

House rules: the training thread only leaves notes here and never waits for an answer; one warning per trouble, from the client; a
thread that fails gives the clock back and stays quiet; what the kernel does at the end of the process is enough.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from powerd.client import Client, Lease, Span
from powerd.client.background import start
from powerd.model import Control

if TYPE_CHECKING:
    from powerd.client.core import Which

log = logging.getLogger("powerd_integrations")
_NS = 1_000_000_000
_TICK_S = 0.1  # real time between two looks at whether the process idles
_BUSY_PERCENT = 30
_RETRY_NS = 30 * _NS
_SAMPLED_NS = _NS // 3  # after so long the closing sample is there: asking waits for nothing, and clocks do not wait for it


@dataclass(frozen=True, slots=True)
class Idle:
    """Since when the process does something that needs no GPU; ``sure`` False: nobody said so, no step has begun."""

    label: str
    since_ns: int
    sure: bool = True


class Keeper:
    """Holds one clock on this process's GPUs and measures what blocks of work took, both in the background."""

    def __init__(
        self,
        client: Client,
        gpus: Which,
        *,
        job: str,
        idle_clock_mhz: int | None,
        idle_after_s: float,
        silence_s: float,
        settle_s: float = 0.02,
    ) -> None:
        self._client, self._gpus, self._job = client, gpus, job
        self._idle_clock_mhz, self._idle_after_ns = idle_clock_mhz, round(idle_after_s * _NS)
        self._settle_ns, self._silence_ns = round(settle_s * _NS), round(silence_s * _NS)
        self._life_ns = 0
        self._notes: deque[tuple[int, Callable[[], None]]] = deque()
        self._acks: deque[threading.Event] = deque()
        self._wake = threading.Event()
        self._stop = False
        self._begun = False
        self._ended = threading.Event()
        self._lease: Lease | None = None
        self._set_mhz: int | None = None
        self._set: deque[tuple[int, int | None]] = deque(maxlen=256)  # (since, clock): what was set when
        self._look_ns = 0
        self._retry_ns = 0
        self.uuids: tuple[str, ...] = ()
        self.clocks_mhz: tuple[int, ...] = ()  # ascending; empty until known, or when nothing can be controlled
        self.wanted_mhz: int | None = None  # written by the training thread
        self.idle: Idle | None = None  # likewise
        self.lowered = False

    # -- the training thread's side --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin; once."""
        if not self._begun:
            self._begun = True
            start(self._run, "powerd-steps")

    def note(self, action: Callable[[], None], after_ns: int) -> None:
        """Leave something to do once that moment's samples are in; returns at once."""
        self._notes.append((after_ns + _SAMPLED_NS, action))

    def note_life(self, now_ns: int) -> None:
        """Training goes on."""
        self._life_ns = now_ns

    def want(self, clock_mhz: int | None) -> None:
        """The highest clock from now on; ``None``: the GPU's own business again."""
        if clock_mhz != self.wanted_mhz:
            self.wanted_mhz = clock_mhz
            self._wake.set()

    def end_idle(self) -> None:
        """Work goes on."""
        self.idle = None
        if self.lowered:
            self._wake.set()

    def reset(self, wait_s: float) -> None:
        """Give the clock back; waits at most so long for it to be done."""
        self.wanted_mhz = None
        self.idle = None
        done = threading.Event()
        self._acks.append(done)
        self._wake.set()
        if self._begun and not self._ended.is_set():
            done.wait(wait_s)

    def close(self, wait_s: float = 5.0) -> None:
        """Do what is left, give the clock back and end the thread."""
        self._stop = True
        self._wake.set()
        if self._begun:
            self._ended.wait(wait_s)

    # -- the thread ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                if not self.uuids and self._may_retry():
                    with self._quietly("GPUs of this process"):
                        self._learn()
                self._wake.wait(_TICK_S)
                self._wake.clear()
                ending, asked = self._stop, [self._acks.popleft() for _ in range(len(self._acks))]
                with self._quietly("clock"):
                    self._follow(None if ending else self._clock_now())
                for done in asked:
                    done.set()
                now_ns = self._client.now_ns()
                while self._notes and (ending or self._notes[0][0] <= now_ns) and not self._acks:
                    with self._quietly("energy of steps"):
                        self._notes.popleft()[1]()
                if ending and not self._notes:
                    return
        except Exception as error:
            self._client.warn("training steps", error)
        finally:
            with contextlib.suppress(Exception):
                self._follow(None)
            self._ended.set()

    @contextlib.contextmanager
    def _quietly(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._client.warn(what, error)

    def _may_retry(self) -> bool:
        now_ns = self._client.now_ns()
        if now_ns < self._retry_ns:
            return False
        self._retry_ns = now_ns + _RETRY_NS
        return True

    def _learn(self) -> None:
        uuids = self._client.resolve(self._gpus)
        found = [c for c in self._client.node().gpus if c.gpu.uuid in uuids]
        if len(found) != len(uuids):
            return
        if all(c.controls[Control.SM_CLOCK].available if Control.SM_CLOCK in c.controls else False for c in found):
            self.clocks_mhz = tuple(sorted(set(found[0].sm_clocks_mhz).intersection(*(c.sm_clocks_mhz for c in found[1:]))))
        self._retry_ns = 0
        self.uuids = uuids

    def _clock_now(self) -> int | None:
        wanted, idle, now_ns = self.wanted_mhz, self.idle, self._client.now_ns()
        low = self._low_clock()
        if now_ns - self._life_ns > self._silence_ns:
            self.lowered = False
            return None
        if idle is None or low is None:
            self.lowered = False
            return wanted
        if now_ns - idle.since_ns < self._idle_after_ns:
            return wanted if not self.lowered else low
        if not idle.sure and not self._gpu_idles(now_ns):
            self.lowered = False
            return wanted
        self.lowered = True
        return low if wanted is None else min(low, wanted)

    def _low_clock(self) -> int | None:
        if self._idle_clock_mhz is not None or not self.clocks_mhz:
            return self._idle_clock_mhz if self.clocks_mhz else None
        return min(c for c in self.clocks_mhz if 3 * c >= self.clocks_mhz[-1])

    def _gpu_idles(self, now_ns: int) -> bool:
        """Whether the GPUs do nothing, asked twice a second: an evaluation that nobody announced is work too."""
        if now_ns - self._look_ns < _NS // 2:
            return self.lowered
        self._look_ns = now_ns
        rows = [r for r in self._client.snapshot().readings if r.uuid in self.uuids]
        return bool(rows) and all(r.utilization_percent is not None and r.utilization_percent < _BUSY_PERCENT for r in rows)

    def _follow(self, clock_mhz: int | None) -> None:
        """Make the lease want this clock, or end it."""
        if clock_mhz is None:
            lease, self._lease, self._set_mhz = self._lease, None, None
            if lease is not None:
                lease.release()
                self._set.append((self._client.now_ns(), None))
            return
        if clock_mhz == self._set_mhz and (self._lease is None or self._lease.held):
            return
        bounds = (None, float(clock_mhz))
        if self._lease is None or not self._lease.held:
            if not self.uuids or not self._may_retry():
                return
            self._lease, self._set_mhz = None, None
            reason = "training: energy-optimal clock"
            lease = self._client.lease(self.uuids, sm_clock_mhz=bounds, reason=reason, job=self._job, min_dwell_s=0.0)
            if not lease.held:
                return
            self._lease, self._retry_ns = lease, 0
        else:
            self._lease.change(sm_clock_mhz=bounds)
        self._set_mhz = clock_mhz
        self._set.append((self._client.now_ns(), clock_mhz))

    # -- measuring -------------------------------------------------------------------------------------------------------

    def measure(
        self, clock_mhz: int | None, begins_ns: Sequence[int], end_ns: int, apart: Sequence[tuple[int, int]]
    ) -> tuple[float, float, int] | None:
        """(seconds per step, joules per step, steps) of the steps that ran at this clock, what is ``apart`` left out.

        Only to be called by a note. ``None``: this clock did not hold, or the energy is not known.
        """
        since_ns = self._held_since(clock_mhz, end_ns)
        if since_ns is None or not begins_ns:
            return None
        first = next((n for n, t in enumerate(begins_ns) if t >= since_ns), len(begins_ns))
        steps = len(begins_ns) - first
        if 3 * steps < len(begins_ns) or not steps:
            return None
        spans = without(begins_ns[first], end_ns, apart)
        energy_j = self.energy_j(spans)
        time_s = sum(e - b for b, e in spans) / _NS
        return None if energy_j is None or time_s <= 0 else (time_s / steps, energy_j / steps, steps)

    def _held_since(self, clock_mhz: int | None, end_ns: int) -> int | None:
        """Since when this clock (None: the GPU's own) held at this moment, settling included; ``None``: it did not."""
        since_ns, clock = next(
            ((since, clock) for since, clock in reversed(self._set) if since < end_ns), (-self._settle_ns, None)
        )
        if clock is None and clock_mhz is not None and clock_mhz == self.clocks_mhz[-1]:
            clock = clock_mhz  # nobody has set anything: the top clock is what runs
        if clock is not None and self._lease is not None and not self._lease.held:
            return None
        return since_ns + self._settle_ns if clock == clock_mhz else None

    def energy_j(self, spans: Sequence[tuple[int, int]]) -> float | None:
        """Joules of this process's GPUs in these stretches of time; ``None``: not known."""
        total = 0.0
        for uuid in self.uuids:
            view = self._client.spans(uuid, [Span("steps", begin, end) for begin, end in spans])
            found = next((row.energy_j for row in view.labels if row.label == "steps"), None)
            if found is None:
                return None
            total += found
        return total if self.uuids else None


def without(begin_ns: int, end_ns: int, apart: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """What is left of begin..end when these stretches (in order) are cut out."""
    left, at = [], begin_ns
    for first, last in apart:
        if last <= at or first >= end_ns:
            continue
        if first > at:
            left.append((at, first))
        at = max(at, last)
    if at < end_ns:
        left.append((at, end_ns))
    return left
