"""The routes of inference replicas: check permission, ask the manager, answer.

House rules: as powerd.handlers; who may hold a lease may register a replica, and sees it as its lease is seen.
"""

from __future__ import annotations

from aiohttp import web

from powerd.access import Origin
from powerd.call import Call, Handler, Watch
from powerd.errors import DeniedError, RequestError
from powerd.handlers import Handlers
from powerd.replicas import Replicas
from powerd.replicatypes import ReplicaGrant, ReplicaRequest
from powerd.sinks.metrics import Metrics
from powerd.views import lease_view


class ReplicaRoutes:
    """What the routes at ``/v1/replicas`` do."""

    def __init__(self, handlers: Handlers, replicas: Replicas) -> None:
        self._handlers, self._replicas = handlers, replicas

    async def replicas(self, call: Call) -> web.Response:
        call.query()
        return call.answer(self._replicas.views(lambda lease: self._handlers.may_see(call, lease)))

    async def create(self, call: Call) -> web.Response:
        call.query()
        self._handlers.must_control(call)
        request: ReplicaRequest = await self._handlers.body(call, ReplicaRequest)
        pidfd = None
        if not request.detached:
            if call.who.origin is not Origin.UNIX:
                raise RequestError("over TCP only detached", hint='send "detached": true and heartbeats', code="bad_value")
            if (pidfd := call.pidfd()) is None:
                raise DeniedError("the process that connected cannot be watched", hint="ask for a detached one")
        watch = Watch(self._handlers.attach, pidfd)
        try:
            lease, token = self._replicas.register(call.who, request, watch)
        finally:
            watch.close()
        engine = self._handlers.engine
        return call.answer(ReplicaGrant(self._replicas.view(lease), lease_view(engine, lease, token=token)))

    def count(self, metrics: Metrics) -> None:
        """What the Prometheus page says of pools."""
        self._replicas.pools.count(metrics, self._replicas.live)

    def table(self) -> dict[str, Handler]:
        """Route name -> handler."""
        return {"replicas": self.replicas, "replica_create": self.create}
