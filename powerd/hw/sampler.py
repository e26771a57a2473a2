"""Reads every GPU on time: all of them in one round as long as they answer, a thread of its own for one that does not.

House rules: one writer of each reading, readers take the swapped reference; energy and power on every tick, clocks on every tick
while one is set and on every second one otherwise, the rest once a second; a value that was not read is ``None``; waking a
thread costs more than reading a GPU, so threads are only made when one hangs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from powerd.clock import NS, Clock, Waiter
from powerd.config import HwConfig
from powerd.errors import DeviceError
from powerd.hw import port
from powerd.hw.energy import EnergyTracker
from powerd.hw.port import Device, Node, Slow
from powerd.hw.tables import GpuProcess
from powerd.model import Health, Reading

_SLOW_NS = NS
_PROMPT_NS = NS // 100  # beyond it a stamp taken before the read says too little about when it was read
_HELD_UP_NS = NS // 4  # reads take tens of milliseconds at worst
_EVERY_TICK_HZ = 5  # at this rate or below no clock is left out
_LOOK_NS = NS  # how often a lost GPU is looked for


class Sampler:
    """Reads one GPU; ``reading`` is always the newest."""

    def __init__(
        self,
        node: Node,
        device: Device,
        tracker: EnergyTracker,
        clock: Clock,
        config: HwConfig,
        *,
        observe: Callable[[Reading, int], None],
        lost: Callable[[], None],
        returned: Callable[[Device], None],
        driver_gone: Callable[[DeviceError], None],
        tell: Callable[..., None],
        clock_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self.uuid = device.gpu.uuid
        self.tracker = tracker
        self.processes: tuple[GpuProcess, ...] | None = None
        self.wedged = False
        self._node, self._device, self._clock, self._config = node, device, clock, config
        self._observe, self._clock_wanted, self._on_lost, self._on_returned = observe, clock_wanted, lost, returned
        self._driver_gone, self._tell = driver_gone, tell
        self._slow, self._slow_ns, self._processes_ns = Slow(), 0, 0
        self._tick = device.gpu.index  # neighbours take turns, so that every tick costs the same
        self._clocks: tuple[int | None, int | None] | None = None  # as last read: SM clock, clock event reasons
        self.busy_ns = 0  # since when a driver call is under way
        self._health = Health.UP
        self.reading = self._blank(clock.now_ns(), Health.UP)

    def _blank(self, now_ns: int, health: Health) -> Reading:
        return Reading(self.uuid, now_ns, health, self.tracker.epoch, energy_method=self.tracker.method)

    def configure(self, config: HwConfig) -> None:
        """A new configuration."""
        self._config = config

    def sample(self) -> None:
        """Read the GPU once and publish what it said."""
        now_ns = self._clock.now_ns()
        if self._health is Health.LOST and now_ns - self.reading.time_ns < _LOOK_NS:
            return
        self.busy_ns = now_ns
        try:
            if self._health is Health.LOST:
                self._come_back()
            self._read(now_ns)
        except DeviceError as error:
            self._trouble(now_ns, error)
        finally:
            self.busy_ns = 0
        if self.wedged:
            self.wedged = False
            self._tell("gpu_answers", self.uuid, None, "the driver answers again")

    def _read(self, now_ns: int) -> None:
        device, tracker = self._device, self.tracker
        self._tick += 1
        turn = bool(self._tick & 1) or self._clocks is None or self._config.sample_hz <= _EVERY_TICK_HZ
        clocks = turn or self._clock_wanted()
        fast = device.fast(clocks)
        if (again_ns := self._clock.now_ns()) - now_ns > _PROMPT_NS:
            # Held up between the stamp and the driver's answer: what it said may belong to any moment of that. Once more.
            now_ns, fast = again_ns, device.fast(clocks)
        if clocks:
            self._clocks = fast.sm_clock_mhz, fast.clock_event_reasons
        epoch = tracker.epoch
        tracker.feed(now_ns, fast)
        if tracker.epoch != epoch:
            self._tell("energy_epoch", self.uuid, None, "the energy counter restarted", epoch=tracker.epoch)
        if now_ns - self._slow_ns >= _SLOW_NS:
            self._slow, self._slow_ns = device.slow(), now_ns
        elif now_ns - self._processes_ns >= _SLOW_NS:  # never both in one tick
            self.processes, self._processes_ns = device.processes(), now_ns
        sm_clock_mhz, clock_event_reasons = self._clocks or (None, None)
        slow, health = self._slow, Health.SUSPECT if tracker.suspect else Health.UP
        if health is not self._health:
            self._say(health, "the energy counter stands still while power is drawn" if tracker.suspect else "")
        self.reading = reading = Reading(
            self.uuid, now_ns, health, tracker.epoch, tracker.energy_mj, tracker.energy_time_ns, fast.power_mw,
            fast.power_average_mw, sm_clock_mhz, slow.memory_clock_mhz, slow.temperature_c, slow.utilization_percent,
            slow.memory_used_bytes, slow.memory_total_bytes, slow.power_limit_requested_mw, slow.power_limit_enforced_mw,
            clock_event_reasons, tracker.method,
        )  # fmt: skip
        self._observe(reading, self._slow_ns)

    def _say(self, health: Health, why: str) -> None:
        self._health = health
        self._tell(f"gpu_{health.value}", self.uuid, None, why)

    def _trouble(self, now_ns: int, error: DeviceError) -> None:
        if error.nvml_code in port.DRIVER_GONE:
            self._driver_gone(error)
        health = Health.LOST if error.code.name == "gpu_lost" else Health.SUSPECT
        self.reading, self._clocks = self._blank(now_ns, health), None
        if health is self._health:
            return
        self._say(health, str(error))
        if health is Health.LOST:
            self._slow, self._slow_ns, self.processes = Slow(), 0, None
            self._on_lost()

    def _come_back(self) -> None:
        """Look for the GPU by its UUID; nothing measured before may be subtracted from anything after."""
        self._device = self._node.find(self.uuid)
        self.tracker.restart()
        self._health = Health.SUSPECT  # until the first reading says otherwise
        self._on_returned(self._device)

    def overdue(self, now_ns: int) -> bool:
        """Whether a read has passed its deadline; the GPU is then WEDGED until the driver returns."""
        busy_ns = self.busy_ns
        late = bool(busy_ns) and now_ns - busy_ns > self._config.read_deadline_s * NS
        if late and not self.wedged:
            self.wedged = True
            # of a hung call's GPU nothing is known: the last reading must not look fresh
            self.reading = self._blank(self.reading.time_ns, Health.WEDGED)
            self._tell("gpu_wedged", self.uuid, None, f"no answer from the driver within {self._config.read_deadline_s:g} s")
        return late


class _Round:
    """One thread and the GPUs that it reads one after another."""

    def __init__(self, members: tuple[Sampler, ...], waiter: Waiter) -> None:
        self.members = members
        self.current: Sampler | None = None
        self.lock = threading.Lock()
        self.waiter = waiter

    def read(self) -> None:
        """Read every member once; one that was moved away meanwhile is left to its new round."""
        for sampler in self.members:
            with self.lock:
                if sampler not in self.members:
                    continue
                self.current = sampler
            sampler.sample()
        self.current = None


class Rounds:
    """All samplers of the node; ``done`` is called after each round of reads."""

    def __init__(self, samplers: Sequence[Sampler], clock: Clock, hz: float, done: Callable[[], None]) -> None:
        self._clock, self._done = clock, done
        self._period_ns = round(NS / hz)
        self._stopped = False
        self._rounds = [_Round(tuple(samplers), clock.waiter("read"))]

    def start(self) -> None:
        """Begin to read."""
        self._begin(self._rounds[0])

    def _begin(self, one: _Round) -> None:
        threading.Thread(target=self._run, args=(one,), name="read", daemon=True).start()

    def refresh(self) -> None:
        """Read once more now."""
        for one in self._rounds:
            one.waiter.wake()

    def configure(self, hz: float) -> None:
        """Another rate, from the next round on."""
        if (period_ns := round(NS / hz)) != self._period_ns:
            self._period_ns = period_ns
            self.refresh()

    def stop(self) -> None:
        """End the threads as soon as their calls return."""
        self._stopped = True
        self.refresh()

    def _run(self, one: _Round) -> None:
        # Whole multiples of the period, so that the phase does not depend on when this process came up.
        due_ns = self._clock.now_ns() // self._period_ns * self._period_ns
        while not self._stopped and one.members:
            one.read()
            self._done()
            now_ns, period_ns = self._clock.now_ns(), self._period_ns
            due_ns = min(due_ns, now_ns + period_ns)  # the period may have become shorter
            if now_ns >= due_ns:  # late rounds are skipped, the phase stays
                due_ns += (now_ns - due_ns) // period_ns * period_ns + period_ns
            one.waiter.wait_until(due_ns)
        one.waiter.close()

    def watch(self, now_ns: int) -> None:
        """A GPU that holds its round up keeps the thread and the others get a new one, until it answers again."""
        if len(self._rounds) > 1:
            self._join()
        for one in tuple(self._rounds):
            with one.lock:
                stuck = one.current
                held = stuck is not None and stuck.busy_ns and now_ns - stuck.busy_ns > max(self._period_ns, _HELD_UP_NS)
                if stuck is None or not held or len(one.members) == 1:
                    continue
                others = tuple(s for s in one.members if s is not stuck)
                one.members = (stuck,)
            fresh = _Round(others, self._clock.waiter("read"))
            self._rounds.append(fresh)
            self._begin(fresh)

    def _join(self) -> None:
        """Rounds in which nobody is stuck go back into the first of them."""
        first, free = self._rounds[0], self._rounds[1:]
        with first.lock:
            if first.current is not None:
                self._rounds = [*free, first]  # another one may be first
                return
            for one in free:
                with one.lock:
                    if one.current is None:
                        first.members, one.members = (*first.members, *one.members), ()
                if not one.members:
                    one.waiter.wake()
        self._rounds = [one for one in self._rounds if one.members]
