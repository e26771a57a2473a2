"""InfluxDB's v2 write address for an engine that only speaks 1.x.

House rules: nothing of what is written is touched; what the engine says is passed on; it runs in a thread of the test.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from typing import Protocol

from aiohttp import ClientSession, web


class Engine(Protocol):
    """A server with the 1.x write address at ``url``."""

    url: str


class Front:
    """Gives influxd 1.6.7 the v2 write address: ``/api/v2/write?org&bucket&precision`` becomes ``/write?db&precision``.

    Nothing of the body is touched. The answer's text is the engine's own; its code is that of InfluxDB from 2.5 on: 422 when some
    lines were written and others refused, 400 when the engine could read none of it. ``token`` is the only one it lets in.
    ``hurdles`` are for the next writes, one each: a status that is answered without asking the engine (429 with a
    ``Retry-After: 1``), or, if below 100, seconds by which the engine's answer comes late.
    """

    def __init__(self, engine: Engine, token: str = "the-right-token") -> None:
        self.engine, self.token = engine, token
        self.requests = 0
        self.hurdles: deque[float] = deque()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="influx front", daemon=True)

    def start(self) -> None:
        """Listen."""
        self._thread.start()
        assert self._ready.wait(20), "the front did not come up"

    def stop(self) -> None:
        """End it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._session.close())
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.close()

    async def _serve(self) -> None:
        self._session = ClientSession(auto_decompress=False)
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/api/v2/write", self._write)
        app.router.add_get("/ping", self._ping)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def _ping(self, _: web.Request) -> web.Response:
        return web.Response(status=204, headers={"X-Influxdb-Version": "1.6.7 behind a front"})

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"name": "influxdb", "status": "pass", "version": "1.6.7 behind a front"})

    async def _write(self, request: web.Request) -> web.Response:
        self.requests += 1
        if request.headers.get("Authorization") != f"Token {self.token}":
            return web.json_response({"code": "unauthorized", "message": "unauthorized access"}, status=401)
        hurdle = self.hurdles.popleft() if self.hurdles else 0
        if hurdle >= 100:
            headers = {"Retry-After": "1"} if hurdle == 429 else {}
            return web.json_response({"code": "scripted", "message": "scripted"}, status=int(hurdle), headers=headers)
        query = {"db": request.query["bucket"], "precision": request.query.get("precision", "ns")}
        headers = {name: request.headers[name] for name in ("Content-Encoding",) if name in request.headers}
        body = await request.read()
        try:
            async with self._session.post(f"{self.engine.url}/write", params=query, data=body, headers=headers) as answer:
                status, text = answer.status, await answer.text()
        except OSError as error:
            return web.json_response({"code": "unavailable", "message": str(error)}, status=503)
        await asyncio.sleep(hurdle)
        if status == 204:
            return web.Response(status=204)
        if status == 404:
            return web.json_response({"code": "not found", "message": text}, status=404)
        if status == 400:
            partial = "partial write" in text
            word = "unprocessable entity" if partial else "invalid"
            return web.json_response({"code": word, "message": text}, status=422 if partial else 400)
        return web.json_response({"code": "internal error", "message": text}, status=status)
