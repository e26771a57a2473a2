"""Energy windows against the truth of the stepped simulated driver: random length, phase and load.

House rules: the windows see readings only, the truth scores them; powerd's own sampling path reads NVML; seeded and exact.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks import load
from powerd.api import EnergyFigure, LabelEnergy
from powerd.clock import NS, RealClock, Waiter
from powerd.config import HwConfig
from powerd.energy import SensorErrors
from powerd.hw.energy import EnergyTracker
from powerd.hw.nvml import NvmlDevice, NvmlNode, open_node
from powerd.hw.sampler import Sampler
from powerd.model import Snapshot
from powerd.sim.node import SimNode, create
from powerd.sim.workload import BLOCKED, LOAD, Context
from powerd.windows import EnergyWindows

KERNELS = ("gemm", "prefill", "decode", "mixed")
_WARM_UP_NS = 3 * NS


class NodeClock(RealClock):
    """The time of a simulated node of this process; nobody waits on it, the driver of the campaign moves it."""

    simulated = True
    scale = 0.0

    def __init__(self, node: SimNode) -> None:
        self._node = node

    def now_ns(self) -> int:
        return self._node.now_ns()

    def wall_ns(self) -> int:
        return self._node.now_ns()

    def waiter(self, name: str) -> Waiter:
        return _NoWaiter()


class _NoWaiter:
    """Nobody waits: the campaign calls the samplers itself."""

    def wait_until(self, deadline_ns: int) -> int:
        return deadline_ns

    def wake(self) -> None:
        return None

    def close(self) -> None:
        return None


class Poller:
    """powerd-hw's own samplers on every GPU of the node, called by hand."""

    def __init__(self, node: SimNode, nvml: NvmlNode, *, counter: bool = True) -> None:
        self._clock = NodeClock(node)
        self._seq = 0
        self._samplers = [self._sampler(nvml, device, counter) for device in nvml.devices()]
        self.uuids = [sampler.uuid for sampler in self._samplers]

    def _sampler(self, nvml: NvmlNode, device: NvmlDevice, counter: bool) -> Sampler:
        capabilities = device.capabilities()
        with_counter = counter and capabilities.energy_counter  # False: as if this GPU had none
        tracker = EnergyTracker(1, counter=with_counter, limit_mw=capabilities.power_limit_max_mw)

        def ignore(*_: object, **__: object) -> None:
            return None

        return Sampler(
            nvml, device, tracker, self._clock, HwConfig(), observe=ignore, lost=ignore, returned=ignore, driver_gone=ignore,
            tell=ignore,
        )  # fmt: skip

    def read(self) -> Snapshot:
        """One snapshot now."""
        now = self._clock.now_ns()
        self._seq += 1
        for sampler in self._samplers:
            sampler.sample()
        return Snapshot(self._seq, now, now, tuple(sampler.reading for sampler in self._samplers))


@contextmanager
def polled_node(model: str, gpus: int, seed: int, *, counter: bool = True) -> Iterator[tuple[SimNode, Poller]]:
    """A stepped node of this process without injected latency, NVML opened on it, and who reads it."""
    with create(model, gpus, time="stepped", seed=seed, latency=0.0, first_open_s=0.0) as node:
        node.load()
        nvml = open_node()
        try:
            yield node, Poller(node, nvml, counter=counter)
        finally:
            nvml.close()


class Load:
    """Drives one GPU through idle, steady and fast switching phases."""

    def __init__(self, node: SimNode, gpu: int, rng: random.Random) -> None:
        self._node, self._gpu, self._rng = node, gpu, rng
        self._context = Context(gpu, node=node)
        self._phase, self._phase_end_ns = "idle", 0

    def step(self) -> int:
        """Begin the next piece of load; returns when it ends."""
        now, rng = self._node.now_ns(), self._rng
        if now >= self._phase_end_ns:
            self._phase = rng.choice(("idle", "steady", "switching", "switching"))
            self._phase_end_ns = now + round(rng.uniform(4, 40) * NS)
        end = self._phase_end_ns
        if self._phase == "switching":
            end = min(end, now + round(rng.uniform(0.3, 3.0) * NS))
        if self._phase != "idle":
            state = BLOCKED if self._phase == "switching" and rng.random() < 0.25 else LOAD
            load.begin(self._context, state, rng.choice(KERNELS), rng.uniform(0.3, 1.0), end - now)
        return max(end, now + 1)


@dataclass(frozen=True, slots=True)
class Scored:
    """An estimate with its interval beside the truth."""

    figure: EnergyFigure | LabelEnergy
    true_j: float

    @property
    def covered(self) -> bool:
        """Whether the truth lies in the reported interval."""
        low, high = self.figure.low_j, self.figure.high_j
        return low is not None and high is not None and low <= self.true_j <= high

    @property
    def error(self) -> float:
        """Signed relative error of the figure."""
        assert self.figure.energy_j is not None
        return self.figure.energy_j / self.true_j - 1

    @property
    def width(self) -> float:
        """Half the interval relative to the truth."""
        assert self.figure.low_j is not None
        assert self.figure.high_j is not None
        return (self.figure.high_j - self.figure.low_j) / 2 / self.true_j


@dataclass(frozen=True, slots=True)
class ScoredWindow(Scored):
    """One window's answer beside the truth."""

    figure: EnergyFigure
    seconds: float


@dataclass(frozen=True, slots=True)
class Setup:
    """One campaign: so many windows of 2-30 s at random phase on one node."""

    model: str
    windows: int
    seed: int = 1
    gpus: int = 8
    sample_hz: float = 10.0
    jitter_s: float = 0.003  # by so much a sample may be late
    counter: bool = True
    wait: bool = True  # for the closing sample
    errors: SensorErrors = field(default_factory=SensorErrors)


def campaign(setup: Setup, progress: Callable[[float], None] | None = None) -> list[ScoredWindow]:
    """Run it and score every window against the truth."""
    with polled_node(setup.model, setup.gpus, setup.seed, counter=setup.counter) as (node, poller):
        return asyncio.run(_Campaign(node, poller, setup, progress).go())


class _Campaign:
    def __init__(self, node: SimNode, poller: Poller, setup: Setup, progress: Callable[[float], None] | None) -> None:
        self._node, self._poller, self._setup, self._progress = node, poller, setup, progress
        self._rng = rng = random.Random(setup.seed)  # noqa: S311
        self._period_ns = round(NS / setup.sample_hz)
        self._windows = EnergyWindows(NodeClock(node), self._period_ns, setup.errors)
        windows = setup.windows
        self._loads = [Load(node, gpu, rng) for gpu in range(node.gpus)]
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._scored: list[ScoredWindow] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._count = 0
        begin = node.now_ns()
        self._first_tick_ns = begin + round(rng.uniform(0, self._period_ns))
        self._tick = 0
        self._at(self._first_tick_ns, self._observe)
        for gpu, driven in enumerate(self._loads):
            self._at(begin + gpu + 1, lambda driven=driven: self._step(driven))  # type: ignore[misc]
        span_ns = windows // node.gpus * 4 * NS  # about four windows of a GPU overlap
        for number in range(windows):
            at = begin + _WARM_UP_NS + round(rng.uniform(0, span_ns))
            self._at(at, lambda gpu=number % node.gpus: self._begin(gpu))  # type: ignore[misc]
        self._left, self._wanted = windows, windows

    def _at(self, at_ns: int, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (at_ns, self._count, what))

    def _observe(self) -> None:
        self._windows.observe(self._poller.read())
        self._tick += 1
        late_ns = round(self._rng.uniform(0, self._setup.jitter_s) * NS)
        self._at(self._first_tick_ns + self._tick * self._period_ns + late_ns, self._observe)

    def _step(self, driven: Load) -> None:
        self._at(driven.step(), lambda: self._step(driven))

    def _begin(self, gpu: int) -> None:
        view = self._windows.begin([self._poller.uuids[gpu]])
        true_mj = self._node.true_energy_mj(gpu)
        self._at(view.begin_ns + round(self._rng.uniform(2, 30) * NS), lambda: self._end(gpu, view.id, true_mj))

    def _end(self, gpu: int, window: str, begin_mj: float) -> None:
        true_j = (self._node.true_energy_mj(gpu) - begin_mj) / 1000
        self._tasks.append(asyncio.ensure_future(self._score(window, true_j)))

    async def _score(self, window: str, true_j: float) -> None:
        view = await self._windows.end(window, self._setup.wait)
        assert view.duration_s is not None
        self._scored.append(ScoredWindow(view.figures[0], true_j, view.duration_s))
        self._left -= 1

    async def go(self) -> list[ScoredWindow]:
        ended = 0
        while self._left:
            at_ns, _, what = heapq.heappop(self._events)
            if (ahead := at_ns - self._node.now_ns()) > 0:
                self._node.advance(ahead / NS)
            what()
            for _ in range(3):  # let windows that wait for this sample end
                await asyncio.sleep(0)
            if self._progress and self._wanted - self._left != ended:
                ended = self._wanted - self._left
                self._progress(ended / self._wanted)
        for task in self._tasks:
            task.result()
        return self._scored


def summary(scored: list[ScoredWindow]) -> dict[str, float]:
    """The figures that are reported: coverage, errors from 10 s on, widths of the interval."""
    long = [s for s in scored if s.seconds >= 10]
    short = [s for s in scored if s.seconds < 5]
    return {
        "windows": len(scored),
        "covered_percent": 100 * sum(s.covered for s in scored) / len(scored),
        "mean_abs_error_from_10_s_percent": 100 * statistics.fmean(abs(s.error) for s in long),
        "mean_error_from_10_s_percent": 100 * statistics.fmean(s.error for s in long),
        "worst_error_from_10_s_percent": 100 * max(abs(s.error) for s in long),
        "mean_abs_error_below_5_s_percent": 100 * statistics.fmean(abs(s.error) for s in short) if short else float("nan"),
        "median_half_width_percent": 100 * statistics.median(s.width for s in scored),
        "median_half_width_from_10_s_percent": 100 * statistics.median(s.width for s in long),
        "median_half_width_below_5_s_percent": 100 * statistics.median(s.width for s in short) if short else float("nan"),
    }
