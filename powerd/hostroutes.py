"""The routes about the host and about leases that were.

House rules: as powerd.handlers, whose permissions hold here too.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from aiohttp import web

from powerd.access import may_read_all
from powerd.call import Call, Handler, moment, number
from powerd.clock import NS, standing
from powerd.errors import RequestError
from powerd.handlers import Handlers
from powerd.hostcontext import HostContext
from powerd.sinks.metrics import Metrics
from powerd.sinks.store import Store


class HostRoutes:
    """What every route of this kind does."""

    def __init__(self, handlers: Handlers, host: HostContext) -> None:
        self.handlers, self.host = handlers, host

    async def node_load(self, call: Call) -> web.Response:
        call.query()
        load = self.host.load or self.host.read(self.handlers.engine.clock.wall_ns())
        if may_read_all(call.who, call.rules).allowed:
            load = replace(load, processes=self.host.processes(self.handlers.node.processes))
        return call.answer(load)

    async def history_node(self, call: Call) -> web.Response:
        query = call.query("since", "until", "points")
        store, since_s, until_s = self._range(call, query, "15m")
        points = int(number(query, "points", 500, 1, 10_000))
        with standing(self.handlers.engine.clock):
            return call.answer(await asyncio.to_thread(store.loads, since_s, until_s, points))

    def _range(self, call: Call, query: dict[str, str], default: str) -> tuple[Store, float, float]:
        """The store and the time that is asked for; refused to who may not read everything."""
        self.handlers._must_read_all(call)
        if self.handlers.store is None:
            raise RequestError("the store is off", hint="set enabled = true in [store]", code="not_found")
        now_s = self.handlers.engine.clock.wall_ns() / NS
        since_s = moment(query.get("since", default), now_s)
        return self.handlers.store, since_s, moment(query["until"], now_s) if "until" in query else now_s + 1

    async def history_leases(self, call: Call) -> web.Response:
        query = call.query("since", "until", "limit")
        store, since_s, until_s = self._range(call, query, "24h")  # a lease tells who ran what, and why
        limit = int(number(query, "limit", 1000, 1, 10_000))
        with standing(self.handlers.engine.clock):
            return call.answer(await asyncio.to_thread(store.leases, since_s, until_s, limit))

    def count(self, metrics: Metrics) -> None:
        """What the Prometheus page says of the host."""
        if (load := self.host.load) is not None:
            metrics.host(load)
        metrics.host_energy(self.handlers.node.host_energy_uj)

    def table(self) -> dict[str, Handler]:
        """Route name -> handler."""
        return {"node_load": self.node_load, "history_node": self.history_node, "history_leases": self.history_leases}
