"""The instance manager: all inference replicas of this node, from their registration to the end of their leases.

House rules: a replica lives exactly as long as its lease, and one of the configuration for as long as that names it; two never
share a GPU; what ends a lease (release, TTL, holder, panic, drift) ends the replica, and what is set with it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from powerd.access import Origin, Principal
from powerd.clock import NS
from powerd.config import StaticReplica
from powerd.engine import Engine
from powerd.errors import PowerdError, RequestError
from powerd.governor import Ceiling, State
from powerd.lease import Lease, LeaseEvent
from powerd.model import Control, LeaseEnd, LeaseState
from powerd.policytable import profile_gpu
from powerd.reconcile import site_interval
from powerd.replica import Change, Replica
from powerd.replicacheck import check_replica, static_request
from powerd.replicafile import ReplicaFile
from powerd.replicalease import LEASE_PREFIX, grant, hold
from powerd.replicatypes import ReplicaRequest, ReplicaView
from powerd.sinks.lines import InferenceRow
from powerd.sinks.pools import Pools
from powerd.views import control_why

MAX_REPLICAS = 64
LOG_S = 10.0
_TICK_S = 1.0
_STATIC = Principal(Origin.UNIX, uid=os.geteuid(), user="configuration")
_SUBJECTS = {State.STALE: "replica_stale", State.IDLE: "replica_parked"}


class Replicas:
    """All replicas; ``on_row`` is told how each pool did every ten seconds."""

    def __init__(self, engine: Engine, file: Path) -> None:
        self.pools = Pools()
        self.on_row: Callable[[InferenceRow], None] = lambda row: None
        self._engine, self._file = engine, ReplicaFile(file)
        self._live: dict[str, Replica] = {}  # by lease
        self._found: dict[str, ReplicaRequest] = {}  # by lease: of an earlier powerd, not followed yet
        self._static: dict[str, StaticReplica] = {}  # by lease
        self._refused: dict[str, str] = {}  # names of the configuration that wait, and why
        self._yielded: set[StaticReplica] = set()  # somebody else sets their clocks
        self._logged_ns = engine.clock.now_ns()
        self._config = engine.config.replicas

    # --- life

    def start(self) -> None:
        """Take up the replicas whose leases an earlier powerd left; the clock is theirs again after good pages only."""
        saved = self._file.load()
        for lease in [x for x in self._engine.leases.values() if x.id.startswith(LEASE_PREFIX)]:
            if (request := saved.get(lease.id)) is None:  # one of the configuration, among others: granted anew
                self._engine.book.end(lease, LeaseEvent.REVOKE)
            else:
                hold(self._engine, lease, request, Ceiling(None, "powerd was restarted"))
                self._found[lease.id] = request

    def _take_up(self) -> None:
        """Follow what was found at the start, as soon as the GPUs are known."""
        while self._found and self._engine.node.capabilities:
            lease_id, request = self._found.popitem()
            if (lease := self._engine.leases.get(lease_id)) is None:
                continue
            try:
                self._follow(lease, self._make(request, lease.uid))
            except PowerdError as error:  # the configuration has changed meanwhile
                self._engine.events.add("replica_refused", subject=request.name, detail=str(error), data={"lease": lease_id})
                self._engine.book.end(lease, LeaseEvent.REVOKE)
                self._engine.update()

    async def run(self) -> None:
        """Keep to the configuration and tell how pools do, until cancelled."""
        try:
            while True:
                self.tick()
                await asyncio.sleep(_TICK_S)
        finally:
            for replica in self._live.values():
                replica.stop()

    def tick(self) -> None:
        """One round."""
        self._take_up()
        self._keep_static()
        now_ns = self._engine.clock.now_ns()
        if now_ns - self._logged_ns >= round(LOG_S * NS):
            self._logged_ns = now_ns
            for row in self.pools.rows(self._live.values(), self._engine.clock.wall_ns()):
                self.on_row(row)

    # --- registration

    def register(self, who: Principal, request: ReplicaRequest, watch: Callable[[Lease], None]) -> tuple[Lease, str]:
        """Register a replica: (its lease, the token). PowerdError when it cannot be, and nothing has changed."""
        self._take_up()
        earlier = self._earlier(who, request)
        self._check(request, None if earlier is None else earlier.id)
        if len(self._live) >= MAX_REPLICAS and earlier is None:
            raise RequestError(f"{MAX_REPLICAS} replicas are registered", hint="release some", code="too_many")
        replica = self._make(request, who.uid)
        lease, token = grant(self._engine, who, request, watch)
        if earlier is not None:
            self._engine.book.end(earlier, LeaseEvent.RELEASE)
            self._engine.update()
        self._follow(lease, replica)
        self._tell_registered(lease, request)
        return lease, token

    def _tell_registered(self, lease: Lease, request: ReplicaRequest) -> None:
        data: dict[str, str | int | float | bool | None] = {"pool": request.pool, "tp": request.tp, "lease": lease.id}
        self._engine.events.add("replica_registered", subject=request.name, detail=f"user {lease.user}", data=data)

    def _earlier(self, who: Principal, request: ReplicaRequest) -> Lease | None:
        """The lease of the same user's replica of this name, which the new one replaces."""
        for lease_id, known in self._live.items():
            if known.request.name == request.name:
                lease = self._engine.leases[lease_id]
                if lease_id in self._static or lease.uid != (-1 if who.uid is None else who.uid):
                    whose = "the configuration" if lease_id in self._static else f"user {lease.user}"
                    raise RequestError(f"{request.name!r} is a replica of {whose}", hint="take another name", code="conflict")
                return lease
        return None

    def _check(self, request: ReplicaRequest, instead_of: str | None) -> None:
        for lease_id, known in self._live.items():
            if lease_id != instead_of and (shared := set(known.request.gpus).intersection(request.gpus)):
                what = f"{min(shared)} is of replica {known.request.name!r}"
                raise RequestError(what, hint="one replica a GPU: release the other", code="conflict")

    def _make(self, request: ReplicaRequest, uid: int | None) -> Replica:
        """A replica that is not followed yet; RequestError when it cannot be."""
        engine, config = self._engine, self._engine.config.replicas
        check_replica(request, config.allowed_hosts, config.profile_dir)
        clocks_mhz, remark = self._clocks(request), self._other_gpu(request)
        uid = -1 if uid is None else uid
        return Replica(request, uid, clocks_mhz, engine.clock, config, lambda: engine.node.snapshot, remark)

    def _follow(self, lease: Lease, replica: Replica) -> None:
        replica.lease = lease.id
        replica.on_ceiling, replica.on_change = self._ceiling, self._changed
        self._live[lease.id] = replica
        self._save()
        replica.start()

    def _other_gpu(self, request: ReplicaRequest) -> str:
        """What to remark when the profile is of another kind of GPU than the replica's."""
        if request.profile is None:
            return ""
        kind = profile_gpu(request.profile, self._engine.config.replicas.profile_dir)
        names = {c.gpu.name for uuid in request.gpus if (c := self._engine.node.capabilities.get(uuid)) is not None}
        other = sorted(name for name in names if kind.lower() not in name.lower())
        return f"the profile is of {kind}, the GPU is {other[0]}" if other else ""

    def _clocks(self, request: ReplicaRequest) -> tuple[int, ...]:
        """The SM clocks that all of its GPUs have and that may be set; none where they cannot."""
        common: set[int] | None = None
        for uuid in request.gpus:
            capabilities = self._engine.node.capabilities.get(uuid)
            support = capabilities and capabilities.controls.get(Control.SM_CLOCK)
            clocks = set(capabilities.sm_clocks_mhz) if capabilities is not None and support and support.available else set()
            common = clocks if common is None else common & clocks
        return tuple(sorted(common or ()))

    def _save(self) -> None:
        known = self._found | {lease_id: r.request for lease_id, r in self._live.items() if lease_id not in self._static}
        if (error := self._file.save(known)) is not None:
            self._engine.events.add("replica_file_unwritable", detail=str(error))

    # --- what happens to them

    def lease_changed(self, lease: Lease) -> None:
        """A lease has been granted, has changed its state or has ended."""
        if lease.live or (replica := self._live.pop(lease.id, None)) is None:
            return
        self._leave(replica)
        if (static := self._static.pop(lease.id, None)) is not None and lease.end is LeaseEnd.DRIFT:
            self._yielded.add(static)
        self._save()
        data: dict[str, str | int | float | bool | None] = {"pool": replica.request.pool, "lease": lease.id}
        self._engine.events.add("replica_released", subject=replica.request.name, detail=str(lease.end), data=data)

    def _leave(self, replica: Replica) -> ReplicaRequest:
        replica.stop()
        self.pools.leave(replica)
        return replica.request

    def _ceiling(self, replica: Replica, ceiling: Ceiling) -> None:
        lease = self._engine.leases.get(replica.lease or "")
        if lease is not None:
            hold(self._engine, lease, replica.request, self._within_site(replica.request, ceiling))

    def _within_site(self, request: ReplicaRequest, ceiling: Ceiling) -> Ceiling:
        """A ceiling below the site's own lower bound would be refused: the lowest clock that the site allows, then."""
        site = site_interval(self._engine.config.limits, Control.SM_CLOCK)
        if site is None or ceiling.clock_mhz is None or ceiling.clock_mhz >= site.low:
            return ceiling
        lowest = next((c for c in self._clocks(request) if c >= site.low), None)
        return Ceiling(lowest, f"{ceiling.reason}, raised to the site's limit")

    def _changed(self, replica: Replica, change: Change) -> None:
        kind = _SUBJECTS.get(change.after)
        if change.before is State.STALE:
            kind = "replica_recovered"
        elif change.before is State.STARTING:
            kind = "replica_controlled"
        if kind is not None:
            data: dict[str, str | int | float | bool | None] = {"pool": replica.request.pool, "lease": replica.lease}
            self._engine.events.add(kind, subject=replica.request.name, detail=change.why, data=data)

    # --- the configuration's own

    def apply_config(self) -> None:
        """The configuration was read anew: what it says of replicas holds for all of them, who begin anew."""
        self._yielded.clear()
        self._refused.clear()
        if self._config != (config := self._engine.config.replicas):
            self._config = config
            for lease_id in [x for x in self._live if x not in self._static]:
                self._found[lease_id] = self._leave(self._live.pop(lease_id))
            for lease_id in list(self._static):
                self._engine.book.end(self._engine.leases[lease_id], LeaseEvent.RELEASE)
            self._take_up()
        self._keep_static()

    def _keep_static(self) -> None:
        engine, wanted = self._engine, self._engine.config.replica
        for lease_id, static in list(self._static.items()):
            if static not in wanted:
                engine.book.end(engine.leases[lease_id], LeaseEvent.RELEASE)
                engine.update()
        if engine.panic or not engine.node.capabilities:
            return
        for lease_id in self._static:
            lease = engine.leases[lease_id]
            if lease.expires_ns - engine.clock.now_ns() < lease.ttl_ns // 2:
                engine.heartbeat(lease_id)
        running = set(self._static.values())
        for static in wanted:
            if static in running or static in self._yielded:
                continue
            try:
                self._add_static(static)
                self._refused.pop(static.name, None)
            except PowerdError as error:
                if self._refused.get(static.name) != error.message:
                    self._refused[static.name] = error.message
                    engine.events.add("replica_refused", subject=static.name, detail=str(error))

    def _add_static(self, static: StaticReplica) -> None:
        request = static_request(static)
        if any(known.request.name == request.name for known in self._live.values()):
            raise RequestError(f"{request.name!r} is registered already", code="conflict")
        self._check(request, None)
        replica = self._make(request, _STATIC.uid)
        lease, _ = grant(self._engine, _STATIC, request, lambda lease: None)
        self._static[lease.id] = static
        self._follow(lease, replica)
        data: dict[str, str | int | float | bool | None] = {
            "pool": request.pool,
            "tp": request.tp,
            "lease": lease.id,
            "static": True,
        }
        self._engine.events.add("replica_registered", subject=request.name, data=data)

    # --- what is shown

    def view(self, lease: Lease) -> ReplicaView:
        """One replica as its readers see it."""
        replica = self._live[lease.id]
        held = next((w.high for w in lease.wants if w.control is Control.SM_CLOCK), None)
        reason = replica.governor.ceiling.reason
        why = "" if self._engine.active else control_why(self._engine)
        if why:
            held, reason = None, f"{why} (would be: {reason})"
        elif lease.state is LeaseState.DETACHED:
            reason = "waits for its holder"
        return replica.view(user=lease.user, static=lease.id in self._static, held_mhz=held, reason=reason)

    def views(self, sees: Callable[[Lease], bool]) -> list[ReplicaView]:
        """Those that a caller may see."""
        return [self.view(lease) for lease in self._leases() if sees(lease)]

    def _leases(self) -> Iterable[Lease]:
        return [lease for lease_id in self._live if (lease := self._engine.leases.get(lease_id)) is not None]

    @property
    def live(self) -> list[Replica]:
        """Every replica."""
        return list(self._live.values())
