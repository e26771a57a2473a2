"""The routes that serve training jobs: energy spans, jobs, plans.

House rules: as powerd.handlers, whose permissions hold here too; who owns nothing on this node is refused before the body is read;
what takes longer than a tick is done off the loop.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from powerd.access import View
from powerd.api import MAX_BODY_BYTES, SpansRequest
from powerd.call import Call, Handler
from powerd.clock import standing
from powerd.decode import decode
from powerd.errors import DeniedError, RequestError
from powerd.handlers import Handlers
from powerd.trace import EnergySpans

_HINT = "run a process on it or hold a lease"


class JobRoutes:
    """What every route for jobs does."""

    def __init__(self, handlers: Handlers, spans: EnergySpans) -> None:
        self.handlers, self.spans = handlers, spans
        self._clock = handlers.engine.clock

    def _must_own_something(self, call: Call) -> None:
        views = self.handlers._views(call)
        if views is not None and View.FULL not in views.values():
            raise DeniedError("this is for those who run something here", hint=_HINT)

    def _must_own(self, call: Call, uuid: str, what: str) -> None:
        self.handlers._known_gpu(uuid)
        if self.handlers._view(call, uuid) is not View.FULL:
            raise DeniedError(f"no {what} on {uuid}", hint=_HINT)

    async def _body(self, call: Call, kind: type[Any]) -> Any:
        try:
            body = await call.request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise RequestError(f"the body is too large: {error.text or ''}".rstrip(": ")) from error
        if len(body) <= MAX_BODY_BYTES:
            return decode(body, kind)
        with standing(self._clock):  # a tenth of a second for the largest
            return await asyncio.to_thread(decode, body, kind)

    async def energy_spans(self, call: Call) -> web.Response:
        call.query()
        self._must_own_something(call)
        request: SpansRequest = await self._body(call, SpansRequest)
        self._must_own(call, request.uuid, "energy spans")
        return call.answer(await self.spans.answer(request))

    def table(self) -> dict[str, Handler]:
        """Route name -> handler."""
        return {"energy_spans": self.energy_spans}
