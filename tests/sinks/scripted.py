"""An HTTP server that answers writes as a test scripts it, and remembers what it took.

House rules: it runs in a thread of the test; a line counts as taken only when it was answered 204 or written before a 422.
"""

from __future__ import annotations

import asyncio
import gzip
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web


@dataclass
class Reply:
    """What is answered to one write."""

    status: int = 204
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    written: bool | None = None  # whether the lines were written; default: with 204 only
    message: str = "scripted"


class ScriptedServer:
    """``reply`` decides about each write from its lines; ``taken`` is what arrived, by line, with how often."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.reply: Callable[[list[str]], Reply] = lambda lines: Reply()
        self.keep_requests = True
        self.requests: list[list[str]] = []
        self.tokens: list[str] = []
        self.taken: dict[str, int] = {}
        self.changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._up.wait(20)

    def wait(self, what: str, test: Callable[[], object], timeout_s: float = 20.0) -> None:
        """Wait for something about the requests."""
        with self.changed:
            assert self.changed.wait_for(lambda: bool(test()), timeout_s), f"{what}: {self.requests!r:.500}"

    def points(self) -> list[str]:
        """The lines that arrived, each once, without test points."""
        return [text for text in self.taken if not text.startswith("powerd_check")]

    def close(self) -> None:
        """End it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        runner = self._loop.run_until_complete(self._serve())
        self._up.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _serve(self) -> web.AppRunner:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/api/v2/write", self._write)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        self.url = f"{'https' if self._tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def _write(self, request: web.Request) -> web.Response:
        assert request.query["precision"] == "ms"
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        lines = body.decode().split("\n")
        reply = self.reply(lines)
        with self.changed:
            if self.keep_requests:
                self.requests.append(lines)
            self.tokens.append(request.headers.get("Authorization", ""))
            if reply.written if reply.written is not None else reply.status == 204:
                for text in lines:
                    self.taken[text] = self.taken.get(text, 0) + 1
            self.changed.notify_all()
        await asyncio.sleep(reply.delay_s)
        if reply.status == 204:
            return web.Response(status=204)
        return web.json_response({"code": "scripted", "message": reply.message}, status=reply.status, headers=reply.headers)
