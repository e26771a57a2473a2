"""The routes of clock plans: check permission, ask the engine, pass the beat socket.

House rules: a plan is armed by whoever may change its lease and wherever its lease is attached; what is refused changes nothing.
"""

from __future__ import annotations

from aiohttp import web

from powerd.api import Ack, PlanRequest
from powerd.call import Call, Handler
from powerd.errors import RequestError, UnavailableError
from powerd.handlers import Handlers
from powerd.killpoint import killpoint


class PlanRoutes:
    """What the routes below ``/v1/leases/{id}/plans`` do."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        self._engine, self._attach = handlers.engine, handlers.attach

    async def plans(self, call: Call) -> web.Response:
        call.query()
        return call.answer(self._engine.plans.shown(self._handlers.visible(call).id))

    async def arm(self, call: Call) -> web.Response:
        lease = self._handlers.visible(call)
        self._handlers.may_hold(call, lease)
        request: PlanRequest = await self._handlers.body(call, PlanRequest)
        self._engine.check_may_set()
        lease, plans = self._engine.book.live(lease.id), self._engine.plans
        plans.check(lease, request.plan)
        if not self._attach.attached(lease.id):
            raise RequestError(f"lease {lease.id} has no connection: no beat could come", hint="attach it first", code="conflict")
        view, beats = await plans.arm(lease, request.plan)
        killpoint("powerd.plan.armed")
        if not self._attach.pass_beats(view, beats):
            plans.give_up(view.number)
            raise UnavailableError("the lease's connection does not take the beat socket", hint="try again", code="busy")
        return call.answer(view)

    async def disarm(self, call: Call) -> web.Response:
        lease = self._handlers.visible(call)
        self._handlers.may_hold(call, lease)
        count = self._engine.plans.disarm(lease, call.request.match_info["plan"])
        return call.answer(Ack(True, f"{count} given up: the setpoint of the lease holds again"))

    def table(self) -> dict[str, Handler]:
        """Route name -> handler."""
        return {"plans": self.plans, "plan_arm": self.arm, "plan_disarm": self.disarm}
