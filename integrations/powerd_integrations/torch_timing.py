"""A GPU's own moments for the conductor: CUDA events, or the CPU waiting for the GPU.

House rules: ``mark`` never waits with events; a beat leaves when the GPU has ended the instruction, not when the CPU queued it;
events are used again, so that a long training does not make new ones for ever.

Not run without a GPU: the tests replace torch.cuda's events and clock by ones of the same behaviour.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from powerd_integrations.pipeline.timing import HostTiming, Send

POLL_S = 50e-6
KEPT_EVENTS = 100_000


class SyncTiming(HostTiming):
    """The CPU waits for the GPU at every begin and end: exact and simple, but the GPU's queue runs dry each time."""

    def __init__(self, now_ns: Callable[[], int], device: Any) -> None:
        import torch

        stream = torch.cuda.current_stream

        def mark() -> int:
            stream(device).synchronize()
            return now_ns()

        super().__init__(mark)


class EventTiming:
    """CUDA events on the stream that computes; a helper thread looks for their end and sends the beat then."""

    lags = True  # the newest step is still in the GPU's queue when the CPU has left it: the one before is told

    def __init__(self, now_ns: Callable[[], int], device: Any, cuda: Any = None) -> None:
        if cuda is None:
            import torch

            cuda = torch.cuda
        self._cuda, self._device, self._now_ns = cuda, device, now_ns
        self._stream: Any = None
        self._free: list[Any] = []
        self._used: list[Any] = []  # in the sequence in which they were recorded
        self._anchor: tuple[Any, int] | None = None  # an event and when it was seen to have ended
        self._beats: queue.SimpleQueue[tuple[Any, Send, int, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._follow, name="powerd-gpu-moments", daemon=True)
        self._thread.start()

    def mark(self) -> Any:
        event = self._free.pop() if self._free else self._cuda.Event(enable_timing=True)
        self._stream = self._cuda.current_stream(self._device)
        event.record(self._stream)
        self._used.append(event)
        if len(self._used) > KEPT_EVENTS:  # the oldest are of steps that nobody asks for any more
            half = len(self._used) // 2
            self._free, self._used, self._anchor = self._used[:half], self._used[half:], None
        return event

    def announce(self, mark: Any, send: Send, step: int, index: int) -> None:
        self._beats.put((mark, send, step, index))

    def resolve(self, marks: Sequence[Any]) -> list[int]:
        """Times on the node's clock, from what has passed on the GPU between each mark and a moment that is known on both."""
        anchor = self._anchor
        if anchor is None or not all(mark.query() for mark in marks):
            now = self._cuda.Event(enable_timing=True)
            now.record(self._stream)
            now.synchronize()
            anchor = (now, self._now_ns())
        return [anchor[1] + round(anchor[0].elapsed_time(mark) * 1e6) for mark in marks]

    def close(self) -> None:
        self._beats.put(None)

    def _follow(self) -> None:
        while (item := self._beats.get()) is not None:
            mark, send, step, index = item
            try:
                waited = False
                while not mark.query():
                    waited = True
                    time.sleep(POLL_S)
                send(step, index)
                if waited:  # else it may have ended long ago
                    self._anchor = (mark, self._now_ns())
            except Exception:  # a GPU that fails ends training itself; there is nothing to announce any more
                return
