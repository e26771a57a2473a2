"""A sample's time is the time it was taken, however busy the machine was."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from powerd.clock import NS, Clock
from powerd.config import HwConfig
from powerd.hw.energy import EnergyTracker
from powerd.hw.port import Device, Fast, Node, Slow
from powerd.hw.sampler import Sampler
from powerd.model import Gpu


@dataclass
class Moment:
    ns: int = 100 * NS

    def now_ns(self) -> int:
        return self.ns


@dataclass
class Counter:
    """A GPU at 1 kW; each entry of ``delays_s`` holds one read up before the driver looks at its counter."""

    moment: Moment
    delays_s: list[float]
    gpu: Gpu = field(default_factory=lambda: Gpu("GPU-0", 0, "GPU", "0000:01:00.0"))

    def fast(self, clocks: bool) -> Fast:
        self.moment.ns += round((self.delays_s.pop(0) if self.delays_s else 0.0) * NS)
        return Fast(energy_mj=self.moment.ns // 1000, power_mw=1_000_000)

    def slow(self) -> Slow:
        return Slow()

    def processes(self) -> None:
        return None


def sampled(*delays_s: float) -> tuple[int, int]:
    """The counter and the stamp of one sample whose reads were held up so long."""
    moment = Moment()
    device = Counter(moment, list(delays_s))
    nothing: Any = lambda *args, **named: None  # noqa: E731
    sampler = Sampler(
        cast(Node, None), cast(Device, device), EnergyTracker(1, counter=True, limit_mw=None), cast(Clock, moment), HwConfig(),
        observe=nothing, lost=nothing, returned=nothing, driver_gone=nothing, tell=nothing,
    )  # fmt: skip
    sampler.sample()
    assert sampler.reading.energy_mj is not None
    return sampler.reading.energy_mj, sampler.reading.time_ns


def test_a_read_that_was_held_up_is_taken_again_and_stamped_anew() -> None:
    energy_mj, time_ns = sampled(0.2, 0.0)
    assert energy_mj == time_ns // 1000


def test_a_prompt_read_is_taken_once() -> None:
    energy_mj, time_ns = sampled(0.002, 5.0)
    assert energy_mj - time_ns // 1000 == 2_000_000 // 1000
