"""The engine over HTTP: OpenAI's paths, /health, /metrics, and an end without losing anybody.

House rules: what vLLM does at the edges is done alike (measured on 0.32: nothing listens before the engine is ready, /health
stays 200 while it drains, so take it out of the router first); a client that hangs up ends its request; an injected fault is
asked for by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from aiohttp import web

from powerd.sim.engine import openai
from powerd.sim.engine.engine import DrainingError, Engine, EngineDiedError, PriorityError, Stream, TooLongError

FAULTS: Final = {
    "start-fails": "ends with code 1 instead of starting to listen",
    "unhealthy": "/health answers 503",
    "die": "is killed as by kill -9 after :N tokens",
    "hang": "makes no further token after :N tokens",
    "garbage-metrics": "/metrics is no Prometheus text",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One injected fault of ``FAULTS``; ``after`` tokens where it has a moment."""

    kind: str
    after: int = 0

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read ``KIND`` or ``KIND:TOKENS``; ValueError lists what there is."""
        kind, _, after = text.partition(":")
        if kind not in FAULTS or (after and not after.isdecimal()):
            raise ValueError(f"unknown fault {text!r}; known: {', '.join(FAULTS)}")
        return cls(kind, int(after or 0))


class Server:
    """Serves one engine; use as an async context manager around the engine's own."""

    def __init__(self, engine: Engine, *, host: str = "127.0.0.1", port: int = 0, stream_interval: int = 1,
                 faults: tuple[Fault, ...] = ()) -> None:  # fmt: skip
        self.engine, self._host, self._port = engine, host, port
        self._interval, self._faults = stream_interval, {fault.kind: fault for fault in faults}
        self._numbers = itertools.count(1)
        self._hung = asyncio.Event()
        self._runner: web.AppRunner | None = None
        if {"die", "hang"} & set(self._faults):
            engine.on_token = self._count

    async def __aenter__(self) -> Server:
        app = web.Application(client_max_size=64 << 20)
        app.add_routes([
            web.get("/health", self._health), web.get("/metrics", self._metrics), web.get("/v1/models", self._models),
            web.post("/v1/completions", self._completions), web.post("/v1/chat/completions", self._chat),
        ])  # fmt: skip
        self._runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=1.0, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self._host}:{self._port}"

    def _count(self, total: int) -> None:
        if (fault := self._faults.get("die")) and total >= fault.after:
            os.kill(os.getpid(), signal.SIGKILL)
        if (fault := self._faults.get("hang")) and total >= fault.after:
            self._hung.set()

    # -- small answers ---------------------------------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.Response:
        sick = self.engine.dead is not None or "unhealthy" in self._faults
        return web.Response(status=503 if sick else 200)

    async def _metrics(self, request: web.Request) -> web.Response:
        if "garbage-metrics" in self._faults:
            return web.Response(body=b'\x00vllm:num_requests_running{ nan "\xff} 1e999 ### not metrics\n' * 3)
        return web.Response(text=self.engine.metrics.text(self.engine.batch))

    async def _models(self, request: web.Request) -> web.Response:
        card = {"id": self.engine.name, "object": "model", "owned_by": "powerd-sim (simulated)",
                "max_model_len": self.engine.max_context}  # fmt: skip
        return web.json_response({"object": "list", "data": [card]})

    # -- completions -----------------------------------------------------------------------------------------------------

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=False)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=True)

    async def _answer(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        try:
            ask = openai.read(await request.json(), request.headers, chat=chat, name=self.engine.name)
        except (ValueError, UnicodeDecodeError) as error:
            return _error(400, str(error))
        if ask.model != self.engine.name:
            return _error(404, f"there is no model {ask.model!r}, this is {self.engine.name}", "NotFoundError")
        try:
            stream = self.engine.submit(ask.prompt_tokens, ask.max_tokens, ask.stop_after, ask.priority)
        except (TooLongError, PriorityError) as error:
            return _error(400, str(error))
        except (DrainingError, EngineDiedError) as error:
            return _error(503, str(error), "service_unavailable")
        id_ = f"{'chatcmpl' if chat else 'cmpl'}-sim-{os.getpid()}-{next(self._numbers)}"
        try:
            return await (self._streamed(request, ask, id_, stream) if ask.stream else self._at_once(ask, id_, stream))
        finally:
            stream.cancel()

    async def _at_once(self, ask: openai.Ask, id_: str, stream: Stream) -> web.Response:
        try:
            await stream.whole()
        except EngineDiedError as error:
            return _error(500, str(error), "internal_error")
        await self._unless_hung()
        return web.json_response(openai.whole(ask, id_, stream.request.generated, stream.finish_reason or "length"))

    async def _streamed(self, request: web.Request, ask: openai.Ask, id_: str, stream: Stream) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"})
        await response.prepare(request)
        held, sent = 0, 0
        try:
            async for new in stream:
                await self._unless_hung()
                held += new
                # As vLLM's --stream-interval: the first token at once, then every so many together.
                if sent and held < self._interval and stream.finish_reason is None:
                    continue
                sent, ready, held = sent + held, held, 0
                await response.write(_event(openai.chunk(ask, id_, ready, sent, stream.finish_reason)))
            if ask.usage:
                latency = _latency(stream) if self.engine.options.keep_gaps else None
                await response.write(_event(openai.last(ask, id_, sent, latency)))
            await response.write(b"data: [DONE]\n\n")
        except EngineDiedError as error:
            await response.write(_event(openai.error(500, str(error), "internal_error")))
        except ConnectionResetError:
            return response
        with contextlib.suppress(ConnectionResetError):
            await response.write_eof()
        return response

    async def _unless_hung(self) -> None:
        while self._hung.is_set():
            await asyncio.sleep(3600)


def _latency(stream: Stream) -> openai.Latency:
    request = stream.request
    moments = (request.scheduled_s, request.first_s)
    queued, first = (None if moment is None else 1000 * (moment - request.arrived_s) for moment in moments)
    return openai.Latency(queued, first, None if stream.tbt_p99_s is None else 1000 * stream.tbt_p99_s)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _error(status: int, message: str, kind: str = "invalid_request_error") -> web.Response:
    headers = {"Retry-After": "1"} if status == 503 else {}
    return web.json_response(openai.error(status, message, kind), status=status, headers=headers)
