"""The last ten minutes of every GPU's readings, kept compactly, and energy spans answered from them after the fact.

House rules: memory is bounded by time and by count; a sample costs 36 bytes (10 Hz: 0.2 MB a GPU, 100 Hz: 2.2 MB); what is kept
is what was read, nothing is filled in.
"""

from __future__ import annotations

import asyncio
from array import array
from bisect import bisect_left, bisect_right
from collections import deque

from powerd.api import SpansRequest, SpansView
from powerd.clock import NS, Clock, standing
from powerd.closing import ClosingSample
from powerd.energy import SensorErrors
from powerd.errors import RequestError
from powerd.model import EnergyMethod, Health, Reading, Snapshot
from powerd.spans import Cut, check_spans, estimate

KEEP_NS = 600 * NS
CHUNK = 256  # samples
MAX_CHUNKS = 240  # 61,440 samples: ten minutes at 100 Hz, the fastest sampling there is
_AHEAD_NS = NS // 10  # by so much a span may end after now: stamps of another core
_NONE = -1  # of powers, energies and clocks: none was read


class _Chunk:
    """Some consecutive samples as columns."""

    __slots__ = ("clock_mhz", "energy_mj", "epoch", "power_mw", "reasons", "seen_us", "time_ns")

    def __init__(self) -> None:
        self.time_ns = array("q")
        self.energy_mj = array("q")
        self.seen_us = array("i")  # before time_ns: how long ago this counter value was first seen
        self.power_mw = array("i")
        self.clock_mhz = array("i")
        self.reasons = array("i")
        self.epoch = array("i")


class Trace:
    """One GPU's newest samples; use it from one thread."""

    def __init__(self) -> None:
        self._chunks: deque[_Chunk] = deque(maxlen=MAX_CHUNKS)
        self.breaks: deque[tuple[int, str]] = deque(maxlen=64)  # after which nothing before may be subtracted
        self.newest_ns = 0  # sample
        self.newest_seen_ns = 0  # counter value, or sample where there is no counter
        self.limit_mw: int | None = None
        self.counter = False
        self.lost = False

    def __len__(self) -> int:
        return sum(len(chunk.time_ns) for chunk in self._chunks)

    def add(self, reading: Reading) -> None:
        """Take one reading; one that is not newer than the last is ignored."""
        if reading.health is Health.LOST:
            if not self.lost:
                self.breaks.append((max(reading.time_ns, self.newest_ns), "GPU lost"))
            self.lost = True
            return
        if reading.time_ns <= self.newest_ns:
            return
        if self.lost:
            self.breaks.append((reading.time_ns, "GPU lost"))  # until now
        self.lost = False
        self.newest_ns = time_ns = reading.time_ns
        if reading.power_limit_enforced_mw is not None:
            self.limit_mw = reading.power_limit_enforced_mw
        chunk = self._chunks[-1] if self._chunks else None
        if chunk is None or len(chunk.time_ns) >= CHUNK:
            chunk = _Chunk()
            self._chunks.append(chunk)
            while len(self._chunks) > 1 and self._chunks[0].time_ns[-1] < time_ns - KEEP_NS:
                self._chunks.popleft()
        counted = reading.energy_method is EnergyMethod.COUNTER and reading.energy_mj is not None
        seen_ns = reading.energy_time_ns if counted and reading.energy_time_ns is not None else time_ns
        self.counter = self.counter or counted
        self.newest_seen_ns = seen_ns
        power_mw = reading.power_mw if reading.power_mw is not None else reading.power_average_mw
        chunk.time_ns.append(time_ns)
        chunk.energy_mj.append(reading.energy_mj if counted and reading.energy_mj is not None else _NONE)
        chunk.seen_us.append(min((time_ns - seen_ns) // 1000, 0x7FFFFFFF))
        chunk.power_mw.append(_NONE if power_mw is None else power_mw)
        chunk.clock_mhz.append(_NONE if reading.sm_clock_mhz is None else reading.sm_clock_mhz)
        chunk.reasons.append(_NONE if reading.clock_event_reasons is None else reading.clock_event_reasons & 0x7FFFFFFF)
        chunk.epoch.append(reading.epoch)

    @property
    def oldest_ns(self) -> int | None:
        """The first sample that is still there."""
        return self._chunks[0].time_ns[0] if self._chunks else None

    def cut(self, begin_ns: int, end_ns: int, margin_ns: int) -> Cut:
        """A copy of the samples from ``margin_ns`` before the beginning to as much after the end."""
        cut = Cut(self.oldest_ns, self.counter, self.limit_mw, tuple(self.breaks))
        for chunk in self._chunks:
            times = chunk.time_ns
            if times[-1] < begin_ns - margin_ns or times[0] > end_ns + margin_ns:
                continue
            first, last = bisect_left(times, begin_ns - margin_ns), bisect_right(times, end_ns + margin_ns)
            cut.time_ns += times[first:last]
            cut.energy_mj += chunk.energy_mj[first:last]
            cut.seen_ns += [t - 1000 * ago for t, ago in zip(times[first:last], chunk.seen_us[first:last], strict=True)]
            cut.power_mw += chunk.power_mw[first:last]
            cut.clock_mhz += chunk.clock_mhz[first:last]
            cut.reasons += chunk.reasons[first:last]
            cut.epoch += chunk.epoch[first:last]
        return cut


class EnergySpans:
    """The traces of all GPUs of a node, and what is asked of them; use it from one thread (the daemon's loop)."""

    def __init__(self, clock: Clock, period_ns: int, errors: SensorErrors | None = None) -> None:
        self._clock = clock
        self._samples = ClosingSample(clock, period_ns)
        self._errors = errors or SensorErrors()
        self._traces: dict[str, Trace] = {}
        self._fitting = asyncio.Semaphore(1)  # a tenth of a second, one at a time: the loop shares the interpreter

    def sampled_every(self, period_ns: int) -> None:
        """Samples come at another rate from now on."""
        self._samples.period_ns = period_ns

    def observe(self, snapshot: Snapshot) -> None:
        """Keep one snapshot; call it at every tick."""
        for reading in snapshot.readings:
            trace = self._traces.get(reading.uuid)
            if trace is None:
                trace = self._traces[reading.uuid] = Trace()
            trace.add(reading)
        self._samples.come()

    async def answer(self, request: SpansRequest) -> SpansView:
        """The energy of every label; RequestError ``bad_value``, ``unknown_gpu`` or ``too_many`` that names the span."""
        check_spans(request.spans)
        trace = self._traces.get(request.uuid)
        if trace is None:
            raise RequestError(f"no readings of GPU {request.uuid[:80]!r}", code="unknown_gpu", hint="powerctl status")
        begin_ns, end_ns = request.spans[0].begin_ns, request.spans[-1].end_ns
        if end_ns > self._clock.now_ns() + _AHEAD_NS:
            ahead = next(n for n, span in enumerate(request.spans) if span.end_ns > self._clock.now_ns() + _AHEAD_NS)
            raise RequestError(
                f"span {ahead} ({request.spans[ahead].label}) ends in the future", code="bad_value",
                hint="stamps are CLOCK_BOOTTIME nanoseconds of this node",
            )  # fmt: skip
        if request.wait:
            await self._samples.wait(end_ns, lambda: not trace.lost and trace.newest_seen_ns < end_ns)
        cut = trace.cut(begin_ns, end_ns, max(NS, 4 * self._samples.period_ns))
        with standing(self._clock):  # work of this process takes no simulated time
            async with self._fitting:
                return await asyncio.to_thread(estimate, request.uuid, request.spans, cut, self._errors)
