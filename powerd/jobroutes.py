"""The routes that serve training jobs: energy spans, jobs, plans.

House rules: as powerd.handlers, whose permissions hold here too; who owns nothing on this node is refused before its body is
read; what takes longer than a tick is done off the loop.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from powerd.access import Origin, View, may_control, may_read_all
from powerd.api import MAX_BODY_BYTES, Ack, JobEvent, SpansRequest
from powerd.call import Call, Handler, number
from powerd.clock import NS, standing
from powerd.decode import decode
from powerd.errors import DeniedError, RequestError
from powerd.handlers import Handlers
from powerd.jobs import KEEP_STEPS, JobTable
from powerd.sinks.metrics import Metrics
from powerd.sinks.whose import show_jobs
from powerd.solver_child import Solver
from powerd.trace import EnergySpans

_SHOWN_NS = 600 * NS  # for so long a job that has ended stays on the Prometheus page: long enough to be scraped
_HINT = "run a process on it or hold a lease"


class JobRoutes:
    """What every route for jobs does."""

    def __init__(self, handlers: Handlers, spans: EnergySpans, jobs: JobTable, solver: Solver) -> None:
        self.handlers, self.spans, self.jobs, self.solver = handlers, spans, jobs, solver
        self._clock = handlers.engine.clock

    def _must_own_something(self, call: Call) -> None:
        views = self.handlers._views(call)
        if views is not None and View.FULL not in views.values():
            raise DeniedError("this is for those who run something here", hint=_HINT)

    def _must_own(self, call: Call, uuid: str, what: str) -> None:
        self.handlers._known_gpu(uuid)
        if self.handlers._view(call, uuid) is not View.FULL:
            raise DeniedError(f"no {what} on {uuid}", hint=_HINT)

    async def _read(self, call: Call) -> bytes:
        try:
            return await call.request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise RequestError("the body is too large", hint="docs/api.md says how large it may be") from error

    async def _body(self, call: Call, kind: type[Any]) -> Any:
        body = await self._read(call)
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

    # --- jobs -----------------------------------------------------------------------------------------------------------------

    def _name(self, call: Call) -> str:
        return str(call.request.match_info["job"])

    async def job_event(self, call: Call) -> web.Response:
        call.query()
        name, uid = self._name(call), -1 if call.who.uid is None else call.who.uid
        may = may_control(call.who, call.rules).allowed
        mine = call.who.origin is Origin.UNIX and not call.who.foreign and self.jobs.owner(name) == uid
        if not (may or mine):  # its own job may still say that it has ended when its lease and processes are gone
            self._must_own_something(call)
        event: JobEvent = await self._body(call, JobEvent)
        for uuid in dict.fromkeys(uuid for step in event.steps for uuid in step.gpus):
            self.handlers._known_gpu(uuid)
            if not mine:
                self._must_own(call, uuid, "job steps")
        owner = self.jobs.owner(name)
        if may and owner is not None:
            uid = owner
        self.jobs.add(name, uid, event, self._clock.wall_ns(), self._clock.now_ns())
        return call.answer(Ack(True, f"{event.kind} of job {name}"))

    def _reader(self, call: Call) -> int | None:
        """Whose jobs a caller sees: None for everybody's."""
        if may_read_all(call.who, call.rules).allowed:
            return None
        return call.who.uid if call.who.origin is Origin.UNIX and call.who.uid is not None else -2

    async def jobs_list(self, call: Call) -> web.Response:
        call.query()
        return call.answer(self.jobs.views(self._clock.now_ns(), self._reader(call)))

    async def job(self, call: Call) -> web.Response:
        call.query()
        name, reader = self._name(call), self._reader(call)
        view = self.jobs.view(name, self._clock.now_ns())
        if view is None or (reader is not None and self.jobs.owner(name) != reader):
            raise RequestError(f"no job {name[:80]!r}", hint="powerctl jobs", code="not_found")
        return call.answer(view)

    async def job_steps(self, call: Call) -> web.Response:
        limit = int(number(call.query("limit"), "limit", 10_000, 1, 100_000))
        name, reader, store = self._name(call), self._reader(call), self.handlers.store
        owner = self.jobs.owner(name)
        if owner is None or (reader is not None and owner != reader):
            raise RequestError(f"no job {name[:80]!r}", hint="powerctl jobs", code="not_found")
        kept = self.jobs.steps(name, limit)
        if store is None or len(kept) < min(limit, KEEP_STEPS):
            return call.answer(kept)
        with standing(self._clock):
            stored = await asyncio.to_thread(store.job_steps, name, limit)
        newest = {(row.attempt, row.step): row for row in (*stored, *kept)}  # what waits for the store is in memory
        return call.answer(sorted(newest.values(), key=lambda row: (row.wall_ns, row.step))[-limit:])

    async def perseus_plan(self, call: Call) -> web.Response:
        call.query()
        self._must_own_something(call)
        return call.raw(await self.solver.plan(await self._read(call)))

    def count(self, metrics: Metrics) -> None:
        """What the Prometheus page says of jobs."""
        now_ns, wall_ns = self._clock.now_ns(), self._clock.wall_ns()
        metrics.jobs(self.jobs.states(now_ns), self.jobs.counters, self.jobs.gpus(now_ns))
        named = self.jobs.views(now_ns) if self.handlers.engine.config.metrics.job_names else []
        show_jobs(metrics, (v for v in named if v.end_wall_ns is None or wall_ns - v.end_wall_ns < _SHOWN_NS))

    def table(self) -> dict[str, Handler]:
        """Route name -> handler."""
        return {
            "energy_spans": self.energy_spans, "jobs": self.jobs_list, "job": self.job, "job_event": self.job_event,
            "job_steps": self.job_steps, "perseus_plan": self.perseus_plan,
        }  # fmt: skip
