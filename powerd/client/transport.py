"""One HTTP exchange with the daemon over its Unix socket or over TCP, and every failure as an error of powerd.errors.

House rules: standard library only; an exchange has one deadline, however slowly the answer drips; a request that may have been
carried out is never sent twice unless sending it twice changes nothing.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlencode, urlsplit

from powerd.api import API_HEADER, API_VERSION, FLIGHT_HEADER, ErrorView
from powerd.client.codec import CodecError, decode
from powerd.errors import (
    CODES,
    ConfigError,
    DeniedError,
    DeviceError,
    Fault,
    LeaseLostError,
    PowerdError,
    RequestError,
    UnavailableError,
)

T = TypeVar("T")
SOCKET_ENV = "POWERD_SOCKET"
SYSTEM_SOCKET = Path("/run/powerd/powerd.sock")
MAX_ANSWER_BYTES = 64 << 20
_IDLE_S = 5.0  # a kept connection older than this is not trusted to be still open
_STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)
_START_HINT = "is powerd running? start it with `powerd run`, or set POWERD_SOCKET to its socket"


def default_socket() -> Path:
    """``$POWERD_SOCKET``, else this user's own daemon if it has a socket, else the system's."""
    if named := os.environ.get(SOCKET_ENV):
        return Path(named)
    from powerd.config import Config, run_dir

    own = run_dir(Config()) / "powerd.sock"
    simulated = "POWERD_SIM_STATE" in os.environ  # on a simulated node never the real one's daemon
    return own if simulated or own.exists() or not SYSTEM_SOCKET.exists() else SYSTEM_SOCKET


class _DeadlineSocket(socket.socket):
    """A socket whose every receive gets only what is left of the exchange's time."""

    deadline_s = float("inf")

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        _arm(self)
        return super().recv_into(*args, **kwargs)


class _DeadlineTlsSocket(ssl.SSLSocket):
    deadline_s = float("inf")

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        _arm(self)
        return super().recv_into(*args, **kwargs)


def _arm(sock: _DeadlineSocket | _DeadlineTlsSocket) -> None:
    left = sock.deadline_s - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    sock.settimeout(left if left < 1e6 else None)


class _Connection(http.client.HTTPConnection):
    def __init__(self, opener: Callable[[float], socket.socket], host: str) -> None:
        super().__init__(host)
        self._opener = opener
        self.timeout_s = 5.0
        self.used_s = 0.0

    def until(self, deadline_s: float) -> None:
        """No receive on this connection waits beyond this moment of the monotonic clock."""
        sock: Any = self.sock
        sock.deadline_s = deadline_s

    def connect(self) -> None:
        self.sock = self._opener(self.timeout_s)


def check_server(sock: socket.socket, uids: tuple[int, ...] | None) -> None:
    """Refuse a server on a Unix socket that runs as none of ``uids`` (the kernel's word, not the peer's)."""
    if uids is None or sock.family != socket.AF_UNIX:
        return
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if uid not in uids:
        raise DeniedError(f"the server on this socket runs as uid {uid}", hint=f"expected {' or '.join(map(str, uids))}")


class Transport:
    """Connections to one daemon, one per thread; safe to use from many threads and after a fork."""

    def __init__(
        self,
        socket_path: Path | None,
        url: str | None,
        token: str | None,
        *,
        server_uids: tuple[int, ...] | None = None,
        ca_file: str | None = None,
        timeout_s: float = 5.0,
    ) -> None:
        self.socket_path = socket_path
        self.timeout_s = timeout_s
        self.server_uids = server_uids
        self._token = token
        self._local = threading.local()
        self._tls: ssl.SSLContext | None = None
        self._host, self._port = "localhost", 0
        if url is not None:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise RequestError(f"not a daemon's address: {url!r}", hint="write https://HOST:PORT")
            self._host, self._port = parts.hostname, parts.port or 9478
            if parts.scheme == "https":
                self._tls = ssl.create_default_context(cafile=ca_file)
                self._tls.sslsocket_class = _DeadlineTlsSocket
        from powerd.killpoint import killpoint  # bound here so that a bad POWERD_KILL_AT speaks up early

        self.killpoint = killpoint
        self._flight: Callable[[int], None] | None = None
        self._aside: Callable[[bool], None] | None = None
        if os.environ.get("POWERD_SIM_STATE"):
            from powerd.clock import from_environment

            clock = from_environment()
            if clock.simulated and clock.scale == 0.0:
                self._flight, self._aside = clock.flight, clock.aside

    @property
    def where(self) -> str:
        """The daemon's address for people."""
        return str(self.socket_path) if self.socket_path else f"{self._host}:{self._port}"

    def _open(self, timeout_s: float) -> socket.socket:
        if self.socket_path is not None:
            sock = _DeadlineSocket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(timeout_s)
                sock.connect(str(self.socket_path))
                check_server(sock, self.server_uids)
            except BaseException:
                sock.close()
                raise
            return sock
        plain = socket.create_connection((self._host, self._port), timeout_s)
        if self._tls is not None:
            try:
                return self._tls.wrap_socket(plain, server_hostname=self._host)
            except BaseException:
                plain.close()
                raise
        sock = _DeadlineSocket(plain.family, plain.type, plain.proto, fileno=plain.detach())
        sock.settimeout(timeout_s)
        return sock

    def _connection(self, timeout_s: float, *, keep: bool) -> tuple[_Connection, bool]:
        # A POST goes over a new connection: on a kept one that breaks nobody knows whether it was carried out.
        kept = getattr(self._local, "connection", None)
        if keep and kept is not None and self._local.pid == os.getpid() and time.monotonic() - kept.used_s < _IDLE_S:
            return kept, True
        if kept is not None and self._local.pid == os.getpid():
            kept.close()
        fresh = _Connection(self._open, self._host)
        fresh.timeout_s = timeout_s
        self._local.connection, self._local.pid = fresh, os.getpid()
        return fresh, False

    def _headers(self, extra: Mapping[str, str] | None) -> dict[str, str]:
        headers = {API_HEADER: ".".join(map(str, API_VERSION)), "Accept": "application/json", **(extra or {})}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        if self._flight:
            headers[FLIGHT_HEADER] = "1"
        return headers

    def open(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        query: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        connection: _Connection | None = None,
    ) -> tuple[_Connection, http.client.HTTPResponse]:
        """Send one request and return its open answer; raises powerd errors for everything that is not a 2xx."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        target = path
        if query and (pairs := [(k, v) for k, v in query.items() if v is not None]):
            target += "?" + urlencode(pairs, doseq=True)
        conn, reused = (connection, False) if connection is not None else self._connection(limit_s, keep=method != "POST")
        deadline_s = time.monotonic() + limit_s
        try:
            while True:
                try:
                    if conn.sock is None:
                        conn.timeout_s = max(0.001, deadline_s - time.monotonic())
                        conn.connect()
                    conn.until(deadline_s)
                    conn.sock.settimeout(max(0.001, deadline_s - time.monotonic()))
                    conn.request(method, target, body, self._headers(headers))
                    response = conn.getresponse()
                    break
                except _STALE:
                    conn.close()
                    if not reused:
                        raise
                    reused = False
            conn.used_s = time.monotonic()
            self._check_version(response)
            if not 200 <= response.status < 300:
                raise error_of(response.status, response.read(MAX_ANSWER_BYTES))
        except PowerdError:
            conn.close()
            raise
        except TimeoutError as error:
            conn.close()
            raise UnavailableError(
                f"powerd at {self.where} did not answer within {limit_s:g} s", hint="see `powerctl doctor`", code="timeout"
            ) from error
        except FileNotFoundError as error:
            conn.close()
            raise UnavailableError(f"no powerd at {self.where}", hint=_START_HINT) from error
        except ConnectionRefusedError as error:
            conn.close()
            raise UnavailableError(f"nobody listens at {self.where}", hint=_START_HINT) from error
        except PermissionError as error:
            conn.close()
            raise DeniedError(f"no permission for {self.where}", hint="see [access] in powerd.toml") from error
        except (OSError, http.client.HTTPException) as error:
            conn.close()
            raise UnavailableError(f"lost powerd at {self.where}: {error or type(error).__name__}", hint=_START_HINT) from error
        return conn, response

    def _check_version(self, response: http.client.HTTPResponse) -> None:
        stated = response.getheader(API_HEADER)
        if stated is None:
            return
        major = stated.partition(".")[0]
        if major != str(API_VERSION[0]):
            raise RequestError(
                f"powerd at {self.where} speaks API {stated}, this client {'.'.join(map(str, API_VERSION))}",
                hint="install the client of the daemon's version",
                code="version",
            )

    def text(self, method: str, path: str, **options: Any) -> str:
        """One exchange; the answer's body as text."""
        if self._flight and self._aside:
            self._flight(1)
            self._aside(True)
        try:
            conn, response = self.open(method, path, **options)
            try:
                data = response.read(MAX_ANSWER_BYTES)
            except (OSError, http.client.HTTPException) as error:
                conn.close()
                slow = isinstance(error, TimeoutError)
                raise UnavailableError(
                    f"powerd at {self.where} broke off its answer: {error or type(error).__name__}",
                    hint="see `powerctl doctor`",
                    code="timeout" if slow else None,
                ) from error
            if response.will_close:
                conn.close()
            return data.decode("utf-8", "replace")
        finally:
            # Exactly one -1 for our +1: the daemon balances its own answer, and a dead daemon's share is dropped with it.
            if self._flight and self._aside:
                self._aside(False)
                self._flight(-1)

    def json(self, kind: type[T], method: str, path: str, **options: Any) -> T:
        """One exchange; the answer as an object of ``kind``."""
        text = self.text(method, path, **options)
        try:
            return decode(kind, json.loads(text))
        except (ValueError, RecursionError) as error:
            what = error if isinstance(error, CodecError) else "not JSON"
            raise UnavailableError(f"{self.where} answered something that is not powerd's: {what}") from error

    def fresh(self) -> _Connection:
        """A connection of one's own, for a stream."""
        return _Connection(self._open, self._host)

    def close(self) -> None:
        """Close this thread's connection."""
        kept = getattr(self._local, "connection", None)
        if kept is not None and self._local.pid == os.getpid():
            kept.close()
        self._local.connection = None


def error_of(status: int, body: bytes) -> PowerdError:
    """The error that an answer states; an answer without one still says whose fault it looks like."""
    try:
        content = json.loads(body)
        view = decode(ErrorView, content.get("error", content))
    except (ValueError, AttributeError, RecursionError):
        code = next((c.name for c in CODES.values() if c.http_status == status), "internal")
        return _error(code, f"powerd answered HTTP {status}", "")
    return _error(view.code, view.message, view.hint)


def _error(code: str, message: str, hint: str) -> PowerdError:
    row = CODES.get(code)
    if row is None:
        return PowerdError(message, hint=hint)
    if code in ("denied", "monitor_only", "no_permission"):
        return DeniedError(message, hint=hint, code=code)
    if code == "lease_lost":
        return LeaseLostError(message, hint=hint)
    if code == "bad_config":
        return ConfigError(message, hint=hint)
    kinds = {Fault.REQUEST: RequestError, Fault.DEVICE: DeviceError, Fault.DAEMON: UnavailableError}
    return cast(PowerdError, kinds[row.fault](message, hint=hint, code=code))
