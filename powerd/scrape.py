"""Reading an engine's metrics page: where it may be, and how much and how long is read.

House rules: only this host and hosts that the operator named; no redirect, no proxy, no credentials, no compression; bounded in
bytes and seconds; what is read is told to nobody but the parser.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import stat
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp

from powerd import __version__
from powerd.enginepage import PageError
from powerd.errors import RequestError

MAX_BYTES = 4 << 20
_MAX_URL = 300
_PATH = re.compile(r"/[A-Za-z0-9/_.~-]*")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")


class NoPageError(Exception):
    """There is no page to read; the message says why."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a page is: ``url`` to ask, over ``socket`` unless that is None."""

    url: str
    socket: str | None = None


def _refuse(why: str, hint: str = "") -> RequestError:
    return RequestError(f"metrics_url: {why}", hint=hint or "http://127.0.0.1:8000/metrics", code="bad_value")


def source_of(url: str, allowed_hosts: str) -> Source:
    """Where this address leads. RequestError(bad_value) unless it is http on this host, a Unix socket or an allowed host."""
    if len(url) > _MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
        raise _refuse(f"at most {_MAX_URL} printable characters")
    if url.startswith("unix:"):
        path, _, page = url.removeprefix("unix:").partition(":")
        page = page or "/metrics"
        if not path.startswith("/") or ".." in path.split("/") or not _PATH.fullmatch(page):
            raise _refuse("unix:/absolute/socket:/path is needed", "unix:/run/engine.sock:/metrics")
        return Source(f"http://engine{page}", path)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _refuse(str(error)) from error
    if parts.scheme != "http" or not host or "@" in parts.netloc:
        raise _refuse("http, a host and no user name are needed")
    if parts.query or parts.fragment or "?" in url or "#" in url or not _PATH.fullmatch(parts.path or "/"):
        raise _refuse("a plain path without query is needed")
    if port == 0:
        raise _refuse("port 0 is none")
    literal = _literal(host)
    if literal is None and not _NAME.fullmatch(host):
        raise _refuse("that is no host name")
    allowed = {h.strip().lower() for h in allowed_hosts.split(",") if h.strip()}
    if host == "localhost":
        host = "127.0.0.1"  # never what somebody's resolver makes of it
    elif not (literal is not None and literal.is_loopback) and host.lower() not in allowed:
        raise _refuse(f"{host[:80]!r} is not this host", "the operator may name it in replicas.allowed_hosts")
    where = f"[{host}]" if ":" in host else host
    return Source(f"http://{where}:{port or 80}{parts.path or '/'}")


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def check_socket(source: Source, uid: int) -> None:
    """NoPageError unless the socket is of this user; root's and the daemon's own replicas may use any."""
    if source.socket is None or uid in (0, os.geteuid()):
        return
    try:
        info = os.stat(source.socket)
    except OSError as error:
        raise NoPageError(f"{source.socket}: {error.strerror}") from error
    if not stat.S_ISSOCK(info.st_mode) or info.st_uid != uid:
        raise NoPageError(f"{source.socket} is not a socket of user {uid}")


class Reader:
    """Reads one page again and again over one connection; use it from one task."""

    def __init__(self, source: Source, uid: int, timeout_s: float) -> None:
        self._source, self._uid, self._timeout_s = source, uid, timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def read(self) -> str:
        """The page. NoPageError when nobody answers in time, PageError when what answers is no page."""
        try:
            async with asyncio.timeout(self._timeout_s):
                check_socket(self._source, self._uid)
                return await self._read()
        except TimeoutError:
            await self.close()
            raise NoPageError("no answer in time") from None
        except aiohttp.ClientPayloadError:
            raise PageError("the page is cut off") from None
        except (aiohttp.ClientError, OSError) as error:
            await self.close()
            cause = getattr(error, "os_error", None) or error
            raise NoPageError(getattr(cause, "strerror", None) or type(cause).__name__) from None

    async def _read(self) -> str:
        if self._session is None:
            path = self._source.socket
            connector = aiohttp.TCPConnector(limit=1) if path is None else aiohttp.UnixConnector(path, limit=1)
            headers = {"Accept": "text/plain;version=0.0.4", "Accept-Encoding": "identity", "User-Agent": f"powerd/{__version__}"}
            self._session = aiohttp.ClientSession(
                connector=connector, headers=headers, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, trust_env=False,
                timeout=aiohttp.ClientTimeout(total=None),
            )  # fmt: skip
        async with self._session.get(self._source.url, allow_redirects=False) as response:
            if response.status != 200:
                raise NoPageError(f"HTTP {response.status}")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise PageError("the page is compressed")
            body = bytearray()
            async for piece in response.content.iter_chunked(1 << 16):
                body += piece
                if len(body) > MAX_BYTES:
                    response.close()
                    raise PageError(f"the page is larger than {MAX_BYTES >> 20} MiB")
        try:
            return body.decode()
        except UnicodeDecodeError:
            raise PageError("the page is no text") from None

    async def close(self) -> None:
        """Close the connection; the next ``read`` opens another."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()
