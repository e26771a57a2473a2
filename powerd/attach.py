"""The attach socket: a lease lives no longer than one connection and the process that opened it.

House rules: one first message within seconds, small and complete; whatever happens to the lease is pushed to its holder;
descriptors that a client passes are closed unseen.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from powerd.access import Principal, Rules, may_control
from powerd.api import API_VERSION, ATTACH_MAX_BYTES, ErrorView, PlanView
from powerd.decode import decode
from powerd.engine import Engine
from powerd.errors import LeaseLostError, PowerdError, RequestError
from powerd.lease import Lease, LeaseEvent, token_matches
from powerd.peer import peer_pidfd, unix_principal
from powerd.views import lease_view

_HELLO_S = 5.0
_MAX_CONNECTIONS = 512
_MAX_PER_UID = 256


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message on the attach socket."""

    api: str
    lease: str
    token: str


def error_body(error: PowerdError) -> bytes:
    """``{"error": {...}}`` of an error."""
    view = ErrorView(error.code.name, error.message, error.hint, error.code.fault.value)
    return msgspec.json.encode({"error": view})


def check_version(stated: str) -> None:
    """Another major version cannot be served. RequestError(version)."""
    major = stated.partition(".")[0]
    if major != str(API_VERSION[0]):
        ours = f"{API_VERSION[0]}.{API_VERSION[1]}"
        hint = "install the client of this daemon's version"
        raise RequestError(f"this powerd speaks API {ours}, the client {stated[:20]!r}", hint=hint, code="version")


class _Connection:
    """One client: first a hello, then silence until one side ends it."""

    def __init__(self, server: AttachServer, link: socket.socket, who: Principal) -> None:
        self.server, self.link, self.who = server, link, who
        self.lease_id: str | None = None
        self.pidfd = peer_pidfd(link, who.pid or 0)
        loop = asyncio.get_running_loop()
        loop.add_reader(link, self._readable)
        self._deadline: asyncio.TimerHandle | None = loop.call_later(_HELLO_S, self.close)

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a holder that does not read is told nothing
            self.link.send(data)

    def _readable(self) -> None:
        try:
            data, ancillary, flags, _ = self.link.recvmsg(ATTACH_MAX_BYTES + 1, socket.CMSG_SPACE(64))
        except BlockingIOError:
            return
        except OSError:
            data, ancillary, flags = b"", [], 0
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                for descriptor in array.array("i", content[: len(content) // 4 * 4]):
                    os.close(descriptor)
        if not data:
            dead = self.pidfd is not None and not self.server.alive(self.pidfd)
            self.gone(LeaseEvent.HOLDER_DIED if dead else LeaseEvent.CONNECTION_CLOSED)
            return
        try:
            if self.lease_id is not None:
                raise RequestError("one message only: this connection is bound already")
            if len(data) > ATTACH_MAX_BYTES or flags & socket.MSG_TRUNC or ancillary:
                raise RequestError(f"at most {ATTACH_MAX_BYTES} bytes and no descriptors")
            self._hello(decode(data, Hello))
        except PowerdError as error:
            self.send(error_body(error))
            if self.lease_id is None:
                self.close()

    def _hello(self, hello: Hello) -> None:
        check_version(hello.api)
        engine = self.server.engine
        lease = engine.book.get(hello.lease)
        if lease is None or not token_matches(lease, hello.token):
            raise LeaseLostError("no such lease, or not its token", hint="acquire a new one")
        if self.who.foreign or not (self.who.uid == lease.uid or may_control(self.who, self.server.rules()).allowed):
            raise RequestError("only the user who holds the lease may attach to it", code="denied")
        if lease.detached:
            raise RequestError("a detached lease is bound to its TTL only", hint="send heartbeats", code="conflict")
        if self.pidfd is None:
            raise RequestError("the process that connected is gone or in a foreign namespace", code="denied")
        lease = engine.attach(lease.id)
        self.server.bind(self, lease)
        self.send(msgspec.json.encode(lease_view(engine, lease)))
        for view in engine.plans.of(lease.id):
            self.server.plan_changed(view)

    def watch_holder(self) -> None:
        if self.pidfd is not None:
            asyncio.get_running_loop().add_reader(self.pidfd, self.gone, LeaseEvent.HOLDER_DIED)

    def gone(self, event: LeaseEvent) -> None:
        """The other side is gone: its lease ends at once."""
        lease_id = self.lease_id
        self.close()
        if lease_id is not None:
            self.server.engine.holder_gone(lease_id, event)

    def close(self) -> None:
        self.server.forget(self)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        loop = asyncio.get_running_loop()
        if self.link.fileno() >= 0:
            loop.remove_reader(self.link)
            self.link.close()
        if self.pidfd is not None:
            loop.remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = None

    def bound(self, lease_id: str) -> None:
        self.lease_id = lease_id
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self.watch_holder()


class AttachServer:
    """Listens on the attach socket and ties leases to connections and processes."""

    def __init__(self, engine: Engine, listener: socket.socket, rules: Callable[[], Rules], alive: Callable[[int], bool]) -> None:
        self.engine = engine
        self.rules = rules
        self.alive = alive
        self._listener = listener
        self._connections: set[_Connection] = set()
        self._bound: dict[str, _Connection] = {}
        self._holders: dict[str, int] = {}  # pidfds of holders whose connection has not come yet

    def start(self) -> None:
        """Begin to accept; needs a running loop."""
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def stop(self) -> None:
        """Close everything without ending a lease: its holder may come back to the next powerd."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        self._listener.close()
        for connection in list(self._connections):
            connection.close()
        for lease_id in list(self._holders):
            self._unwatch(lease_id)

    def _accept(self) -> None:
        for _ in range(16):
            try:
                link, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                return
            link.setblocking(False)
            try:
                who = unix_principal(link)
            except OSError:
                link.close()
                continue
            mine = sum(1 for c in self._connections if c.who.uid == who.uid)
            if len(self._connections) >= _MAX_CONNECTIONS or mine >= _MAX_PER_UID:
                with contextlib.suppress(OSError):
                    link.send(error_body(RequestError("too many connections", code="too_many")))
                link.close()
                continue
            self._connections.add(_Connection(self, link, who))

    def watch_holder(self, lease: Lease, pidfd: int) -> None:
        """Until the connection of a fresh lease comes, its holder's death ends it; takes the descriptor over."""
        self._holders[lease.id] = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._holder_died, lease.id)

    def _holder_died(self, lease_id: str) -> None:
        self._unwatch(lease_id)
        self.engine.holder_gone(lease_id, LeaseEvent.HOLDER_DIED)

    def _unwatch(self, lease_id: str) -> None:
        if (pidfd := self._holders.pop(lease_id, None)) is not None:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)

    def bind(self, connection: _Connection, lease: Lease) -> None:
        """This connection is the lease's from now on; an earlier one is let go without ending the lease."""
        self._unwatch(lease.id)
        if (earlier := self._bound.pop(lease.id, None)) is not None and earlier is not connection:
            earlier.lease_id = None
            earlier.close()
        self._bound[lease.id] = connection
        connection.bound(lease.id)

    def forget(self, connection: _Connection) -> None:
        """A connection was closed."""
        self._connections.discard(connection)
        if connection.lease_id is not None and self._bound.get(connection.lease_id) is connection:
            del self._bound[connection.lease_id]

    def attached(self, lease_id: str) -> bool:
        """Whether the lease has its connection."""
        return lease_id in self._bound

    def pass_beats(self, view: PlanView, beats: socket.socket) -> bool:
        """Give a plan's holder its end of the beat socket, which is closed here; False: it does not listen."""
        connection = self._bound.get(view.lease)
        with beats:
            if connection is None:
                return False
            message = msgspec.json.encode({"beats": view.id, "number": view.number})
            try:
                socket.send_fds(connection.link, [message], [beats.fileno()])
            except OSError:
                return False
        return True

    def plan_changed(self, view: PlanView) -> None:
        """Tell a plan's holder how it stands."""
        if (connection := self._bound.get(view.lease)) is not None:
            connection.send(msgspec.json.encode({"plan": view}))

    def lease_changed(self, lease: Lease) -> None:
        """Push a lease's new state to its holder; the end of it as an error, after which the connection closes."""
        if not lease.live:
            self._unwatch(lease.id)
        connection = self._bound.get(lease.id)
        if connection is None:
            return
        if lease.live:
            connection.send(msgspec.json.encode(lease_view(self.engine, lease)))
            return
        error = LeaseLostError(f"lease {lease.id} has ended: {lease.end}", hint="acquire a new one")
        connection.send(error_body(error))
        connection.lease_id = None
        self._bound.pop(lease.id, None)
        connection.close()
