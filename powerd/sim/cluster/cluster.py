"""A fleet that is simulated: takes plans, lets time pass, says what it sees and, at the end, what everything cost.

House rules: a plan is the whole desired fleet and is refused whole, before anything changes; what a controller is told is what an
engine's metrics and a load balancer could tell it, never the future; two runs of the same input give the same bytes.
"""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

import numpy as np

from powerd.sim.cluster import core
from powerd.sim.cluster.gpubook import GpuBook, Member
from powerd.sim.cluster.inputs import ClusterConfig, Floats, Requests
from powerd.sim.cluster.plancheck import check
from powerd.sim.cluster.results import Results
from powerd_policies.dynamollm.classes import NAMES, Classes
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import (
    ClassLoad,
    FleetEvent,
    FleetPlan,
    FleetState,
    InstanceLoad,
    InstanceState,
    InstanceWant,
)


class Cluster:
    """``gpus`` GPUs that serve ``requests``; see the package for the rules. ``seed`` names the run, nothing is drawn."""

    def __init__(
        self,
        model: EngineModel,
        requests: Requests,
        classes: Classes | None = None,
        config: ClusterConfig | None = None,
        gpus: int = 96,
        seed: int = 0,
    ) -> None:
        self.model, self.requests, self.gpus, self.seed = model, requests, gpus, seed
        self.classes, self.config = classes or Classes(), config or ClusterConfig()
        if gpus < 1:
            raise ValueError(f"cluster: {gpus} GPUs, at least 1 is needed")
        if len(requests) and requests.arrival_s[0] < self.config.begin_s:
            raise ValueError(f"cluster: the first request comes at {requests.arrival_s[0]:g} s, before {self.config.begin_s:g} s")
        park_mhz = self.config.park_clock_mhz
        if park_mhz is not None and (lacking := [tp for tp in model.tps if (tp, park_mhz) not in model.table]):
            raise ValueError(f"cluster: park_clock_mhz {park_mhz}, which the model does not hold for TP{lacking[0]}")
        self._library = core.load()
        self._coefficients = {
            key: core.CoreCoefficients(
                at.prefill_fixed_s, at.prefill_token_s, at.decode_fixed_s, at.decode_request_s,
                at.prefill_w, at.decode_w, at.decode_log2_w, at.idle_w,
            )
            for key, at in model.table.items()
        }  # fmt: skip
        count = len(requests)
        self._arrival_ns = np.floor(requests.arrival_s * 1e9 + 0.5).astype(np.int64)
        self._predicted = requests.output_tokens if requests.predicted_tokens is None else requests.predicted_tokens
        self._ttft_s, self._tbt_s, self._finish_s = (np.full(count, np.nan) for _ in range(3))
        self._energy_j, self._rejected = np.zeros(count), np.zeros(count, dtype=np.uint8)
        self._instance = np.full(count, -1, dtype=np.int32)
        self._core: int | None = self._make()
        self._book = GpuBook(gpus, self._hold)
        self._members: dict[str, Member] = {}
        self._names: list[str] = []
        self._known: set[str] = set()
        self._order: list[Member] = []
        self._routes: dict[str, tuple[str, ...]] = {}
        self._routed: object = None
        self._plans = 0
        self._events: list[FleetEvent] = []
        self._counts: Counter[str] = Counter()
        self._seen_s, self._seen_j = self.config.begin_s, 0.0
        self._results: Results | None = None

    def _make(self) -> int:
        config, limits = self.config, self.classes
        slos = (ctypes.c_int64 * 9)(*(core.to_ns(limits.slos[name].ttft_s) for name in NAMES))
        in_ns = {
            "park_after_ns": core.NEVER if config.park_after_s is None else core.to_ns(config.park_after_s),
            "drain_limit_ns": core.NEVER if config.drain_limit_s is None else core.to_ns(config.drain_limit_s),
            **{
                f"{name}_ns": core.to_ns(getattr(config, f"{name}_s"))
                for name in ("clock_set", "wake", "tick", "recent", "begin")
            },
        }
        common = core.CoreConfig(
            max_running=config.max_running, context_limit=limits.context_limit,
            ttft_slo_ns=slos, **in_ns, move_fixed_s=config.links.fixed_s,
            move_token_bytes=config.links.bytes_per_token, move_bytes_per_s=config.links.bytes_per_s,
        )  # fmt: skip
        arrays = (
            self._arrival_ns, self.requests.prompt_tokens, self.requests.output_tokens, self._predicted,
            self.requests.routed_class, self._ttft_s, self._tbt_s, self._finish_s, self._energy_j, self._rejected, self._instance,
        )  # fmt: skip
        given = core.CoreRequests(len(self.requests), *(array.ctypes.data for array in arrays))
        made = self._library.cluster_new(ctypes.byref(common), ctypes.byref(given))
        if not made:
            raise MemoryError("no memory for the core of the cluster simulator")
        return int(made)

    def __del__(self) -> None:
        if getattr(self, "_core", None):
            self._library.cluster_free(self._core)
            self._core = None

    @property
    def now_s(self) -> float:
        """The time that the simulation has reached."""
        return int(self._library.cluster_now(self._core)) / 1e9

    @property
    def end_s(self) -> float:
        """When a run ends: the horizon after the last arrival, in whole nanoseconds, so that ``now_s`` reaches it."""
        last_s = float(self.requests.arrival_s[-1]) if len(self.requests) else self.config.begin_s
        return core.to_ns(last_s + self.config.horizon_s) / 1e9

    def apply(self, plan: FleetPlan) -> tuple[FleetEvent, ...]:
        """Make the fleet what the plan says, as fast as that goes; return what happened since the last plan.

        New instances whose GPUs are still drained wait for them (in ``state`` as starting, without ``ready_s``). Raises
        ``PlanError`` for a plan that cannot be carried out and ``RuntimeError`` after ``results``; nothing is changed then.
        """
        self._check_open()
        check(plan, self.model, self.gpus, self._known, {m.id: (m.tp, m.role) for m in self._members.values()})
        group, now_ns = self._plans, int(self._library.cluster_now(self._core))
        self._plans += 1
        named = {want.id for want in plan.instances if want.id is not None}
        credit = self._drain([m for m in self._members.values() if m.id not in named], group)
        self._order = []
        for want in plan.instances:
            if want.id is None:
                warm = credit >= want.tp
                credit -= want.tp if warm else 0
                self._order.append(self._add(want, group if warm else None))
            elif want.id in self._members:
                self._order.append(self._change(self._members[want.id], want))
            else:
                self._tell("gone", want.id, "it has ended and is not started again")
        self._reap(now_ns)
        self._routes = dict(plan.routes)
        warm_begin = self.config.warm_begin and group == 0
        self._begin_waiting(now_ns, warm_begin=warm_begin)
        self._route()
        if warm_begin:  # they need no time to start
            self._library.cluster_advance(self._core, now_ns)
        self._library.cluster_place_waiting(self._core)
        self._rescue(plan)
        self._check_memory()
        events, self._events = tuple(self._events), []
        return events

    def advance(self, until_s: float) -> None:
        """Simulate up to and with ``until_s``; raises ``ValueError`` for a time that has passed."""
        self._check_open()
        until_ns = core.to_ns(until_s)
        if until_ns < self._library.cluster_now(self._core):
            raise ValueError(f"cluster: it is {self.now_s:g} s, {until_s:g} s has passed")
        while self._library.cluster_advance(self._core, until_ns) == 1:
            now_ns = int(self._library.cluster_now(self._core))
            self._reap(now_ns)
            if self._book.waiting:
                self._begin_waiting(now_ns)
            self._route()
        self._check_memory()

    def state(self) -> FleetState:
        """Return the fleet as it can be observed now, with arrivals since the last call, by predicted class."""
        self._check_open()
        now_s = self.now_s
        window_s = now_s - self._seen_s
        instances = tuple(self._instance_state(member, window_s) for member in self._members.values())
        self._book.settle_all(int(self._library.cluster_now(self._core)))
        table = np.zeros((len(NAMES), 3), dtype=np.int64)
        self._library.cluster_arrivals(self._core, table.ctypes.data)
        arrivals = {name: ClassLoad(*row) for name, row in zip(NAMES, table.tolist(), strict=True)}
        total_j = self._totals().energy_j
        power_w = (total_j - self._seen_j) / window_s if window_s > 0 else None
        self._seen_s, self._seen_j = now_s, total_j
        return FleetState(now_s, window_s, instances, arrivals, self.gpus, power_w)

    def results(self) -> Results:
        """Return what the run did up to now. It ends the run: afterwards only this can be called."""
        if self._results is not None:
            return self._results
        now_ns = int(self._library.cluster_now(self._core))
        self._book.settle_all(now_ns)
        self._library.cluster_close(self._core)
        self._check_memory()
        totals = self._totals()
        power, gpus, span_s = self._series(now_ns - core.to_ns(self.config.begin_s))
        counts = {name: int(getattr(totals, name)) for name in core.COUNTS}
        rejected = self._rejected.astype(np.bool_)
        counts |= {"rejected": int(rejected.sum()), "starts": 0, "reshards": 0, "stops": 0, **self._counts}
        counts["unfinished"] = len(self.requests) - counts["finished"] - counts["rejected"]
        self._results = Results(
            self.config.begin_s, now_ns / 1e9, self._ttft_s, self._tbt_s, self._finish_s, self._energy_j, rejected,
            self._instance, tuple(self._names), totals.energy_j, totals.idle_j, totals.gpu_s,
            self.gpus * (now_ns / 1e9 - self.config.begin_s) - totals.gpu_s, self.model.off_w,
            self.config.tick_s, power / span_s, gpus / span_s, counts,
        )  # fmt: skip
        return self._results

    def _series(self, lasted_ns: int) -> tuple[Floats, Floats, Floats]:
        """Joules, GPU seconds and seconds of each tick, the last one as far as it went."""
        tick_ns = core.to_ns(self.config.tick_s)
        ticks = -(-lasted_ns // tick_ns)
        joules, gpu_s, span_s = np.zeros(ticks), np.zeros(ticks), np.full(ticks, tick_ns / 1e9)
        self._library.cluster_power(self._core, ticks, joules.ctypes.data, gpu_s.ctypes.data)
        if ticks:
            span_s[-1] = (lasted_ns - (ticks - 1) * tick_ns) / 1e9
        return joules, gpu_s, span_s

    # ---- plans ----

    def _drain(self, members: Iterable[Member], group: int) -> int:
        """Take members out of the fleet; return the GPUs of those that held the weights until now."""
        credit = 0
        for member in list(members):
            if member.slot is None:
                self._book.forget(member, int(self._library.cluster_now(self._core)))
                del self._members[member.id]
                self._tell("cancel", member.id, "it was waiting for GPUs")
            elif not member.draining:
                if self._library.cluster_phase(self._core, member.slot) == core.SERVING:
                    credit += member.tp
                    member.group = group
                else:
                    member.group = None
                member.draining = True
                self._library.cluster_drain(self._core, member.slot)
                self._tell("drain", member.id)
        return credit

    def _add(self, want: InstanceWant, group: int | None) -> Member:
        serial = len(self._names)
        member = Member(f"{want.pool}-{serial}", serial, want.pool, want.tp, want.clock_mhz, want.role, group=group)
        self._names.append(member.id)
        self._known.add(member.id)
        self._members[member.id] = member
        self._book.waiting.append(member)
        return member

    def _change(self, member: Member, want: InstanceWant) -> Member:
        member.pool = want.pool
        if member.draining and member.slot is not None:
            member.draining, member.group = False, None
            self._library.cluster_keep(self._core, member.slot)
            self._tell("keep", member.id, "it was draining")
        if member.clock_mhz != want.clock_mhz:
            member.clock_mhz = want.clock_mhz
            if member.slot is not None:
                at = self._coefficients[member.tp, member.clock_mhz]
                self._library.cluster_set_clock(self._core, member.slot, ctypes.byref(at))
        return member

    def _begin_waiting(self, now_ns: int, *, warm_begin: bool = False) -> None:
        def donors(group: int) -> bool:
            return any(member.draining and member.group == group for member in self._members.values())

        for member, warm in self._book.startable(now_ns, donors):
            takes_s = 0.0 if warm_begin else self.config.reshard_s if warm else self.config.start_s
            park_mhz = self.config.park_clock_mhz or min(self.model.clocks_mhz(member.tp))
            parked = self.model.table[member.tp, park_mhz]
            ready_ns = now_ns + core.to_ns(takes_s)
            at = self._coefficients[member.tp, member.clock_mhz]
            slot = self._library.cluster_begin(
                self._core,
                member.serial,
                member.tp,
                core.ROLES[member.role],
                self.model.kv_tokens[member.tp],
                self.config.chunk_of(member.tp),
                ctypes.byref(at),
                parked.idle_w,
                ready_ns,
            )
            if slot < 0:
                raise MemoryError("no memory for another instance")
            member.slot, member.ready_s, member.group = slot, ready_ns / 1e9, None
            self._counts["reshards" if warm else "starts"] += 1
            self._tell("reshard" if warm else "start", member.id, f"TP{member.tp} in {takes_s:g} s")

    def _reap(self, now_ns: int) -> None:
        """Take note of drained instances that have ended."""
        for member in [m for m in self._members.values() if m.draining]:
            if member.slot is None or self._library.cluster_phase(self._core, member.slot) != core.STOPPED:
                continue
            self._library.cluster_release(self._core, member.slot)
            del self._members[member.id]
            self._book.give_back(member, now_ns, self.model.table[member.tp, member.clock_mhz].idle_w)
            self._counts["stops"] += 1
            self._tell("stop", member.id)

    def _route(self) -> None:
        placed = [(member.pool, member.slot, member.role) for member in self._order if member.slot is not None]
        if (placed, self._routes) == self._routed:
            return
        self._routed = (placed, self._routes)
        self._route_moves()
        serving = [(pool, slot) for pool, slot, role in placed if role != "decode"]
        for index, name in enumerate(NAMES):
            pools = [[slot for pool, slot in serving if pool == wanted] for wanted in self._routes.get(name, ())]
            slots = np.asarray([slot for pool in pools for slot in pool], dtype=np.int32)
            ends = np.asarray(list(accumulate(len(pool) for pool in pools)), dtype=np.int32)
            if self._library.cluster_route(self._core, index, len(ends), ends.ctypes.data, len(slots), slots.ctypes.data):
                raise MemoryError("no memory for the routes")

    def _route_moves(self) -> None:
        """Tell the core which instances only decode, and every instance's pool: KV caches move within one."""
        pools = {pool: number for number, pool in enumerate(dict.fromkeys(member.pool for member in self._members.values()))}
        for member in self._members.values():
            if member.slot is not None:
                self._library.cluster_pool(self._core, member.slot, pools[member.pool])
        slots = [member.slot for member in self._order if member.role == "decode" and member.slot is not None]
        decodes = np.asarray(slots, dtype=np.int32)
        if self._library.cluster_decodes(self._core, len(slots), decodes.ctypes.data):
            raise MemoryError("no memory for the routes")

    def _rescue(self, plan: FleetPlan) -> None:
        """Do what the plan asks of queues: reject, send elsewhere, order."""
        for name, age_s in plan.shed.items():
            member = self._members.get(name)
            if member is not None and member.slot is not None:
                gone = int(self._library.cluster_shed(self._core, member.slot, core.to_ns(age_s)))
                if gone:
                    self._tell("shed", name, f"{gone} requests that waited longer than {age_s:g} s")
        for name in sorted(plan.resteered):
            member = self._members.get(name)
            if member is not None and member.slot is not None:
                self._library.cluster_resteer(self._core, member.slot)
        for member in self._members.values():
            if member.slot is not None:
                self._library.cluster_reorder(self._core, member.slot, member.id in plan.reordered)

    # ---- what is seen ----

    def _instance_state(self, member: Member, window_s: float) -> InstanceState:
        phase = 0 if member.slot is None else self._library.cluster_phase(self._core, member.slot)
        if member.slot is None or phase == core.STARTING:
            if member.slot is not None:
                self._observe(member.slot)  # counts what it drew so far
            return InstanceState(member.id, member.pool, member.tp, member.clock_mhz, "starting", member.role, member.ready_s)
        seen = self._observe(member.slot)
        load = InstanceLoad(
            seen.running, seen.queued, seen.queued_prompt_tokens, seen.kv_used_ratio, seen.oldest_wait_s,
            seen.requests / window_s if window_s > 0 else None,
            seen.prompt_tokens / window_s if window_s > 0 else None,
            seen.output_tokens / window_s if window_s > 0 else None,
            None if math.isnan(seen.ttft_p99_s) else seen.ttft_p99_s,
            None if math.isnan(seen.tbt_p99_s) else seen.tbt_p99_s,
        )  # fmt: skip
        return InstanceState(
            member.id, member.pool, member.tp, member.clock_mhz,
            "draining" if phase == core.DRAINING else "serving", member.role, load=load,
        )  # fmt: skip

    def _observe(self, slot: int) -> core.CoreObservation:
        seen = core.CoreObservation()
        self._library.cluster_observe(self._core, slot, ctypes.byref(seen))
        return seen

    def _totals(self) -> core.CoreTotals:
        totals = core.CoreTotals()
        self._library.cluster_totals(self._core, ctypes.byref(totals))
        return totals

    def _hold(self, gpus: int, from_ns: int, until_ns: int, idle_w: float) -> None:
        self._library.cluster_hold(self._core, gpus, from_ns, until_ns, idle_w)

    def _tell(self, kind: str, subject: str, detail: str = "") -> None:
        self._events.append(FleetEvent(self.now_s, kind, subject, detail))

    def _check_open(self) -> None:
        if self._results is not None:
            raise RuntimeError("cluster: the run is over, results() has been called")

    def _check_memory(self) -> None:
        if self._library.cluster_failed(self._core):
            raise MemoryError("the core of the cluster simulator ran out of memory; its results are not whole")
