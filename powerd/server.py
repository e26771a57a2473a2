"""HTTP over the Unix socket (and TCP when configured): who is calling, errors as JSON, versions, limits, routes.

House rules: every request is authorised anew from kernel facts; every error is ``{"error": ErrorView}``; nothing is served
that is not a row of powerd.api.ROUTES.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from aiohttp import web

from powerd.access import Origin, Principal, Rules, may_control
from powerd.api import API_HEADER, API_VERSION, FLIGHT_HEADER, ROUTES
from powerd.attach import check_version, error_body
from powerd.call import Call, Handler
from powerd.clock import Clock
from powerd.config import TcpConfig
from powerd.decode import nearest
from powerd.errors import ConfigError, DeniedError, PowerdError, RequestError, UnavailableError
from powerd.log import log
from powerd.node import alive
from powerd.peer import peer_pidfd, unix_principal

MAX_BODY_BYTES = 64 * 1024
_VERSION = f"{API_VERSION[0]}.{API_VERSION[1]}"
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


def bearer_token(config: TcpConfig) -> str | None:
    """The token that TCP clients have to show. ConfigError when the file is missing, empty or readable by others."""
    if not config.token_file:
        return None
    path = Path(config.token_file)
    try:
        info = path.stat()
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tcp.token_file: {error}") from error
    if info.st_mode & 0o077:
        raise ConfigError(f"tcp.token_file {path}: others can read it", hint="chmod 0600")
    if len(token) < 16:
        raise ConfigError(f"tcp.token_file {path}: fewer than 16 characters", hint="openssl rand -base64 32")
    return token


def tcp_address(config: TcpConfig) -> tuple[str, int]:
    """Host and port of ``tcp.listen``. ConfigError when malformed, or beyond loopback without TLS and token."""
    host, _, port = config.listen.rpartition(":")
    host = host.strip("[]")
    try:
        address, number = ipaddress.ip_address(host), int(port)
        if not 0 <= number <= 65535:
            raise ValueError
    except ValueError:
        raise ConfigError(f"tcp.listen {config.listen!r}: not ADDRESS:PORT", hint='for example "127.0.0.1:9478"') from None
    if bool(config.certificate) != bool(config.key):
        raise ConfigError("tcp.certificate and tcp.key belong together")
    if not address.is_loopback and not config.certificate:
        raise ConfigError(f"tcp.listen {config.listen}: beyond loopback TLS is needed", hint="set tcp.certificate and tcp.key")
    if not config.token_file and not (address.is_loopback and config.loopback_reads):
        raise ConfigError("tcp.listen without tcp.token_file would answer nobody", hint="set tcp.token_file")
    return host, number


def tls_context(config: TcpConfig) -> ssl.SSLContext | None:
    """The TLS side of the TCP listener, or ``None`` without a certificate. ConfigError when the files are no good."""
    if not config.certificate:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.certificate, config.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tcp.certificate: {error}") from error
    return context


class Server:
    """The HTTP side of the daemon."""

    def __init__(
        self, clock: Clock, handlers: Mapping[str, Handler], rules: Callable[[], Rules], token: Callable[[], str | None]
    ) -> None:
        self._clock = clock
        self._rules = rules
        self._token = token
        self._principals: WeakKeyDictionary[Any, Principal] = WeakKeyDictionary()
        self._buckets: dict[int | None, _Bucket] = {}
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        for route in ROUTES:
            app.router.add_route(route.method, route.path, self._guard(handlers[route.name]))
        app.router.add_route("*", "/{path:.*}", self._guard(self._nowhere))
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, keepalive_timeout=3600.0, shutdown_timeout=1.0)

    async def start(self, unix: socket.socket, tcp: TcpConfig | None = None) -> None:
        """Serve on a bound socket, and on TCP when configured."""
        await self._runner.setup()
        await web.SockSite(self._runner, unix).start()
        if tcp is not None and tcp.listen:
            host, port = tcp_address(tcp)
            await web.TCPSite(self._runner, host, port, ssl_context=tls_context(tcp)).start()

    @property
    def addresses(self) -> list[Any]:
        """Where it listens."""
        return list(self._runner.addresses)

    async def stop(self) -> None:
        """Close every connection."""
        await self._runner.cleanup()

    def _guard(self, handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def guarded(request: web.Request) -> web.StreamResponse:
            counted = FLIGHT_HEADER in request.headers
            if counted:
                self._clock.flight(-1)
            headers = {API_HEADER: _VERSION}
            try:
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
            if known is None:
                known = self._principals[transport] = unix_principal(link)
            return known
        stated = request.headers.get("Authorization", "")
        expected = self._token()
        if stated:
            shown = stated.removeprefix("Bearer ").strip().encode()
            if expected is None or not hmac.compare_digest(shown, expected.encode()):
                raise DeniedError("not the bearer token of this daemon", hint="the operator set it in tcp.token_file")
            return Principal(Origin.TCP_TOKEN, user="token")
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
