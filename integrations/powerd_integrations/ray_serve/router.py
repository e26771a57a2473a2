"""The ingress deployment: OpenAI's paths in, steering in the middle, pool deployments behind.

House rules: it knows deployments by their handles and replicas by the planner's list; a client that hangs up ends its request at
the replica too; what the client is told is OpenAI's error body.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from powerd_integrations.fleet.published import Group, PlanMirror
from powerd_integrations.fleet.reporter import ArrivalCounter, PlannerLink
from powerd_integrations.fleet.settings import FleetSettings
from powerd_integrations.fleet.steering import BrokenOffError, NobodyServesError, Steering, Ticket
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.router import PromptTooLongError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from starlette.requests import Request
    from starlette.responses import Response

PATHS: Final = ("/v1/completions", "/v1/chat/completions")
PASSED_ON: Final = ("x-prompt-tokens", "x-stop-after", "x-request-id")
STREAM: Final = "text/event-stream; charset=utf-8"


class RouterReplica:
    """Serves OpenAI's paths and steers requests to the groups' deployments."""

    def __init__(
        self, settings: FleetSettings, model: EngineModel, handles: Mapping[str, DeploymentHandle], token: str = ""
    ) -> None:
        self._handles = {name: handle.options(stream=True) for name, handle in handles.items()}
        service = settings.service
        self._counter = ArrivalCounter(PlannerLink(service.planner, token))
        self._steering = Steering(settings, model, PlanMirror(service.plan or service.planner), self._counter, self._send)

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        from starlette.responses import JSONResponse, Response, StreamingResponse

        path = request.url.path
        if path.endswith("/health"):
            return Response(status_code=200)
        path = next((known for known in PATHS if path.endswith(known)), "")
        if not path or request.method != "POST":
            return JSONResponse(_error("there are POST " + " and ".join(PATHS), "NotFoundError"), 404)
        try:
            body = await request.json()
            if not isinstance(body, dict):
                raise ValueError("the body is a JSON object")
            headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
            ticket = self._steering.admit(path, body, headers)
        except (PromptTooLongError, ValueError) as error:
            return JSONResponse(_error(str(error), "invalid_request_error"), 400)
        answer = self._steering.answer(ticket)
        try:
            status = int(await anext(answer))
        except NobodyServesError as error:
            return JSONResponse(_error(str(error), "service_unavailable"), 503, {"Retry-After": "5"})
        except BrokenOffError as error:
            return JSONResponse(_error(str(error), "internal_error"), 502)
        kind = STREAM if ticket.streams and status == 200 else "application/json"
        return StreamingResponse(_told(answer, ticket), status, media_type=kind)

    async def _send(self, group: Group, path: str, body: dict[str, Any], headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """Ask a deployment; Serve chooses the replica that has the least to do."""
        answer = self._handles[str(group)].generate.remote(path, body, dict(headers))
        whole = False
        try:
            async for part in answer:
                yield part
            whole = True
        finally:
            if not whole:
                answer.cancel()


async def _told(answer: AsyncIterator[bytes], ticket: Ticket) -> AsyncIterator[bytes]:
    """The body; an answer that cannot go on ends with an error event, never silently."""
    try:
        async for part in answer:
            yield part
    except (BrokenOffError, NobodyServesError) as error:
        document = json.dumps(_error(str(error), "internal_error")).encode()
        yield b"data: " + document + b"\n\n" if ticket.streams else document


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
