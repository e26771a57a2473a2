"""The small server behind `powerctl dashboard`: static files, and the daemon's reads as the user who started it.

House rules: loopback, GET and one browser session only; what a request may have is decided by a pure function before anything is
read; nothing is served that is neither a file listed at start nor a GET row of powerd.routes. A thread per connection from the
standard library is enough for one browser, needs nothing to install, and lets the client's own transport do the asking.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from powerd.errors import PowerdError
from powerd.routes import ROUTES

if TYPE_CHECKING:
    import socket

    from powerd.client.transport import Transport

MAX_CONNECTIONS = 32
IDLE_S = 30.0  # a connection that says nothing, or a reader that does not read
SILENCE_S = 30.0  # of the daemon's stream: its heartbeat comes every 5 s
_LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
_MEDIA = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml", ".txt": "text/plain; charset=utf-8",
}  # fmt: skip
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# A page that goes on by itself: the navigation that follows comes from here, so that the strict cookie travels with it even when
# the link was opened from elsewhere.
_ENTERED = (
    b'<!doctype html><title>powerd</title><link rel="icon" href="/icon.svg">'
    b'<meta http-equiv="refresh" content="0;url=/"><a href="/">powerd</a>'
)


def _readable() -> re.Pattern[str]:
    rows = [r.path for r in ROUTES if r.method == "GET" and (r.path.startswith("/v1/") or r.path == "/openapi.json")]
    return re.compile("|".join(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path)) for path in rows))


_READABLE = _readable()


@dataclass(frozen=True, slots=True)
class Asked:
    """What a browser asked for, as far as it decides anything."""

    method: str
    target: str
    host: str
    origin: str | None = None
    fetch_site: str | None = None  # Sec-Fetch-Site
    cookie: str = ""
    has_body: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """A status and what to do: ``enter``, ``file`` (name), ``ask`` (target), or refuse with a message."""

    status: int
    action: str
    detail: str


class Gate:
    """The one-time token of the URL and the session that it is exchanged for."""

    def __init__(self, port: int) -> None:
        self.cookie = f"powerd-{port}"  # cookies know no port: two dashboards must not overwrite each other's
        self.session = secrets.token_urlsafe(32)
        self.on_used: Callable[[], None] = lambda: None
        self._token: str | None = secrets.token_urlsafe(32)
        self._lock = threading.Lock()

    @property
    def token(self) -> str | None:
        """The token while nobody has used it."""
        return self._token

    def exchange(self, shown: str) -> bool:
        """Whether this is the token; it is not any more afterwards."""
        with self._lock:
            good = self._token is not None and hmac.compare_digest(shown.encode(), self._token.encode())
            if good:
                self._token = None
        if good:
            self.on_used()
        return good

    def knows(self, cookies: str) -> bool:
        """Whether the session's cookie is among these."""
        try:
            found = SimpleCookie(cookies).get(self.cookie)
        except CookieError:
            return False
        return found is not None and hmac.compare_digest(found.value.encode(), self.session.encode())


def judge(asked: Asked, gate: Gate, files: Mapping[str, Any]) -> Verdict:
    """What a request gets. The order matters: who asks from elsewhere learns nothing, not even whether a token is good."""
    name = asked.host.rpartition(":")[0] if re.search(r":\d+$", asked.host) else asked.host
    if name not in _LOCAL_NAMES:
        return Verdict(421, "refuse", "this page is for 127.0.0.1 only")  # a foreign name that resolves to loopback
    if asked.origin is not None and asked.origin != f"http://{asked.host}":
        return Verdict(403, "refuse", "asked by another site")
    if asked.method not in ("GET", "HEAD"):
        return Verdict(405, "refuse", "this page only reads")
    if asked.has_body:
        return Verdict(400, "refuse", "a GET has no body")
    parts = urlsplit(asked.target)
    if parts.path != "/" and asked.fetch_site not in (None, "same-origin", "none"):
        return Verdict(403, "refuse", "asked by another site")
    if parts.path == "/" and (shown := parse_qs(parts.query).get("token")):
        if asked.method == "GET" and gate.exchange(shown[0]):
            return Verdict(200, "enter", "")
        if not gate.knows(asked.cookie):
            return Verdict(403, "refuse", "this link was used already: run `powerctl dashboard` again")
        return Verdict(200, "file", "index.html")
    if not gate.knows(asked.cookie):
        return Verdict(403, "refuse", "no session: open the link that `powerctl dashboard` prints")
    file = parts.path.removeprefix("/") or "index.html"
    if file in files:
        return Verdict(200, "file", file)
    if _READABLE.fullmatch(parts.path):
        return Verdict(200, "ask", asked.target)
    return Verdict(404, "refuse", "nothing here")


def load(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Every file that may be served: relative name -> (media type, content)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in _MEDIA:
            found[path.relative_to(folder).as_posix()] = (_MEDIA[path.suffix], path.read_bytes())
    return found


class Dashboard(ThreadingHTTPServer):
    """The page and the daemon's reads on a loopback port; 0 picks a free one. OSError when the port is taken."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, port: int, folder: Path, transport: Transport) -> None:
        self.files, self.transport = load(folder), transport
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(("127.0.0.1", port), _Handler)
        self.gate = Gate(self.server_address[1])

    @property
    def url(self) -> str:
        """Where the page is, with the token as long as it is good."""
        query = f"?token={self.gate.token}" if self.gate.token else ""
        return f"http://127.0.0.1:{self.server_address[1]}/{query}"

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """A connection too many is closed: one browser opens six."""
        return self._room.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        """A browser that leaves in mid-answer is no error; anything else is."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Dashboard
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S

    def _serve(self) -> None:
        headers = self.headers
        hosts = headers.get_all("Host", [])
        asked = Asked(
            self.command, self.path, hosts[0] if len(hosts) == 1 else "", headers.get("Origin"), headers.get("Sec-Fetch-Site"),
            "; ".join(headers.get_all("Cookie", [])), "Content-Length" in headers or "Transfer-Encoding" in headers,
        )  # fmt: skip
        verdict = judge(asked, self.server.gate, self.server.files)
        if verdict.action == "enter":
            cookie = f"{self.server.gate.cookie}={self.server.gate.session}; Path=/; HttpOnly; SameSite=Strict"
            self._answer(200, _MEDIA[".html"], _ENTERED, {"Set-Cookie": cookie})
        elif verdict.action == "file":
            self._answer(200, *self.server.files[verdict.detail])
        elif verdict.action == "ask":
            self._ask(verdict.detail)
        else:
            self.close_connection = True
            self._answer(
                verdict.status, "text/plain; charset=utf-8", f"powerd: {verdict.detail}\n".encode(), {"Connection": "close"}
            )

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _serve  # noqa: N815 (http.server's names)

    def _answer(self, status: int, media: str, body: bytes, extra: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": media, "Content-Length": str(len(body)), **(extra or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _ask(self, target: str) -> None:
        """Pass a read on to the daemon, as whoever runs this process."""
        try:
            if urlsplit(target).path == "/v1/stream":
                self._stream(target)
            else:
                body = self.server.transport.text("GET", target).encode()
                self._answer(200, "application/json", body)
        except PowerdError as error:
            view = {"code": error.code.name, "message": error.message, "hint": error.hint, "fault": str(error.code.fault)}
            status = error.code.http_status if error.code.http_status >= 400 else 409
            self._answer(status, "application/json", json.dumps({"error": view}).encode())

    def _stream(self, target: str) -> None:
        transport = self.server.transport
        after = self.headers.get("Last-Event-ID", "")
        connection = transport.fresh()
        try:
            headers = {"Last-Event-ID": after} if after.isdecimal() else None
            _, response = transport.open("GET", target, connection=connection, headers=headers)
            self.close_connection = True
            self.send_response(200)
            for name, value in {**_HEADERS, "Content-Type": "text/event-stream", "Connection": "close"}.items():
                self.send_header(name, value)
            self.end_headers()
            while self.command != "HEAD":
                connection.until(time.monotonic() + SILENCE_S)
                line = response.readline(4 << 20)
                if not line:
                    return
                self.wfile.write(line)
        except (OSError, ValueError):
            pass  # one of the two sides has gone; the browser connects again
        finally:
            connection.close()

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self.server.transport.close()

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads a browser's requests on a terminal."""
