"""One replica as the daemon follows it: its page is read, its clock decided, its energy counted.

House rules: reading waits for nobody and nobody waits for it; whatever goes wrong here ends in the full clock; energy is the
GPUs' own counters, never an estimate.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from powerd.clock import NS, Clock, seconds
from powerd.config import ReplicasConfig
from powerd.engineload import Figures, LoadWindow, between_edges
from powerd.enginepage import PageError, parse
from powerd.governor import Ceiling, Governor, State
from powerd.log import log
from powerd.model import Health, Snapshot
from powerd.policytable import instance_policy, promise
from powerd.replicatypes import ReplicaRequest, ReplicaView
from powerd.scrape import NoPageError, Reader, source_of

_ALIVE = (Health.UP, Health.SUSPECT)
_IN_A_THREAD = 1 << 18  # characters: parsing more takes longer than a tick may


class Joules:
    """The energy of some GPUs since this began, by their counters; what a restarted counter lost is not made up."""

    def __init__(self, gpus: tuple[str, ...]) -> None:
        self.total_j = 0.0
        self.known = False
        self.power_w: float | None = None
        self.sm_clock_mhz: float | None = None
        self._gpus = gpus
        self._last: dict[str, tuple[int, int]] = {}

    def observe(self, snapshot: Snapshot | None) -> None:
        """Take the newest snapshot."""
        readings = [] if snapshot is None else [r for r in snapshot.readings if r.uuid in self._gpus and r.health in _ALIVE]
        for reading in readings:
            if reading.energy_mj is None:
                continue
            epoch, before = self._last.get(reading.uuid, (reading.epoch, reading.energy_mj))
            if epoch == reading.epoch and reading.energy_mj >= before:
                self.total_j += (reading.energy_mj - before) / 1000
            self._last[reading.uuid] = reading.epoch, reading.energy_mj
            self.known = True
        powers = [r.power_mw for r in readings if r.power_mw is not None]
        clocks = [r.sm_clock_mhz for r in readings if r.sm_clock_mhz is not None]
        self.power_w = sum(powers) / 1000 if len(powers) == len(self._gpus) else None
        self.sm_clock_mhz = sum(clocks) / len(clocks) if clocks else None


@dataclass(frozen=True, slots=True)
class Change:
    """A replica has gone from one state to another."""

    before: State
    after: State
    why: str


class Replica:
    """Follows one replica; ``on_ceiling`` is told what its GPUs shall be held to after every look, ``on_change`` of states."""

    def __init__(
        self, request: ReplicaRequest, uid: int, clocks_mhz: Sequence[int], clock: Clock, config: ReplicasConfig,
        snapshot: Callable[[], Snapshot | None], remark: str = "",
    ) -> None:  # fmt: skip
        self.request = request
        self.lease: str | None = None
        self.figures: Figures | None = None
        self.note = self._remark = remark
        self.joules = Joules(request.gpus)
        self.on_ceiling: Callable[[Replica, Ceiling], None] = lambda replica, ceiling: None
        self.on_change: Callable[[Replica, Change], None] = lambda replica, change: None
        self._clock, self._config, self._snapshot = clock, config, snapshot
        policy = instance_policy(
            request.profile, config.profile_dir, request.tp, promise(request.slo.ttft_s, request.slo.tbt_s), clocks_mhz,
            config.park_after_s, config.scrape_s, request.chunk_tokens, request.slo.classes,
        )  # fmt: skip
        self.governor = Governor(
            policy, request.slo, clocks_mhz, now_s=seconds(clock.now_ns()), stale_s=config.stale_s,
            good_scrapes=config.good_scrapes, park_after_s=config.park_after_s,
        )  # fmt: skip
        self._window = LoadWindow(request.slo, config.window_s)
        # Not in the node's time: a simulated node may run faster than an engine's socket.
        self._reader = Reader(source_of(request.metrics_url, config.allowed_hosts), uid, config.timeout_s * max(1.0, clock.scale))
        self._energy: deque[tuple[int, float]] = deque()
        self._good_ns: int | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow; needs a running loop."""
        self._task = asyncio.create_task(self._follow())

    def stop(self) -> None:
        """Follow no longer."""
        if self._task is not None:
            self._task.cancel()

    async def _follow(self) -> None:
        try:
            while True:
                began_ns = self._clock.now_ns()
                try:
                    await self.look()
                except Exception as error:  # of those who were told; the page's own troubles end in full clock
                    log("replica_failed", replica=self.request.name, why=repr(error))
                left_s = self._config.scrape_s - seconds(self._clock.now_ns() - began_ns)
                await asyncio.sleep(max(left_s, self._config.scrape_s / 10))
        finally:
            await self._reader.close()

    async def look(self) -> None:
        """Read the page once and decide."""
        before, problem = self.governor.state, ""
        try:
            text = await self._reader.read()
            engine = self.request.engine
            page = parse(text, engine) if len(text) <= _IN_A_THREAD else await asyncio.to_thread(parse, text, engine)
            now_ns = self._clock.now_ns()
            if before is State.STALE and self._good_ns is not None and now_ns - self._good_ns > self._config.window_s * NS:
                self._window.clear()
            figures = self._window.add(now_ns, page)
            said = (self._remark, between_edges(page, self.request.slo))
            self._good_ns, self.figures, self.note = now_ns, figures, "; ".join(s for s in said if s)
            ceiling = self.governor.good(seconds(now_ns), figures)
        except NoPageError as error:
            problem = str(error)
            ceiling = self.governor.silent(seconds(self._clock.now_ns()), problem)
        except PageError as error:
            problem = str(error)
            ceiling = self.governor.garbage(problem)
        except Exception as error:
            log("replica_failed", replica=self.request.name, why=repr(error))
            problem = "powerd failed on its page: its log says why"
            ceiling = self.governor.garbage(problem)
        self.note = problem or self.note
        self._count()
        if self.governor.state is not before:
            self.on_change(self, Change(before, self.governor.state, problem or ceiling.reason))
        self.on_ceiling(self, ceiling)

    def _count(self) -> None:
        self.joules.observe(self._snapshot())
        if self.joules.known:
            now_ns = self._clock.now_ns()
            self._energy.append((now_ns, self.joules.total_j))
            while len(self._energy) > 2 and self._energy[1][0] <= now_ns - self._config.window_s * NS:
                self._energy.popleft()

    @property
    def fresh(self) -> bool:
        """Whether its figures are believed."""
        return self.governor.state in (State.FRESH, State.IDLE)

    def view(self, *, user: str, static: bool, held_mhz: int | None, reason: str) -> ReplicaView:
        """As its readers see it; figures only while they are believed."""
        request, energy, note = self.request, self._energy, self.note
        age_s = None if self._good_ns is None else seconds(self._clock.now_ns() - self._good_ns)
        view = ReplicaView(
            id=self.lease or "", name=request.name, pool=request.pool, tp=request.tp, gpus=request.gpus,
            state=self.governor.state.value, clock_mhz=held_mhz, reason=reason, slo=request.slo, age_s=age_s,
            power_w=self.joules.power_w, energy_j=energy[-1][1] - energy[0][1] if len(energy) > 1 else None,
            energy_window_s=seconds(energy[-1][0] - energy[0][0]) if energy else 0.0,
            engine=request.engine, profile=request.profile, user=user, static=static, note=note,
        )  # fmt: skip
        if (figures := self.figures) is None or not self.fresh:
            return view
        page, ttft, tbt = figures.page, figures.ttft, figures.tbt
        return replace(
            view, engine=page.engine, running=page.running, waiting=page.waiting, kv_used_ratio=page.kv_used_ratio,
            within_slo=figures.within_slo, window_s=figures.window_s, requests_per_s=figures.requests_per_s,
            prompt_tokens_per_s=figures.prompt_tokens_per_s, output_tokens_per_s=figures.output_tokens_per_s,
            ttft_p50_s=ttft.p50_s, ttft_p99_s=ttft.p99_s, tbt_p50_s=tbt.p50_s, tbt_p99_s=tbt.p99_s,
            preemptions=figures.preemptions,
        )  # fmt: skip
