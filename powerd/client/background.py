"""Threads of a guest: how they start in somebody else's process, and how they wait in the node's own time.

House rules: they take no signal and outlive no process; a thread that has ended holds no stepped node's time.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from powerd.errors import PowerdError

_NS = 1_000_000_000


def start(action: Callable[[], None], name: str) -> None:
    """A background thread that takes no signal: those are for the threads of the program that we are a guest in."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        threading.Thread(target=action, name=name, daemon=True).start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def nothing() -> None:
    """Do nothing."""


def pacer(
    stop: threading.Event, time_scale: Callable[[], float]
) -> tuple[Callable[[float], None], Callable[[], None], Callable[[], None]]:
    """How the calling thread waits in the node's time, how somebody else stops that, and how it leaves."""
    if os.environ.get("POWERD_SIM_STATE"):
        from powerd.clock import from_environment

        clock = from_environment()
        waiter = clock.waiter("lease heartbeat")

        def wake() -> None:
            stop.set()
            waiter.wake()

        def wait_simulated(seconds: float) -> None:
            if not stop.is_set():
                waiter.wait_until(clock.now_ns() + round(seconds * _NS))

        return wait_simulated, wake, waiter.close

    def wait(seconds: float) -> None:
        try:
            seconds /= time_scale() or 1.0
        except PowerdError:
            seconds = 0.5  # the daemon is away just now: ask it soon
        stop.wait(seconds)

    return wait, stop.set, nothing


def flight() -> Callable[[int], None] | None:
    """How messages under way are counted for a stepped node's clock; ``None`` where time does not wait for them."""
    if not os.environ.get("POWERD_SIM_STATE"):
        return None
    from powerd.clock import from_environment

    clock = from_environment()
    return clock.flight if clock.scale == 0.0 else None
