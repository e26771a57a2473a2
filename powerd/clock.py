"""The only source of time: real, scaled and stepped time behind one interface.

House rules: nobody else reads a system clock for decisions; TTLs and intervals are CLOCK_BOOTTIME nanoseconds; a simulated node's
clock lives in its shared memory and is found through the same library that its NVML comes from (design.md section 7).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import selectors
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

NS = 1_000_000_000
NEVER_NS = (1 << 64) - 1
SIM_STATE_ENV = "POWERD_SIM_STATE"
_LIBRARY = "libnvidia-ml.so.1"
_RECHECK_MS = 1000  # a stepped waiter looks up once a real second so that a dead peer cannot hold it for ever


class Waiter(Protocol):
    """One thread's way to wait for a moment; another thread may wake it early."""

    def wait_until(self, deadline_ns: int) -> int:
        """Return at the deadline (``NEVER_NS``: none) or when woken; the value is the time then."""

    def wake(self) -> None:
        """Make the present or the next ``wait_until`` return at once."""

    def close(self) -> None:
        """Leave; a stepped clock no longer waits for this thread."""


class Clock(Protocol):
    """Where a process gets its time from."""

    simulated: bool
    scale: float  # simulated seconds per real second; 0.0 when stepped

    def now_ns(self) -> int:
        """CLOCK_BOOTTIME in nanoseconds: goes on during suspend, never steps back."""

    def wall_ns(self) -> int:
        """Nanoseconds since 1970 for stamps that people and databases read; never used for decisions."""

    def waiter(self, name: str) -> Waiter:
        """A waiter for the calling thread."""

    def flight(self, delta: int) -> None:
        """Count a message that is on its way (+1 by its sender, -1 by its receiver); stepped time stands still meanwhile."""

    def aside(self, away: bool) -> None:
        """Say that the calling thread blocks on something else than this clock; stepped time does not wait for it meanwhile."""

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        """An event loop whose ``time()`` and timers follow this clock."""


class _EventWaiter:
    """Waits on a threading.Event; real seconds are simulated seconds divided by the scale."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._event = threading.Event()

    def wait_until(self, deadline_ns: int) -> int:
        while True:
            now = self._clock.now_ns()
            if deadline_ns == NEVER_NS:
                self._event.wait()
            elif now < deadline_ns:
                self._event.wait((deadline_ns - now) / NS / (self._clock.scale or 1.0))
            if self._event.is_set():
                self._event.clear()
                return self._clock.now_ns()
            if (now := self._clock.now_ns()) >= deadline_ns:
                return now

    def wake(self) -> None:
        self._event.set()

    def close(self) -> None:
        self._event.set()


class RealClock:
    """The machine's own CLOCK_BOOTTIME."""

    simulated = False
    scale = 1.0

    def now_ns(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def wall_ns(self) -> int:
        return time.time_ns()

    def waiter(self, name: str) -> Waiter:
        return _EventWaiter(self)

    def flight(self, delta: int) -> None:
        return None

    def aside(self, away: bool) -> None:
        return None

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.new_event_loop()


class SimClock:
    """The clock in a simulated node's shared memory: real, scaled or stepped."""

    simulated = True

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.powerd_sim_now_ns.restype = ctypes.c_uint64
        library.powerd_sim_scale.restype = ctypes.c_double
        library.powerd_sim_join.argtypes = [ctypes.c_char_p]
        library.powerd_sim_wait.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
        library.powerd_sim_wait.restype = ctypes.c_uint64
        library.powerd_sim_wake.restype = None
        library.powerd_sim_leave.restype = None
        library.powerd_sim_flight.restype = None
        library.powerd_sim_aside.restype = None
        self.scale = float(library.powerd_sim_scale())
        self._wall_offset_ns = time.time_ns() - self.now_ns()

    @property
    def stepped(self) -> bool:
        """Whether time only moves when every participant waits."""
        return self.scale == 0.0

    def now_ns(self) -> int:
        return int(self.library.powerd_sim_now_ns())

    def wall_ns(self) -> int:
        # Simulated stamps run with simulated time, so that rates computed from them are right.
        return self._wall_offset_ns + self.now_ns()

    def waiter(self, name: str) -> Waiter:
        return _SteppedWaiter(self.library, name) if self.stepped else _EventWaiter(self)

    def flight(self, delta: int) -> None:
        if self.stepped:
            self.library.powerd_sim_flight(delta)

    def aside(self, away: bool) -> None:
        if self.stepped:
            self.library.powerd_sim_aside(int(away))

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        selector = _SteppedSelector(self) if self.stepped else _ScaledSelector(self.scale)
        return _SimLoop(self, selector)


class _SteppedWaiter:
    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self._library = library
        self._slot = library.powerd_sim_join(name.encode())
        if self._slot < 0:
            raise RuntimeError("the simulated node has no room for another clock participant")
        self._woken = threading.Event()

    def wait_until(self, deadline_ns: int) -> int:
        while True:
            now = int(self._library.powerd_sim_wait(self._slot, deadline_ns, _RECHECK_MS))
            if now >= deadline_ns or self._woken.is_set():
                self._woken.clear()
                return now

    def wake(self) -> None:
        self._woken.set()
        self._library.powerd_sim_wake(self._slot)

    def calm(self) -> None:
        """Forget a wake that came when the wait had ended already; only while nobody waits."""
        self._woken.clear()
        self._library.powerd_sim_wait(self._slot, 0, 0)

    def close(self) -> None:
        self._library.powerd_sim_leave(self._slot)


class _ScaledSelector(selectors.EpollSelector):
    """Turns a loop's simulated timeouts into real ones."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self._scale = scale

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(timeout / self._scale if timeout and timeout > 0 else timeout)


class _SteppedSelector(selectors.EpollSelector):
    """An idle loop is a waiting participant: a helper thread waits on the clock while the loop waits on its descriptors."""

    def __init__(self, clock: SimClock) -> None:
        super().__init__()
        self._clock = clock
        self._waiter = _SteppedWaiter(clock.library, "event loop")
        self._ring_read, self._ring_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        super().register(self._ring_read, selectors.EVENT_READ)
        self._deadline: int | None = None
        self._armed = threading.Semaphore(0)
        self._idle = threading.Semaphore(0)
        threading.Thread(target=self._sit, name="stepped-clock", daemon=True).start()

    def _sit(self) -> None:
        while True:
            self._armed.acquire()
            if self._deadline is None:
                return
            self._waiter.wait_until(self._deadline)
            with contextlib.suppress(OSError):
                os.write(self._ring_write, b"t")
            self._idle.release()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return self._mine(super().select(0))
        if ready := self._mine(super().select(0)):
            return ready
        self._deadline = NEVER_NS if timeout is None else self._clock.now_ns() + max(1, round(timeout * NS))
        self._armed.release()
        ready = super().select(None)
        self._waiter.wake()
        self._idle.acquire()
        self._waiter.calm()  # the wait may have ended by itself: a wake left over would end the next one at once, and so on
        with contextlib.suppress(BlockingIOError):
            os.read(self._ring_read, 64)
        return self._mine(ready)

    def _mine(self, ready: list[tuple[selectors.SelectorKey, int]]) -> list[tuple[selectors.SelectorKey, int]]:
        return [(key, events) for key, events in ready if key.fd != self._ring_read]

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        return super().get_map()

    def close(self) -> None:
        self._deadline = None
        self._armed.release()
        self._waiter.close()
        os.close(self._ring_write)
        super().close()
        os.close(self._ring_read)


class _SimLoop(asyncio.SelectorEventLoop):
    """An asyncio loop that lives in simulated time."""

    def __init__(self, clock: SimClock, selector: selectors.BaseSelector) -> None:
        self._sim_clock = clock
        super().__init__(selector)

    def time(self) -> float:
        return self._sim_clock.now_ns() / NS


def find_sim_library() -> ctypes.CDLL | None:
    """The simulated driver's library if this process is pointed at one, else ``None``; a real driver is never mistaken for it."""
    if not os.environ.get(SIM_STATE_ENV):
        return None
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    return library if hasattr(library, "powerd_sim_version") else None


def from_environment() -> Clock:
    """The simulated node's clock inside ``powerd sim run``, else the machine's."""
    library = find_sim_library()
    return RealClock() if library is None else SimClock(library)


@contextlib.contextmanager
def running(loop: asyncio.AbstractEventLoop) -> Iterator[asyncio.AbstractEventLoop]:
    """Close the loop in the end, with its generators and executor."""
    try:
        yield loop
    finally:
        with contextlib.suppress(RuntimeError):
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@contextlib.contextmanager
def standing(clock: Clock) -> Iterator[None]:
    """Stepped time stands still meanwhile; real and scaled time cannot be held and go on.

    For work off the loop, in a thread or a child: the loop waits for it and is an idle participant, and whoever asked is set
    aside, so time would run away and leases would expire while somebody computes. A participant that does not wait is what
    holds it: a message in flight would be given up after a real second, because its receiver may have died.
    """
    waiter = clock.waiter("work off the loop")
    try:
        yield
    finally:
        waiter.close()


def seconds(ns: int) -> float:
    """Nanoseconds as seconds."""
    return ns / NS


def from_seconds(value: float) -> int:
    """Seconds as nanoseconds."""
    return round(value * NS)


def run(clock: Clock, main: Any) -> Any:
    """Run a coroutine to its end on a loop of this clock."""
    with running(clock.new_event_loop()) as loop:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(main)
