"""Turns a fleet of engines into the one that a plan wants, without losing a request, or leaves it as it was.

House rules: start new, wait healthy, into the router, old out of the router, drain, stop, in this order; no engine is told to
end before its successor serves, unless it holds the GPUs that the successor needs; a step that fails undoes the whole change;
what died is started anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from powerd_integrations.fleet.clocks import Clocks
from powerd_integrations.fleet.front import Front
from powerd_integrations.fleet.launcher import Handle, Launcher, NoGpusError
from powerd_integrations.fleet.steps import Event, Phase, Present, after, difference, merged
from powerd_policies.dynamollm import fleet
from powerd_policies.dynamollm.fleet import FleetEvent, FleetPlan, InstanceLoad, InstanceState, InstanceWant

log = logging.getLogger("powerd.fleet")


class StepFailedError(RuntimeError):
    """A step of a change failed; the message says which."""


@dataclass(frozen=True, slots=True)
class Times:
    """How long steps may take, in seconds of the loop's clock."""

    start_s: float = 900.0
    drain_s: float = 600.0
    stop_s: float = 60.0
    probe_s: float = 0.5
    retry_s: float = 10.0  # from the death of a replica to its successor's start, doubled while that fails


@dataclass(slots=True)
class Replica:
    """One engine of the fleet and where it is."""

    id: str
    want: InstanceWant
    handle: Handle
    phase: Phase = Phase.STARTING
    watch: asyncio.Task[None] | None = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    why: str = ""  # it died


@dataclass(frozen=True, slots=True)
class Report:
    """What a change came to."""

    ok: bool
    started: tuple[str, ...]
    stopped: tuple[str, ...]
    seconds: float
    reason: str = ""


class Reconfigurer:
    """Owns the replicas behind one front; ``apply`` one plan after the other."""

    def __init__(
        self, launcher: Launcher, front: Front, *, clocks: Clocks | None = None, times: Times | None = None,
        load: Callable[[Handle], InstanceLoad] | None = None,
    ) -> None:  # fmt: skip
        self.replicas: dict[str, Replica] = {}
        self.events: deque[FleetEvent] = deque(maxlen=1000)
        self.now_s: Callable[[], float] = (
            asyncio.get_running_loop().time
        )  # for events: the controller's time where that is another
        self.died = 0  # replicas that ended without being asked
        self._launcher, self._front, self._clocks, self._times = launcher, front, clocks, times or Times()
        self._load = load
        self._plan = FleetPlan((), {})
        self._routes: Mapping[str, tuple[str, ...]] = {}
        self._lock = asyncio.Lock()
        self._alarm = asyncio.Event()  # a replica died
        self._numbers = itertools.count(1)
        self._repair: asyncio.Task[None] | None = None
        self._change: asyncio.Task[None] | None = None
        self._closing = False

    # -- what is there ---------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> FleetPlan:
        """The plan in force: the last one that was reached."""
        return self._plan

    def states(self) -> tuple[InstanceState, ...]:
        """The fleet as a controller sees it."""
        phases: dict[Phase, fleet.Phase] = {
            Phase.STARTING: "starting", Phase.READY: "starting", Phase.SERVING: "serving",
            Phase.LEAVING: "draining", Phase.STOPPING: "draining",
        }  # fmt: skip
        return tuple(
            InstanceState(
                r.id, r.want.pool, r.want.tp, r.want.clock_mhz, phases[r.phase], r.want.role,
                load=self._load(r.handle) if self._load is not None else self._front.load(r.id),
            )
            for r in self.replicas.values()
        )  # fmt: skip

    def _publish(self, *plans: FleetPlan) -> None:
        """Tell the front what is there, and where requests go by these plans, the first one first; none: as said last."""
        if plans:
            self._routes = functools.reduce(merged, (plan.routes for plan in plans))
        wants = tuple(replace(r.want, id=r.id) for r in self.replicas.values())
        urls = {r.id: r.handle.url for r in self.replicas.values()}
        self._front.update(FleetPlan(wants, self._routes), self.states(), urls)

    def _step(self, replica: Replica, event: Event) -> None:
        replica.phase = after(replica.phase, event)
        log.info("replica %s: %s, now %s", replica.id, event, replica.phase)

    def _note(self, kind: str, subject: str, detail: str) -> None:
        log.info("event=%s subject=%s %s", kind, subject, detail)
        self.events.append(FleetEvent(self.now_s(), kind, subject, detail))

    # -- following a controller ------------------------------------------------------------------------------------------

    async def follow(self, plan: FleetPlan) -> None:
        """Take a controller's newest plan: clocks at once, another shape of the fleet in the background, one change at a time.

        A plan that comes while a change is under way sets clocks only; its shape counts when it is wanted again.
        """
        self.events.extend(plan.events)
        for id_, done in self._front.rescue(plan):
            self._note("emergency", id_, done)
        for want in plan.instances:
            replica = self.replicas.get(want.id or "")
            if replica is None or replica.phase is not Phase.SERVING:
                continue
            lost = self._clocks is not None and not self._clocks.holds(replica.handle)
            if lost or replica.want.clock_mhz != want.clock_mhz:
                replica.want = replace(replica.want, clock_mhz=want.clock_mhz)
                await self._hold(replica)
        if self._change is None or self._change.done():
            self._change = asyncio.get_running_loop().create_task(self._reach(plan))

    async def _reach(self, plan: FleetPlan) -> None:
        report = await self.apply(plan)
        if not report.ok:
            log.warning("the fleet stays as it was: %s", report.reason)

    # -- a change --------------------------------------------------------------------------------------------------------

    async def apply(self, plan: FleetPlan) -> Report:
        """Make the fleet what the plan wants; when a step fails, what it was, and the report says why."""
        async with self._lock:
            return await self._apply(plan)

    async def _apply(self, plan: FleetPlan) -> Report:
        loop = asyncio.get_running_loop()
        begun_s, before = loop.time(), self._plan
        if unknown := {want.tp for want in plan.instances} - set(self._front.tps):
            return Report(False, (), (), 0.0, f"there are no figures for TP{min(unknown)}, only for TP {self._front.tps}")
        present = [Present(r.id, r.want.pool, r.want.tp, r.want.role) for r in self._in(Phase.SERVING)]
        change = difference(plan, present)
        old_wants = {id_: self.replicas[id_].want for id_, _ in change.keep}
        for id_, want in change.keep:
            await self._relabel(self.replicas[id_], want)
        self._publish(plan, before)
        todo, leaving = list(change.start), [self.replicas[id_] for id_ in change.stop]
        started: list[Replica] = []
        stopped: list[Replica] = []
        try:
            while todo:
                batch = self._fitting(todo)
                if not batch:
                    # The old ones hold the GPUs: as many as are needed leave first, and their requests finish before that.
                    makes_room = self._room(leaving, todo[0])
                    stopped += await self._retire(makes_room, started, plan, before)
                    leaving = [r for r in leaving if r not in makes_room]
                    continue
                todo = todo[len(batch) :]
                await self._start(batch, started)
                self._publish(plan, before)
            stopped += await self._retire(leaving, started, plan, before)
        except StepFailedError as error:
            reason = str(error)
            self._note("rollback", "fleet", reason)
            await self._roll_back(before, old_wants, started, leaving, stopped)
            return Report(False, (), (), loop.time() - begun_s, reason)
        self._plan = plan
        self._publish(plan)
        names = tuple(r.id for r in started), tuple(r.id for r in stopped)
        if started or stopped:
            self._note("reconfigured", "fleet", f"started {', '.join(names[0]) or '-'}; stopped {', '.join(names[1]) or '-'}")
        return Report(True, *names, loop.time() - begun_s)

    def _in(self, *phases: Phase) -> list[Replica]:
        return [r for r in self.replicas.values() if r.phase in phases]

    def _fitting(self, todo: Sequence[InstanceWant]) -> list[InstanceWant]:
        free, batch = self._launcher.free(), []
        for want in todo:
            if want.tp > free:
                break
            free -= want.tp
            batch.append(want)
        return batch

    def _room(self, leaving: Sequence[Replica], want: InstanceWant) -> list[Replica]:
        free, chosen = self._launcher.free(), []
        for replica in leaving:
            if free >= want.tp:
                break
            chosen.append(replica)
            free += replica.want.tp
        if free < want.tp:
            raise StepFailedError(f"an instance of TP{want.tp} needs {want.tp} GPUs, {free} can be had")
        return chosen

    async def _relabel(self, replica: Replica, want: InstanceWant) -> None:
        moved = want.clock_mhz != replica.want.clock_mhz
        replica.want = replace(want, id=replica.id)
        if moved:
            await self._hold(replica)

    async def _hold(self, replica: Replica) -> None:
        if self._clocks is not None:
            try:
                await self._clocks.hold(replica.handle, replica.want)
            except Exception as error:  # without it the GPUs run at full clock: that costs watts, no request
                self._note("clock", replica.id, f"its clock is not held: {error}")

    # -- steps -----------------------------------------------------------------------------------------------------------

    async def _start(self, wants: Iterable[InstanceWant], started: list[Replica]) -> None:
        """Start engines and let them serve once all are healthy; StepFailedError when one is not in time."""
        batch: list[Replica] = []
        for want in wants:
            id_ = f"{want.pool}-tp{want.tp}-{next(self._numbers)}"
            try:
                handle = await self._launcher.start(id_, want.tp)
            except (NoGpusError, OSError) as error:
                raise StepFailedError(f"{id_} cannot be started: {error}") from error
            replica = self.replicas[id_] = Replica(id_, replace(want, id=id_), handle)
            replica.watch = asyncio.get_running_loop().create_task(self._watch(replica))
            started.append(replica)
            batch.append(replica)
        await asyncio.gather(*(self._until_healthy(replica) for replica in batch))
        for replica in batch:
            await self._hold(replica)
            if replica.phase is not Phase.READY:
                raise StepFailedError(f"{replica.id} died before it served: {replica.why}")
            self._step(replica, Event.ADMIT)

    async def _until_healthy(self, replica: Replica) -> None:
        try:
            async with asyncio.timeout(self._times.start_s):
                while not await self._front.healthy(replica.handle.url):
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._times.probe_s):
                            await replica.gone.wait()
                    if replica.gone.is_set():
                        raise StepFailedError(f"{replica.id} did not start: {replica.why}")
        except TimeoutError:
            raise StepFailedError(f"{replica.id} was not healthy within {self._times.start_s:g} s") from None
        if replica.phase is Phase.STARTING:
            self._step(replica, Event.HEALTHY)

    async def _retire(self, leaving: Sequence[Replica], successors: Sequence[Replica], plan: FleetPlan, before: FleetPlan,
                      ) -> list[Replica]:  # fmt: skip
        """Take engines out of the router, let their requests finish, stop them; StepFailedError when a successor dies first."""
        for replica in leaving:
            if replica.phase is Phase.SERVING:
                self._step(replica, Event.WITHDRAW)
        self._publish(plan, before)
        await self._unless_successors_die(self._drained(leaving), successors)
        return await self._stop(leaving, Event.DRAINED)

    async def _drained(self, leaving: Sequence[Replica]) -> None:
        try:
            async with asyncio.timeout(self._times.drain_s):
                for replica in leaving:
                    await self._front.empty(replica.id)
        except TimeoutError:
            late = ", ".join(f"{r.id} ({self._front.in_flight(r.id)})" for r in leaving if self._front.in_flight(r.id))
            self._note("drain", "fleet", f"not empty within {self._times.drain_s:g} s, stopped with requests in flight: {late}")

    async def _unless_successors_die(self, waiting: Awaitable[None], successors: Sequence[Replica]) -> None:
        task = asyncio.ensure_future(waiting)
        try:
            while not task.done():
                if dead := [r for r in successors if r.phase is Phase.GONE]:
                    raise StepFailedError(f"{dead[0].id} died while its predecessors drained: {dead[0].why}")
                self._alarm.clear()
                alarm = asyncio.ensure_future(self._alarm.wait())
                await asyncio.wait((task, alarm), return_when=asyncio.FIRST_COMPLETED)
                alarm.cancel()
            await task
        finally:
            task.cancel()

    async def _stop(self, replicas: Sequence[Replica], event: Event) -> list[Replica]:
        """End engines; those that were there to be ended."""
        mine = [r for r in replicas if r.phase is not Phase.GONE]
        for replica in mine:
            self._step(replica, event)
        await asyncio.gather(*(self._end(replica) for replica in mine))
        return mine

    async def _end(self, replica: Replica) -> None:
        await self._launcher.stop(replica.handle, self._times.stop_s)
        await replica.gone.wait()
        if self._clocks is not None:
            try:
                await self._clocks.release(replica.handle)
            except Exception as error:
                self._note("clock", replica.id, f"its clock is not given back: {error}")

    async def _roll_back(
        self, before: FleetPlan, wants: dict[str, InstanceWant], started: Sequence[Replica], leaving: Sequence[Replica],
        stopped: Sequence[Replica],
    ) -> None:  # fmt: skip
        """Make the fleet what it was: who has left the router comes back, who was stopped is started again, who is new goes."""
        for id_, want in wants.items():
            if id_ in self.replicas:
                await self._relabel(self.replicas[id_], want)
        for replica in leaving:
            if replica.phase is Phase.LEAVING:
                self._step(replica, Event.READMIT)
        new = [r for r in started if r.phase is not Phase.GONE]
        serving = [r for r in new if r.phase is Phase.SERVING]
        for replica in serving:
            self._step(replica, Event.WITHDRAW)
        self._publish(before)
        await asyncio.gather(*(self._stop([r], Event.GIVE_UP) for r in new if r not in serving))
        await self._drained(serving)
        await self._stop(serving, Event.DRAINED)
        if stopped:
            try:
                await self._start([replace(r.want, id=None) for r in stopped], [])
            except StepFailedError as error:
                self._note("rollback", "fleet", f"what was stopped cannot be started again: {error}")
                self._repair_later()
        self._publish(before)

    # -- deaths ----------------------------------------------------------------------------------------------------------

    async def _watch(self, replica: Replica) -> None:
        """Follow one engine to its end."""
        how = await self._launcher.ended(replica.handle)
        asked = replica.phase is Phase.STOPPING
        replica.why = how
        self._step(replica, Event.STOPPED if asked else Event.DIED)
        self.replicas.pop(replica.id, None)
        replica.gone.set()
        self._publish()
        if asked or self._closing:
            return
        self.died += 1
        self._note("died", replica.id, how)
        self._alarm.set()
        if self._clocks is not None:
            with contextlib.suppress(Exception):
                await self._clocks.release(replica.handle)
        self._repair_later()

    def _repair_later(self) -> None:
        if not self._closing and (self._repair is None or self._repair.done()):
            self._repair = asyncio.get_running_loop().create_task(self._repairing())

    async def _repairing(self) -> None:
        """Apply the plan in force again until the fleet is what it says."""
        pause_s = self._times.retry_s
        while not self._closing:
            await asyncio.sleep(pause_s)
            async with self._lock:
                if (await self._apply(self._plan)).ok:
                    return
            pause_s = min(16 * self._times.retry_s, 2 * pause_s)

    async def close(self) -> None:
        """Drain and stop everything."""
        self._closing = True
        for task in (self._repair, self._change):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        async with self._lock:
            leaving = self._in(Phase.SERVING)
            for replica in leaving:
                self._step(replica, Event.WITHDRAW)
            self._publish(FleetPlan((), {}))
            await self._drained(leaving)
            await self._stop(self._in(Phase.LEAVING), Event.DRAINED)
            await self._stop(self._in(Phase.STARTING, Phase.READY), Event.GIVE_UP)
