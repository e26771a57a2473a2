"""HTTP over the Unix socket (and TCP when configured): who is calling, errors as JSON, versions, limits, routes.

House rules: every request is authorised anew from kernel facts; every error is ``{"error": ErrorView}``; nothing is served
that is not a row of powerd.routes.ROUTES.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from aiohttp import web

from powerd.access import Origin, Principal, Rules, may_control
from powerd.api import API_HEADER, API_VERSION, FLIGHT_HEADER, MAX_BODY_BYTES
from powerd.attach import check_version, error_body
from powerd.call import Call, Handler
from powerd.clock import Clock
from powerd.config import TcpConfig
from powerd.decode import nearest
from powerd.errors import DeniedError, PowerdError, RequestError, UnavailableError
from powerd.log import log
from powerd.node import alive
from powerd.peer import peer_pidfd, unix_principal
from powerd.routes import ROUTES
from powerd.tcp import Tokens, tcp_address, tls_context

_VERSION = f"{API_VERSION[0]}.{API_VERSION[1]}"
_MAX_CONNECTIONS = 256  # of one user who may control
_MAX_PER_UID = 32  # of anybody else
_TOO_MANY = b"HTTP/1.1 429 Too Many Requests\r\nConnection: close\r\nContent-Type: application/json\r\n\r\n" + error_body(
    RequestError("too many connections", hint="close some", code="too_many")
)
_READS_PER_S, _READ_BURST = 50.0, 100.0  # of one user without the right to control


class _Bucket:
    """A token bucket; real time, because it protects this process, not the node."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s, self._burst, self._level, self._at = per_s, burst, burst, time.monotonic()

    def take(self) -> bool:
        now = time.monotonic()
        self._level = min(self._burst, self._level + (now - self._at) * self._per_s)
        self._at = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


class Server:
    """The HTTP side of the daemon."""

    def __init__(
        self, clock: Clock, handlers: Mapping[str, Handler], rules: Callable[[], Rules], tokens: Callable[[], Tokens]
    ) -> None:
        self._clock = clock
        self._rules = rules
        self._tokens = tokens
        self._principals: WeakKeyDictionary[Any, Principal] = WeakKeyDictionary()
        self._accepting: asyncio.Task[None] | None = None
        self._buckets: dict[int | None, _Bucket] = {}
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        for route in ROUTES:
            app.router.add_route(route.method, route.path, self._guard(handlers[route.name], route.max_body_bytes))
        app.router.add_route("*", "/{path:.*}", self._guard(self._nowhere, MAX_BODY_BYTES))
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, keepalive_timeout=3600.0, shutdown_timeout=1.0)

    async def start(self, unix: socket.socket, tcp: TcpConfig | None = None) -> None:
        """Serve on a bound socket, and on TCP when configured."""
        await self._runner.setup()
        unix.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(unix))
        if tcp is not None and tcp.listen:
            host, port = tcp_address(tcp)
            await web.TCPSite(self._runner, host, port, ssl_context=tls_context(tcp)).start()

    async def stop(self) -> None:
        """Close every connection."""
        if self._accepting is not None:
            self._accepting.cancel()
        await self._runner.cleanup()

    async def _accept(self, unix: socket.socket) -> None:
        """Accept by hand, so that one user's idle connections cannot use up everybody's."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                link, _ = await loop.sock_accept(unix)
            except OSError as error:
                log("accept_failed", why=error)
                await asyncio.sleep(0.1)  # out of descriptors: some will be closed
                continue
            try:
                who = unix_principal(link)
                mine = sum(1 for t, p in self._principals.items() if p.uid == who.uid and not t.is_closing())
                limit = _MAX_CONNECTIONS if may_control(who, self._rules()).allowed else _MAX_PER_UID
                if mine >= limit or len(self._principals) >= 2 * _MAX_CONNECTIONS:
                    link.send(_TOO_MANY)
                    link.close()
                    continue
                transport, _ = await loop.connect_accepted_socket(self._runner.server, link)  # type: ignore[arg-type]
                self._principals[transport] = who
            except OSError:
                link.close()

    def _guard(self, handler: Handler, max_body_bytes: int) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def guarded(request: web.Request) -> web.StreamResponse:
            if max_body_bytes != MAX_BODY_BYTES:
                request = request.clone(client_max_size=max_body_bytes)
            counted = FLIGHT_HEADER in request.headers and self._clock.scale == 0.0
            headers = {API_HEADER: _VERSION}
            try:
                if counted:
                    try:
                        await request.read()  # the body comes after the headers, as a message of its own: it is still under way
                    finally:
                        self._clock.flight(-1)
                return await handler(self._call(request, headers))
            except PowerdError as error:
                return self._refuse(error, headers)
            except web.HTTPException as error:
                return self._refuse(RequestError(error.reason or str(error)), headers)
            except ConnectionError:
                raise
            except Exception as error:
                log("request_failed", path=request.path, why=repr(error))
                return self._refuse(PowerdError("powerd failed on this request", hint="its log says why"), headers)
            finally:
                if counted:
                    self._clock.flight(1)

        return guarded

    @staticmethod
    def _refuse(error: PowerdError, headers: dict[str, str]) -> web.Response:
        status = error.code.http_status if error.code.http_status >= 400 else 409
        return web.Response(body=error_body(error), status=status, content_type="application/json", headers=headers)

    def _call(self, request: web.Request, headers: dict[str, str]) -> Call:
        if (stated := request.headers.get(API_HEADER)) is not None:
            check_version(stated)
        rules = self._rules()
        link = request.transport.get_extra_info("socket") if request.transport is not None else None
        if link is None:
            raise UnavailableError("the connection is gone")
        who = self._principal(request, link)
        if not may_control(who, rules).allowed:
            bucket = self._buckets.get(who.uid)
            if bucket is None:
                if len(self._buckets) > 10_000:
                    self._buckets.clear()
                bucket = self._buckets[who.uid] = _Bucket(_READS_PER_S, _READ_BURST)
            if not bucket.take():
                raise RequestError("too many requests", hint=f"at most {_READS_PER_S:g} a second", code="too_many")
            who = self._living(who, link)
        return Call(request, who, rules, headers, lambda: peer_pidfd(link, who.pid or 0))

    def _principal(self, request: web.Request, link: socket.socket) -> Principal:
        transport = request.transport
        known = self._principals.get(transport)
        if link.family == socket.AF_UNIX:
            return known if known is not None else unix_principal(link)
        stated = request.headers.get("Authorization", "")
        if stated:
            shown, tokens = stated.removeprefix("Bearer ").strip().encode(), self._tokens()
            if tokens.control is not None and hmac.compare_digest(shown, tokens.control.encode()):
                return Principal(Origin.TCP_TOKEN, user="token")
            if tokens.read is None or not hmac.compare_digest(shown, tokens.read.encode()):
                raise DeniedError("not the bearer token of this daemon", hint="the operator set it in tcp.token_file")
            if request.method != "GET":
                raise DeniedError("the read token only reads", hint="the one in tcp.token_file may set")
            return Principal(Origin.TCP_READER, user="read token")
        peer = request.transport.get_extra_info("peername") if request.transport is not None else None
        if peer is None or not ipaddress.ip_address(peer[0]).is_loopback or not self._rules().loopback_reads:
            raise DeniedError("a bearer token is needed", hint="Authorization: Bearer TOKEN")
        host = (request.host or "").rpartition(":")[0].strip("[]") or request.host
        if host not in ("localhost", "127.0.0.1", "::1"):
            raise DeniedError("loopback reads are for local names only", hint="use 127.0.0.1")  # a web page may rebind its name
        return Principal(Origin.TCP, user="loopback")

    @staticmethod
    def _living(who: Principal, link: socket.socket) -> Principal:
        """Ownership is proven by PID: only while the process that connected lives is the number still its own."""
        if who.pid is None:
            return who
        pidfd = peer_pidfd(link, who.pid)
        if pidfd is None:
            return replace(who, pid=None)
        try:
            return who if alive(pidfd) else replace(who, pid=None)
        finally:
            os.close(pidfd)

    async def _nowhere(self, call: Call) -> web.StreamResponse:
        path = call.request.path
        methods = sorted({r.method for r in ROUTES if r.path == path})
        if methods:
            raise RequestError(
                f"{call.request.method} {path} does not exist", hint=f"use {' or '.join(methods)}", code="not_found"
            )
        raise RequestError(f"nothing at {path[:80]}", hint=nearest(path, [r.path for r in ROUTES]), code="not_found")
