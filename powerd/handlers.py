"""One handler per row of powerd.routes.ROUTES: check permission, ask the engine, encode the answer.

House rules: a handler decides nothing itself; errors are raised, never answered here; a snapshot is encoded once per tick and
view.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from powerd.access import Facts, Origin, View, may_control, may_read_all, view_of
from powerd.api import (
    Ack,
    LeaseChange,
    LeaseRequest,
    NodeView,
    QuiesceRequest,
    WindowBegin,
    WindowView,
)
from powerd.attach import AttachServer
from powerd.call import Call, Handler, Watch, moment, number
from powerd.clock import NS, seconds
from powerd.decode import decode, nearest
from powerd.engine import Engine
from powerd.errors import DeniedError, RequestError, UnavailableError
from powerd.lease import Lease, token_matches
from powerd.model import Event, Reading
from powerd.openapi import document
from powerd.sinks import dcgm
from powerd.sinks.influx import InfluxSink
from powerd.sinks.metrics import Metrics
from powerd.sinks.store import DEFAULT_COLUMNS, Store
from powerd.sinks.whose import show_setpoints
from powerd.sse import MAX_CLIENTS, Hub
from powerd.views import explain_view, lease_view
from powerd.windows import EnergyWindows

_STALE_S = 5.0


class Handlers:
    """What every route does."""

    def __init__(
        self, engine: Engine, hub: Hub, attach: AttachServer, node_view: Callable[[], NodeView],
        windows: EnergyWindows, metrics: Metrics | None, store: Store | None,
    ) -> None:  # fmt: skip
        self.engine, self.node, self.hub, self.attach = engine, engine.node, hub, attach
        self.node_view = node_view
        self.windows, self.metrics_page, self.store = windows, metrics, store
        self.influx: InfluxSink | None = None
        self.counts: list[Callable[[Metrics], None]] = []
        self._window_owner: dict[str, int | None] = {}
        self._document: bytes | None = None
        self._encoded: dict[tuple[Any, ...], bytes] = {}

    # --- permission -----------------------------------------------------------------------------------------------------------

    def _facts(self, call: Call) -> Facts:
        leased: dict[str, set[int]] = {}
        for lease in self.engine.leases.values():
            for gpu in lease.gpus:
                leased.setdefault(gpu, set()).add(lease.uid)
        shown = self.engine.book.by_token(call.token) if call.token else None
        return Facts(
            self.node.processes, self.node.users, {g: frozenset(u) for g, u in leased.items()},
            frozenset(shown.gpus) if shown is not None else frozenset(),
        )  # fmt: skip

    def _views(self, call: Call) -> dict[str, View] | None:
        """The view of every GPU; ``None`` when the caller sees all at full rate."""
        if may_read_all(call.who, call.rules).allowed:
            return None
        facts = self._facts(call)
        snapshot = self.node.snapshot
        known = set(self.node.capabilities) | {r.uuid for r in (snapshot.readings if snapshot else ())}
        return {uuid: view_of(uuid, call.who, call.rules, facts) for uuid in known}

    def _view(self, call: Call, uuid: str) -> View:
        views = self._views(call)
        return View.FULL if views is None else views.get(uuid, View.NONE)

    @staticmethod
    def must_control(call: Call) -> None:
        """DeniedError unless the caller may set every GPU."""
        decision = may_control(call.who, call.rules)
        if not decision.allowed:
            raise DeniedError(f"setting is not permitted: {decision.why}", hint="ask the operator for the group in access.group")

    @staticmethod
    def _must_read_all(call: Call) -> None:
        decision = may_read_all(call.who, call.rules)
        if not decision.allowed:
            raise DeniedError(f"this shows every tenant: {decision.why}", hint="the operator may set access.open_reads = true")

    def _known_gpu(self, uuid: str) -> None:
        if uuid not in self.node.capabilities:
            raise RequestError(
                f"no GPU {uuid[:80]!r} on this node", hint=nearest(uuid, list(self.node.capabilities)), code="unknown_gpu"
            )

    def may_hold(self, call: Call, lease: Lease) -> None:
        """Token, or the right to control: for changing and releasing."""
        if token_matches(lease, call.token) and not call.who.foreign:
            return
        if call.token is not None:
            raise DeniedError(f"not the token of lease {lease.id}")
        self.must_control(call)

    def may_see(self, call: Call, lease: Lease) -> bool:
        """Whether the caller holds this lease or reads everything."""
        mine = call.who.origin is Origin.UNIX and call.who.uid == lease.uid
        return mine or token_matches(lease, call.token) or may_read_all(call.who, call.rules).allowed

    def _sees_event(self, call: Call) -> Callable[[Event], bool]:
        if may_read_all(call.who, call.rules).allowed:
            return lambda event: True

        def sees(event: Event) -> bool:
            if event.uuid is not None:
                return self._view(call, event.uuid) is View.FULL
            if event.kind.startswith(("lease_", "replica_")):
                lease = self.engine.book.get(str(event.data.get("lease") or event.subject or ""))
                return lease is not None and self.may_see(call, lease)
            return True

        return sees

    # --- reading ----------------------------------------------------------------------------------------------------------------

    def _snapshot_bytes(self, views: dict[str, View] | None) -> bytes:
        """The newest snapshot as this caller may see it: encoded once per tick and view, the age filled in now."""
        full, slow = self.node.snapshot, self.node.slow_snapshot
        if full is None or slow is None:
            return b""
        shows_full = views is None or View.FULL in views.values()
        base = full if shows_full else slow
        key = (full.seq, full.time_ns, slow.time_ns, None if views is None else tuple(sorted(views.items())))
        readings = self._encoded.get(key)
        oldest_ns = min((r.time_ns for r in base.readings), default=base.time_ns)
        if readings is None:
            seen: list[Reading] = []
            for reading in full.readings:
                view = View.FULL if views is None else views.get(reading.uuid, View.NONE)
                if view is View.FULL:
                    seen.append(reading)
                elif view is View.SLOW and (quantised := slow.of(reading.uuid)) is not None:
                    seen.append(quantised)
            readings = msgspec.json.encode(seen)
            if any(k[:3] != key[:3] for k in self._encoded):
                self._encoded.clear()
            self._encoded[key] = readings
        age_s = max(0.0, seconds(self.engine.clock.now_ns() - oldest_ns))
        return b'{"seq":%d,"time_ns":%d,"wall_ns":%d,"age_s":%.3f,"simulated":%s,"readings":%s}' % (
            base.seq, base.time_ns, base.wall_ns, age_s, b"true" if self.node.simulated else b"false", readings,
        )  # fmt: skip

    async def healthz(self, call: Call) -> web.Response:
        age_s = self.node.age_s()
        if not self.node.connected:
            raise UnavailableError("powerd-hw is not connected", hint=self.node.hw_problem)
        if age_s is None and not self.node.capabilities:
            return call.answer(Ack(True, "alive; this node has no GPU that powerd can read"))
        if (age_s is None or age_s > _STALE_S) and self.engine.quiesced_until_ns is None:
            raise UnavailableError("no fresh samples", hint="powerctl doctor", code="busy")
        state = "quiesced" if self.engine.quiesced_until_ns is not None else f"sampled {age_s or 0:.1f} s ago"
        # Alive all the same: restarting powerd would not mend somebody else's server.
        if self.influx is not None and not (stats := self.influx.stats()).up:
            state += f"; InfluxDB does not take points, {stats.spool_points} wait ({stats.problem})"
        return call.answer(Ack(True, state))

    async def metrics(self, call: Call) -> web.Response:
        self._must_read_all(call)
        if self.metrics_page is None:
            raise RequestError("metrics are off", hint="set enabled = true in [metrics]", code="not_found")
        counts: dict[Any, int] = {}
        for lease in self.engine.leases.values():
            counts[lease.state] = counts.get(lease.state, 0) + 1
        self.metrics_page.leases(counts)
        self.metrics_page.plans(len(self.engine.plans), self.engine.plans.beats, self.engine.plans.switches)
        self.metrics_page.gpus(self.node.capabilities.values())
        holders = {lease.id: lease.user for lease in self.engine.leases.values() if lease.live}
        show_setpoints(self.metrics_page, self.engine.setpoints.current.values(), holders)
        view = self.node_view()
        for name, value in (
            ("powerd_hw_connected", view.hw_connected), ("powerd_control_enabled", view.control), ("powerd_panic", view.panic),
            ("powerd_config_last_reload_successful", view.config_reload_ok), ("powerd_energy_windows_open", len(self.windows)),
        ):  # fmt: skip
            self.metrics_page.set(name, value)
        for count in self.counts:
            count(self.metrics_page)
        if self.store is not None:
            stats = self.store.stats()
            self.metrics_page.store(stats.rows, stats.dropped, stats.errors, stats.size_bytes)
        if self.influx is not None:
            self.metrics_page.influx(self.influx.stats())
        accept = call.request.headers.get("Accept", "")
        body, media = self.metrics_page.render(accept, self.engine.clock.now_ns())
        return web.Response(body=body, headers={**call.headers, "Content-Type": media})

    async def dcgm(self, call: Call) -> web.Response:
        self._must_read_all(call)
        config = self.engine.config.metrics
        if not (config.enabled and config.dcgm):
            raise RequestError("dcgm-exporter's names are off", hint="set dcgm = true in [metrics]", code="not_found")
        text = dcgm.page(self.node.snapshot, self.node.capabilities, socket.gethostname())
        return web.Response(body=text.encode(), headers={**call.headers, "Content-Type": dcgm.CONTENT_TYPE})

    async def openapi(self, call: Call) -> web.Response:
        if self._document is None:
            self._document = msgspec.json.encode(document())
        return call.raw(self._document)

    async def node_info(self, call: Call) -> web.Response:
        call.query()
        return call.answer(self.node_view())

    async def snapshot(self, call: Call) -> web.Response:
        call.query()
        body = self._snapshot_bytes(self._views(call))
        if not body:
            raise UnavailableError("there is no sample yet", hint=self.node.hw_problem or "try again", code="busy")
        return call.raw(body)

    async def stream(self, call: Call) -> web.StreamResponse:
        query = call.query("hz", "events")
        if len(self.hub) >= MAX_CLIENTS:
            raise RequestError(f"{MAX_CLIENTS} streams are open", hint="close some", code="too_many")
        highest = max(1.0, self.node.sample_hz)
        hz = min(number(query, "hz", 1.0, 0.001, 1000), highest)
        if query.get("events") not in (None, "0", "1"):
            raise RequestError("events: 0 or 1", code="bad_value")
        after = call.request.headers.get("Last-Event-ID", "")
        snapshot = None if query.get("events") == "1" else lambda: self._snapshot_bytes(self._views(call))
        return await self.hub.serve(
            call.request, call.headers, snapshot, self._sees_event(call), 1 / hz, int(after) if after.isdecimal() else None
        )

    async def explain(self, call: Call) -> web.Response:
        uuid = call.request.match_info["uuid"]
        view = self._view(call, uuid)
        if view is View.NONE:
            if may_read_all(call.who, call.rules).allowed:
                self._known_gpu(uuid)
            raise DeniedError("this GPU is not yours", hint="run a process on it, hold a lease, or ask for access.open_reads")
        self._known_gpu(uuid)
        source = self.node.snapshot if view is View.FULL else self.node.slow_snapshot
        reading = source.of(uuid) if source is not None else None
        visible = [x for x in self.engine.leases.values() if self.may_see(call, x)]
        return call.answer(explain_view(self.engine, uuid, reading, visible))

    async def events(self, call: Call) -> web.Response:
        query = call.query("since", "limit")
        since = int(number(query, "since", 0, 0, 2**53))
        limit = int(number(query, "limit", 100, 1, 1000))
        sees = self._sees_event(call)
        return call.answer([e for e in self.engine.events.since(since) if sees(e)][-limit:])

    async def history(self, call: Call) -> web.Response:
        query = call.query("gpu", "since", "until", "points", "columns")
        self._must_read_all(call)  # yesterday's GPU was somebody else's
        if self.store is None:
            raise RequestError("the store is off", hint="set enabled = true in [store]", code="not_found")
        gpus = call.request.query.getall("gpu", []) or list(self.node.capabilities)
        for uuid in gpus:
            self._known_gpu(uuid)
        now_s = self.engine.clock.wall_ns() / NS
        since_s = moment(query.get("since", "15m"), now_s)
        until_s = moment(query["until"], now_s) if "until" in query else now_s
        points = int(number(query, "points", 500, 1, 1e9))
        columns = [c for c in query.get("columns", "").split(",") if c] or list(DEFAULT_COLUMNS)
        view = await asyncio.to_thread(self.store.history, gpus, since_s, until_s, points, columns)
        return call.answer(view)

    # --- leases -----------------------------------------------------------------------------------------------------------------

    async def body(self, call: Call, kind: type[Any]) -> Any:
        """The request's body as this type."""
        try:
            return decode(await call.request.read(), kind)
        except web.HTTPRequestEntityTooLarge as error:
            raise RequestError(
                f"the body is larger than {error.max_size if hasattr(error, 'max_size') else 65536} bytes"
            ) from error

    async def leases(self, call: Call) -> web.Response:
        call.query()
        return call.answer([lease_view(self.engine, x) for x in self.engine.leases.values() if self.may_see(call, x)])

    async def lease_create(self, call: Call) -> web.Response:
        self.must_control(call)
        request: LeaseRequest = await self.body(call, LeaseRequest)
        pidfd = None
        if not request.detached and not request.dry_run:
            if call.who.origin is not Origin.UNIX:
                raise RequestError("over TCP only detached leases", hint='send "detached": true and heartbeats', code="bad_value")
            if (pidfd := call.pidfd()) is None:
                raise DeniedError("the process that connected cannot be watched", hint="ask for a detached lease")
        watch = Watch(self.attach, pidfd)
        try:
            lease, token, outcomes = await self.engine.acquire(call.who, request, watch)
        finally:
            watch.close()
        return call.answer(lease_view(self.engine, lease, outcomes=outcomes, token=token, dry_run=request.dry_run))

    def visible(self, call: Call) -> Lease:
        """The lease in the path, if the caller may see it."""
        lease = self.engine.book.find(call.request.match_info["id"])
        if not self.may_see(call, lease):
            raise RequestError(f"no lease {lease.id!r}", hint="powerctl lease list", code="not_found")
        return lease

    async def lease(self, call: Call) -> web.Response:
        return call.answer(lease_view(self.engine, self.visible(call)))

    async def lease_change(self, call: Call) -> web.Response:
        lease = self.visible(call)
        self.may_hold(call, lease)
        request: LeaseChange = await self.body(call, LeaseChange)
        lease, outcomes = await self.engine.change(lease.id, request)
        self.engine.plans.lease_changed(lease)
        return call.answer(lease_view(self.engine, lease, outcomes=outcomes))

    async def lease_heartbeat(self, call: Call) -> web.Response:
        lease = self.visible(call)
        self.may_hold(call, lease)
        return call.answer(lease_view(self.engine, self.engine.heartbeat(lease.id)))

    async def lease_release(self, call: Call) -> web.Response:
        lease = self.visible(call)
        self.may_hold(call, lease)
        lease, outcomes = await self.engine.release(lease.id)
        return call.answer(lease_view(self.engine, lease, outcomes=outcomes))

    # --- energy windows ----------------------------------------------------

    async def window_begin(self, call: Call) -> web.Response:
        request: WindowBegin = await self.body(call, WindowBegin)
        for uuid in request.gpus:
            self._known_gpu(uuid)
            if self._view(call, uuid) is not View.FULL:
                raise DeniedError(f"no energy windows on {uuid}", hint="run a process on it or hold a lease")
        view = self.windows.begin(request.gpus, request.name, request.job)
        self._window_owner[view.id] = call.who.uid
        return call.answer(view)

    async def window_end(self, call: Call) -> web.Response:
        query = call.query("wait")
        if query.get("wait") not in (None, "0", "1"):
            raise RequestError("wait: 0 or 1", code="bad_value")
        window_id = call.request.match_info["id"]
        owner = self._window_owner.get(window_id)
        if owner != call.who.uid and not may_control(call.who, call.rules).allowed:
            raise RequestError(f"no open energy window {window_id[:40]!r}", hint="begin one", code="not_found")
        self._window_owner.pop(window_id, None)
        view: WindowView = await self.windows.end(window_id, query.get("wait") != "0")
        return call.answer(view)

    # --- panic, quiesce, resume ----------------------------------------------

    async def panic(self, call: Call) -> web.Response:
        self.must_control(call)
        self.engine.enter_panic(f"asked by {call.who.user or call.who.origin.value}")
        return call.answer(Ack(True, "every GPU goes to baseline; powerctl resume ends this"))

    async def quiesce(self, call: Call) -> web.Response:
        self.must_control(call)
        request: QuiesceRequest = await self.body(call, QuiesceRequest)
        self.engine.quiesce(request.max_s, request.reason)
        return call.answer(Ack(True, f"NVML handles are being closed; resumes by itself after {request.max_s:g} s"))

    async def resume(self, call: Call) -> web.Response:
        self.must_control(call)
        return call.answer(Ack(True, self.engine.resume(f"asked by {call.who.user or call.who.origin.value}")))

    def table(self) -> dict[str, Handler]:
        """Route name -> handler."""
        return {
            "healthz": self.healthz, "metrics": self.metrics, "dcgm": self.dcgm, "openapi": self.openapi, "node": self.node_info,
            "snapshot": self.snapshot, "stream": self.stream, "leases": self.leases, "lease_create": self.lease_create,
            "lease": self.lease, "lease_change": self.lease_change, "lease_heartbeat": self.lease_heartbeat,
            "lease_release": self.lease_release, "explain": self.explain, "window_begin": self.window_begin,
            "window_end": self.window_end, "history": self.history, "events": self.events, "panic": self.panic,
            "quiesce": self.quiesce, "resume": self.resume,
        }  # fmt: skip
