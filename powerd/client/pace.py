"""How a background thread of a guest process waits in the node's time.

House rules: on a simulated node by its clock, else in real seconds divided by what the daemon says the scale is; whoever waits
can be woken; a thread that has ended holds no stepped time.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import TYPE_CHECKING

from powerd.errors import PowerdError

if TYPE_CHECKING:
    from powerd.client.core import Client
    from powerd.clock import Clock, Waiter

_NS = 1_000_000_000


class Pacer:
    """One thread's waits: made and used in that thread as a context manager, ``wake`` from any.

    On a stepped node a thread is the participant that it last joined as: whoever starts it waits until it is made, so that time
    cannot pass it by, and does not make it itself.
    """

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._woken = threading.Event()
        self._clock: Clock | None = None
        self._waiter: Waiter | None = None
        if os.environ.get("POWERD_SIM_STATE"):
            from powerd.clock import from_environment

            self._clock = from_environment()
            self._waiter = self._clock.waiter(name)

    def __enter__(self) -> Pacer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._waiter is not None:
            self._waiter.close()

    def wait(self, seconds: float) -> None:
        """Wait so many seconds of the node's time, or until woken; once woken it never waits again."""
        if self._woken.is_set():
            return
        if self._clock is not None and self._waiter is not None:
            self._waiter.wait_until(self._clock.now_ns() + round(seconds * _NS))
            return
        try:
            seconds /= self._client.time_scale() or 1.0
        except PowerdError:
            seconds = min(seconds, 0.5)  # the daemon is away just now: ask it soon
        self._woken.wait(seconds)

    def wake(self) -> None:
        """End the present wait and all later ones."""
        self._woken.set()
        if self._waiter is not None:
            self._waiter.wake()
