"""The external scaler: answers KEDA from the newest plan.

House rules: the metric is the number of desired replicas and its target is 1: the HPA follows the plan; without a plan the
answer is UNAVAILABLE, and KEDA's own fallback decides; a plan whose planner is silent keeps its last figures, and its age is
logged; what a ScaledObject must say and does not is INVALID_ARGUMENT.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

from powerd_integrations.fleet.published import Group, PlanSource, PublishedPlan
from powerd_integrations.keda import contract
from powerd_integrations.keda.hpa import acted_on

log = logging.getLogger("powerd.keda")
METRIC: Final = "powerd-desired-replicas"
STALE_AFTER_S: Final = 30.0


class AskError(ValueError):
    """A ScaledObject does not say what is needed; the message says what."""


class NoPlanError(RuntimeError):
    """There is no plan yet, or it does not know the pool."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the trigger of a ScaledObject says: ``pool``, ``tp``, and with ``tolerance`` that growth shall clear the HPA's."""

    group: Group
    tolerance: float = 0.0

    @classmethod
    def read(cls, metadata: dict[str, str]) -> Asked:
        """Read a trigger's metadata; AskError when something is missing or no number."""
        if not metadata.get("pool"):
            raise AskError("metadata.pool is missing: the pool of this deployment")
        try:
            tp, tolerance = int(metadata.get("tp", "")), float(metadata.get("tolerance", "0"))
        except ValueError:
            raise AskError("metadata.tp is the tensor parallelism, a whole number; tolerance is a number such as 0.1") from None
        if tp < 1 or not 0.0 <= tolerance < 1.0:
            raise AskError("metadata.tp is from 1, tolerance from 0 and below 1")
        return cls(Group(metadata["pool"], tp), tolerance)


class Scaler:
    """Serves the five calls of the contract; all in one event loop."""

    def __init__(self, source: PlanSource, poll_s: float = 0.25) -> None:
        self._source, self._poll_s = source, poll_s
        self._stale = False

    # --- what KEDA asks -------------------------------------------------------------------------------------------------------

    async def is_active(self, request: Any) -> Any:
        """Whether any replica is wanted: KEDA goes to or from zero by it."""
        return contract.messages()["IsActiveResponse"](result=self._count(_asked(request)) > 0)

    async def stream_is_active(self, request: Any) -> AsyncIterator[Any]:
        """Say so at once and whenever it changes: from zero within the poll, not within KEDA's polling interval."""
        asked, said = _asked(request), None
        while True:
            try:
                active: bool | None = self._count(asked) > 0
            except NoPlanError:
                active = said
            if active is not None and active != said:
                said = active
                yield contract.messages()["IsActiveResponse"](result=active)
            await asyncio.sleep(self._poll_s)

    async def get_metric_spec(self, request: Any) -> Any:
        """The metric and its target: one desired replica per replica."""
        _asked(request)
        spec = contract.messages()["MetricSpec"](metricName=METRIC, targetSize=1, targetSizeFloat=1.0)
        return contract.messages()["GetMetricSpecResponse"](metricSpecs=[spec])

    async def stream_metric_spec(self, request: Any) -> AsyncIterator[Any]:
        """The same at once; it never changes, so nothing follows."""
        yield await self.get_metric_spec(request)
        await asyncio.Event().wait()

    async def get_metrics(self, request: Any) -> Any:
        """The desired replicas."""
        if request.metricName and request.metricName != METRIC:
            raise AskError(f"there is no metric {request.metricName!r}, only {METRIC}")
        count = self._count(_asked(request.scaledObjectRef))
        value = contract.messages()["MetricValue"](metricName=METRIC, metricValue=count, metricValueFloat=float(count))
        return contract.messages()["GetMetricsResponse"](metricValues=[value])

    # --- the plan -------------------------------------------------------------------------------------------------------------

    def _count(self, asked: Asked) -> int:
        plan = self._source.plan()
        wanted = None if plan is None else plan.replicas(asked.group.pool, asked.group.tp)
        if plan is None or wanted is None:
            raise NoPlanError("no plan yet" if plan is None else f"the plan does not know {asked.group}")
        self._note_age(plan)
        serving = Counter(replica.group for replica in plan.serving)[asked.group]
        return acted_on(wanted, serving, asked.tolerance) if asked.tolerance else wanted

    def _note_age(self, plan: PublishedPlan) -> None:
        stale = plan.age_s() > STALE_AFTER_S
        if stale != self._stale:
            log.warning("the planner %s: its plan of %.0f s ago stays in force" if stale else "the planner %s again (%.0f s)",
                        "is silent" if stale else "speaks", plan.age_s())  # fmt: skip
        self._stale = stale


def _asked(reference: Any) -> Asked:
    return Asked.read(dict(reference.scalerMetadata))


def handlers(scaler: Scaler) -> Any:
    """Return the service as gRPC's generic handler."""
    import grpc

    calls: dict[str, Callable[[Any], Any]] = {
        "IsActive": scaler.is_active,
        "StreamIsActive": scaler.stream_is_active,
        "GetMetricSpec": scaler.get_metric_spec,
        "GetMetrics": scaler.get_metrics,
        "StreamMetricSpec": scaler.stream_metric_spec,
    }
    rows = {}
    for method in contract.METHODS:
        kinds = {
            "request_deserializer": contract.messages()[method.request].FromString,
            "response_serializer": contract.messages()[method.response].SerializeToString,
        }
        if method.streams:
            rows[method.name] = grpc.unary_stream_rpc_method_handler(_streamed(calls[method.name]), **kinds)
        else:
            rows[method.name] = grpc.unary_unary_rpc_method_handler(_answered(calls[method.name]), **kinds)
    return grpc.method_handlers_generic_handler(contract.SERVICE, rows)


def _answered(call: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    async def answer(request: Any, context: Any) -> Any:
        try:
            return await call(request)
        except (AskError, NoPlanError) as error:
            await context.abort(_code(error), str(error))

    return answer


def _streamed(call: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for part in call(request):
                yield part
        except (AskError, NoPlanError) as error:
            await context.abort(_code(error), str(error))

    return answer


def _code(error: Exception) -> Any:
    import grpc

    return grpc.StatusCode.INVALID_ARGUMENT if isinstance(error, AskError) else grpc.StatusCode.UNAVAILABLE
