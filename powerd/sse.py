"""Server-sent events: snapshots at the rate asked for, every event, and a heartbeat when there is nothing else to say.

House rules: per client one bounded queue of events and at most one waiting snapshot; who does not read is dropped; ``id`` is the
number of the newest event that the client has, so that it resumes where it was.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec
from aiohttp import web

from powerd.clock import NS, Clock
from powerd.events import EventLog
from powerd.model import Event
from powerd.node import Node

HEARTBEAT_S = 5.0
WRITE_S = 10.0
MAX_QUEUED = 256
MAX_CLIENTS = 64


class Hub:
    """All open streams of this daemon."""

    def __init__(self, clock: Clock, node: Node, events: EventLog) -> None:
        self.clock = clock
        self.events = events
        self._streams: set[_Stream] = set()
        node.listeners.append(lambda _: self._tick())
        events.listeners.append(self._event)

    def __len__(self) -> int:
        """How many clients listen."""
        return len(self._streams)

    def _tick(self) -> None:
        for stream in self._streams:
            stream.tick()

    def _event(self, event: Event) -> None:
        for stream in self._streams:
            stream.put(event)

    async def serve(
        self,
        request: web.Request,
        headers: dict[str, str],
        snapshot: Callable[[], bytes] | None,
        sees: Callable[[Event], bool],
        period_s: float,
        after: int | None,
    ) -> web.StreamResponse:
        """Stream to one client until it leaves or is dropped; ``snapshot`` gives the bytes that it may see."""
        response = web.StreamResponse(
            headers={**headers, "Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        await response.prepare(request)
        transport = request.transport
        stream = _Stream(self.clock, snapshot is not None, sees, period_s, self.events.seq)
        if isinstance(transport, asyncio.WriteTransport):
            stream.drop = transport.abort  # also wakes a write that waits for the client
        if after is not None:
            for event in self.events.since(after):
                stream.put(event)
        self._streams.add(stream)
        try:
            while True:
                data = stream.take(snapshot)
                if not data:
                    try:
                        async with asyncio.timeout(HEARTBEAT_S):
                            await stream.news.wait()
                        continue
                    except TimeoutError:
                        beat = msgspec.json.encode({"time_ns": self.clock.now_ns()})
                        data = b"id: %d\nevent: heartbeat\ndata: %s\n\n" % (stream.seq, beat)
                async with asyncio.timeout(WRITE_S):
                    await response.write(data)
        except TimeoutError:
            stream.drop()
        except ConnectionError:
            pass  # gone, or dropped
        finally:
            self._streams.discard(stream)
        return response


class _Stream:
    def __init__(self, clock: Clock, snapshots: bool, sees: Callable[[Event], bool], period_s: float, seq: int) -> None:
        self.news = asyncio.Event()
        self.drop: Callable[[], None] = lambda: None
        self.seq = seq
        self._clock = clock
        self._sees = sees
        self._events: deque[Event] = deque()
        self._period_ns = round(period_s * NS) if snapshots else None
        self._due_ns = 0
        self._fresh = snapshots
        self.news.set()

    def tick(self) -> None:
        if self._period_ns is not None and self._clock.now_ns() >= self._due_ns:
            self._fresh = True
            self.news.set()

    def put(self, event: Event) -> None:
        if not self._sees(event):
            return
        if len(self._events) >= MAX_QUEUED:
            self.drop()
        else:
            self._events.append(event)
        self.news.set()

    def take(self, snapshot: Callable[[], bytes] | None) -> bytes:
        self.news.clear()
        parts = []
        while self._events:
            event = self._events.popleft()
            self.seq = event.seq
            parts.append(b"id: %d\nevent: event\ndata: %s\n\n" % (event.seq, msgspec.json.encode(event)))
        if self._fresh and snapshot is not None and self._period_ns is not None:
            self._fresh = False
            # A tenth of a period early is on time: sampling has its own phase.
            self._due_ns = self._clock.now_ns() + self._period_ns * 9 // 10
            if body := snapshot():
                parts.append(b"id: %d\nevent: snapshot\ndata: %s\n\n" % (self.seq, body))
        return b"".join(parts)
