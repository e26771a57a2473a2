"""The socket at which powerd knocks: who may come in, one at a time, and what is said to it.

House rules: the uid of every caller is checked; nothing it says is believed before it is decoded; a frame that does not parse
changes nothing, and who speaks another language is told so and shown out; descriptors that nobody takes are closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from powerd.clock import Clock
from powerd.errors import ConfigError
from powerd.hw import frames, passing
from powerd.hw.frames import FrameError, Kind, Table
from powerd.hw.peer import Peer
from powerd.hw.systemd import inherited_listener


class Door:
    """The listener and the one connected powerd."""

    def __init__(
        self,
        clock: Clock,
        path: Path,
        peer_user: str,
        *,
        hello: Callable[[], dict[str, object]],
        on_arrival: Callable[[], None],
        on_frame: Callable[[frames.Header, bytes, list[int]], None],
        on_refused: Callable[[str], None],
        on_leave: Callable[[], None],
    ) -> None:
        self.had_peer = False
        self._clock, self._path, self._shared = clock, path, bool(peer_user)
        self._hello, self._on_arrival, self._on_frame = hello, on_arrival, on_frame
        self._on_refused, self._on_leave = on_refused, on_leave
        self._peer: Peer | None = None
        self._listener: socket.socket | None = None
        self._allowed = {0, os.geteuid()}
        if peer_user:
            try:
                self._allowed.add(pwd.getpwnam(peer_user).pw_uid)
            except KeyError as error:
                raise ConfigError(f"hw.peer_user: there is no user {peer_user!r}") from error

    @property
    def open(self) -> bool:
        """Whether a powerd is connected."""
        return self._peer is not None

    def listen(self, inherited: socket.socket | None) -> None:
        """Accept from now on; ``inherited`` is a powerd that is connected already."""
        self._listener = inherited_listener() or self._bind()
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)
        if inherited is not None:
            self._adopt(inherited)

    def _bind(self) -> socket.socket:
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()  # ours alone: the lock is held
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        listener.bind(str(self._path))
        os.chmod(self._path, 0o666 if self._shared else 0o600)  # the uid is checked on every connection
        listener.listen(8)
        return listener

    def close(self) -> None:
        """Nobody comes in any more."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        if self._peer:
            self._peer.close()
        with contextlib.suppress(FileNotFoundError):
            if not os.environ.get("NOTIFY_SOCKET"):
                self._path.unlink()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            link, _ = self._listener.accept()
        except OSError:
            return
        link.setblocking(False)
        uid = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if uid not in self._allowed:
            self._turn_away(link, f"uid {uid} may not connect to powerd-hw: set hw.peer_user")
        elif self._peer is not None and not self._peer_has_left():
            self._turn_away(link, "another powerd is connected")
        else:
            self._adopt(link)

    def _peer_has_left(self) -> bool:
        """The old connection's end may still be behind the new one in this turn of the loop."""
        assert self._peer is not None
        try:
            if self._peer.link.recv(1, socket.MSG_PEEK):
                return False
        except BlockingIOError:
            return False
        except OSError:
            pass
        self._drop()
        return True

    def _greeting(self, **more: object) -> list[bytes]:
        return frames.encode_table(Kind.HELLO, 0, self._clock.now_ns(), Table.HELLO, {**self._hello(), **more})

    def _turn_away(self, link: socket.socket, why: str) -> None:
        for frame in self._greeting(refused=why):
            self._clock.flight(1)
            try:
                link.send(frame)
            except OSError:
                self._clock.flight(-1)
        link.close()

    def _adopt(self, link: socket.socket) -> None:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * frames.MAX_FRAME)
        link.setblocking(False)
        self._peer, self.had_peer = Peer(link, self._clock), True
        asyncio.get_running_loop().add_reader(link, self._receive)
        for frame in self._greeting():
            self._peer.send(frame)
        self._on_arrival()

    def _receive(self) -> None:
        for _ in range(64):
            peer = self._peer
            if peer is None:
                return
            descriptors: list[int] = []
            try:
                frame, descriptors = passing.receive(peer.link)
            except BlockingIOError:
                return
            except OSError:
                frame = b""
            if not frame or peer.broken:
                passing.close(descriptors)
                self._drop()
                return
            try:
                self._frame(peer, frame, descriptors)
            except FrameError as error:
                self._on_refused(str(error))
                with contextlib.suppress(FrameError):
                    frames.header(frame)
                    continue
                self._show_out(str(error))
                return
            finally:
                passing.close(descriptors)
                self._clock.flight(-1)

    def _frame(self, peer: Peer, frame: bytes, descriptors: list[int]) -> None:
        head = frames.header(frame)
        if head.kind is not Kind.HELLO:
            self._on_frame(head, frame, descriptors)
            return
        whole = peer.reader.feed(frame)
        if whole and isinstance(whole[1], dict) and whole[1].get("wire") != frames.WIRE_VERSION:
            self._show_out(f"wire version {whole[1].get('wire')}, this side speaks {frames.WIRE_VERSION}: upgrade both")

    def _show_out(self, why: str) -> None:
        if self._peer is not None:
            for frame in self._greeting(refused=why):
                self._peer.send(frame)
            self._drop()

    def _drop(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None
            self._on_leave()

    def send(self, frame: bytes, *, may_drop: bool = False) -> None:
        """Send one frame to powerd, if one is connected."""
        if self._peer is not None:
            self._peer.send(frame, may_drop=may_drop)

    def table(self, table: Table, content: object, kind: Kind = Kind.TABLE) -> None:
        """Send one table to powerd, if one is connected."""
        if self._peer is not None:
            for frame in frames.encode_table(kind, 0, self._clock.now_ns(), table, content):
                self._peer.send(frame)
