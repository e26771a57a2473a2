"""The supervisor's end of the connection to the one powerd.

House rules: a slow powerd loses snapshots, never outcomes or events; their queue is bounded, and who overruns it is cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque

from powerd.clock import Clock
from powerd.hw import frames

_QUEUE = 4096


class Peer:
    """The one connected powerd."""

    def __init__(self, link: socket.socket, clock: Clock) -> None:
        self.link = link
        self.reader = frames.TableReader()
        self._clock = clock
        self._queue: deque[bytes] = deque()
        self.broken = False

    def send(self, frame: bytes, *, may_drop: bool = False) -> None:
        """Send or queue one frame, in order; one that may be dropped never queues."""
        if self._queue:
            if not may_drop:
                self._queue.append(frame)
                self.broken = self.broken or len(self._queue) > _QUEUE
            return
        if not self._put(frame) and not may_drop:
            self._queue.append(frame)
            asyncio.get_running_loop().add_writer(self.link, self._drain)

    def _put(self, frame: bytes) -> bool:
        self._clock.flight(1)
        try:
            self.link.send(frame)
        except BlockingIOError:
            self._clock.flight(-1)
            return False
        except OSError:  # gone: its end of file is on the way to us
            self._clock.flight(-1)
        return True

    def _drain(self) -> None:
        while self._queue and self._put(self._queue[0]):
            self._queue.popleft()
        if not self._queue:
            asyncio.get_running_loop().remove_writer(self.link)

    def close(self) -> None:
        """Forget this powerd; what was under way to us is no longer."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.link)
        loop.remove_writer(self.link)
        with contextlib.suppress(OSError):
            while self.link.recv(frames.MAX_FRAME):
                self._clock.flight(-1)
        self.link.close()
