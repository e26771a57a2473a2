"""A GPU in memory behind the port of powerd-hw, for properties that need thousands of runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from powerd.clock import NS, Waiter
from powerd.config import Config, parse
from powerd.errors import DeviceError
from powerd.hw import fence, port
from powerd.hw.actuator import Actuator
from powerd.hw.journal import Journal
from powerd.hw.tables import GpuProcess
from powerd.hw.worker import everything
from powerd.model import Capabilities, Control, Gpu, Interval, Outcome, Reading, Restart, Support

LOAD = b"L" * 16
BOOT = b"B" * 16
DEFAULT_MW = 700_000
CLOCKS = tuple(range(210, 1981, 15))


class HandClock:
    """A clock that a test moves."""

    simulated, scale = True, 1.0

    def __init__(self) -> None:
        self.ns = 1_000 * NS

    def now_ns(self) -> int:
        return self.ns

    def wall_ns(self) -> int:
        return self.ns

    def flight(self, delta: int) -> None:
        return None

    def waiter(self, name: str) -> Waiter:
        raise AssertionError("what is tested on this clock waits for nothing")

    def new_event_loop(self) -> object:
        raise AssertionError("what is tested on this clock waits for nothing")


@dataclass
class MemoryGpu:
    number: int = 0
    limit_mw: int = DEFAULT_MW
    sm: Interval | None = None
    memory: Interval | None = None
    calls: list[tuple[str, object]] = field(default_factory=list)
    fail: DeviceError | None = None
    crash_after: int | None = None  # calls until this process "dies": the call has its effect, its caller hears nothing

    @property
    def gpu(self) -> Gpu:
        return Gpu(f"GPU-00000000-0000-0000-0000-{self.number:012x}", self.number, "memory", f"0000:{self.number:02x}:00.0")

    def capabilities(self) -> Capabilities:
        return Capabilities(
            self.gpu, "1", 200_000, DEFAULT_MW, DEFAULT_MW, CLOCKS, (1593, 2619), True, True, False, True,
            dict.fromkeys(Control, Support(True)),
        )  # fmt: skip

    def _called(self, what: str, value: object) -> None:
        if self.fail:
            raise self.fail
        self.calls.append((what, value))

    def _after(self) -> None:
        if self.crash_after is not None:
            self.crash_after -= 1
            if self.crash_after < 0:
                raise Died

    def set_power_limit(self, power_mw: int) -> None:
        self._called("limit", power_mw)
        self.limit_mw = power_mw
        self._after()

    def lock_sm_clock(self, interval: Interval) -> None:
        self._called("sm", interval)
        self.sm = interval
        self._after()

    def unlock_sm_clock(self) -> None:
        self._called("sm", None)
        self.sm = None
        self._after()

    def lock_memory_clock(self, interval: Interval) -> None:
        self._called("memory", interval)
        self.memory = interval
        self._after()

    def unlock_memory_clock(self) -> None:
        self._called("memory", None)
        self.memory = None
        self._after()

    def power_limits_mw(self) -> tuple[int | None, int | None]:
        return self.limit_mw, self.limit_mw

    def fast(self, clocks: bool = True) -> port.Fast:
        return port.Fast()

    def slow(self) -> port.Slow:
        return port.Slow()

    def processes(self) -> tuple[GpuProcess, ...] | None:
        return ()

    @property
    def state(self) -> tuple[int, Interval | None, Interval | None]:
        return self.limit_mw, self.sm, self.memory


class Died(BaseException):
    """The process is gone at this point."""


class Hands:
    """A worker's writing half on memory GPUs; made anew it is the next process."""

    def __init__(self, gpus: list[MemoryGpu], directory: Path, config: Config, clock: HandClock, load: bytes = LOAD) -> None:
        generation = fence.next_generation(directory, lambda _: False)
        capabilities = [g.capabilities() for g in gpus]
        self.clock, self.gpus = clock, gpus
        self.journal = Journal(directory, load, generation, everything(capabilities, config), BOOT)
        self.outcomes: list[Outcome] = []
        self.events: list[tuple[str, str | None]] = []
        self.actuators = [
            Actuator(g, c, config, clock, self.journal, fence.Fence(directory, generation), self.outcomes.append, self._tell)  # type: ignore[arg-type]
            for g, c in zip(gpus, capabilities, strict=True)
        ]

    def _tell(self, kind: str, uuid: str | None = None, subject: str | None = None, detail: str = "", **data: object) -> None:
        self.events.append((kind, subject))

    def want(self, gpu: int, rows: dict[Control, Interval | None], seq: int = 1, dwell_ns: int = 1) -> None:
        cause = Restart.LEASE_END
        self.actuators[gpu].want({c: (v, dwell_ns, cause) for c, v in rows.items()}, seq, self.clock.now_ns())

    def settle(self) -> None:
        for _ in range(20):
            for actuator in self.actuators:
                actuator.step()
            self.clock.ns += 40 * NS  # past every pause

    def observe(self, gpu: int, **values: Any) -> None:
        self.clock.ns += NS
        now_ns = self.clock.now_ns()
        known = {"power_limit_requested_mw": self.gpus[gpu].limit_mw, "power_limit_enforced_mw": self.gpus[gpu].limit_mw}
        self.actuators[gpu].observe(reading(self.gpus[gpu].gpu.uuid, now_ns, **{**known, **values}), now_ns)


def reading(uuid: str, now_ns: int, **values: Any) -> Reading:
    from powerd.model import Health

    return Reading(uuid=uuid, time_ns=now_ns, health=Health.UP, epoch=1, **values)


@contextmanager
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def config(text: str = "") -> Config:
    return parse(text or "[hw]\nmin_dwell_s = 0")
