"""powerd's end of the socket to powerd-hw: connect, agree on a version, hand frames over, connect again.

House rules: nothing that arrives is trusted before it is decoded; the desired table is sent whole and only the newest one waits;
on a stepped clock every frame is counted while it travels.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from powerd.api import API_VERSION
from powerd.clock import Clock
from powerd.hw import frames, passing
from powerd.log import log
from powerd.model import Outcome, Reading

_RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0)
_MAX_COMMANDS = 16
_MAX_PLAN_FRAMES = 4096


class HwListener(Protocol):
    """Who is told what hw says; every method is quick and never raises."""

    def hw_connected(self, hello: dict[str, Any]) -> None: ...
    def hw_disconnected(self, why: str) -> None: ...
    def hw_snapshot(self, seq: int, time_ns: int, readings: tuple[Reading, ...]) -> None: ...
    def hw_outcomes(self, outcomes: tuple[Outcome, ...]) -> None: ...
    def hw_table(self, table: frames.Table, content: Any) -> None: ...


class Hw(Protocol):
    """What the engine needs of the link to powerd-hw."""

    @property
    def connected(self) -> bool: ...
    def send_desired(self, rows: Sequence[frames.Desired]) -> int: ...
    def command(self, command: frames.Command, argument: int = 0) -> None: ...
    def plan(self, content: dict[str, Any], beats: socket.socket | None = None) -> bool: ...


class HwLink:
    """The connection to powerd-hw; ``run`` keeps it up until it is cancelled."""

    def __init__(self, path: Path, clock: Clock, listener: HwListener) -> None:
        self.path = path
        self._clock = clock
        self._listener = listener
        self._socket: socket.socket | None = None
        self._ready = False  # hw has said who it is
        self._seq = 0
        self._reader = frames.TableReader()
        self._closed = asyncio.Event()
        self._why = ""
        self._desired: bytes | None = None  # the newest table that the socket has not taken yet
        self._commands: deque[bytes] = deque(maxlen=_MAX_COMMANDS)
        self._plans: deque[tuple[bytes, socket.socket | None]] = deque()

    @property
    def connected(self) -> bool:
        """Whether hw has answered and takes tables."""
        return self._ready

    def send_desired(self, rows: Sequence[frames.Desired]) -> int:
        """Send the whole desired table; the answer is its sequence number, which outcomes refer to."""
        self._seq += 1
        self._desired = frames.encode_desired(self._seq, self._clock.now_ns(), rows)
        self._flush()
        return self._seq

    def command(self, command: frames.Command, argument: int = 0) -> None:
        """Send one command; it is lost when hw is not connected (the engine repeats its state on every connect)."""
        if self._ready:
            self._seq += 1
            self._commands.append(frames.encode_command(self._seq, self._clock.now_ns(), command, argument))
            self._flush()

    def plan(self, content: dict[str, Any], beats: socket.socket | None = None) -> bool:
        """Send a clock plan with hw's end of its beat socket, which is closed here when it has gone; False: not connected."""
        if not self._ready or len(self._plans) > _MAX_PLAN_FRAMES:
            return False
        chunks = frames.encode_table(frames.Kind.PLAN, 0, self._clock.now_ns(), frames.Table.PLAN, content)
        self._plans += [(chunk, beats if chunk is chunks[-1] else None) for chunk in chunks]
        self._flush()
        return True

    async def run(self) -> None:
        """Keep connected; never returns but by cancellation."""
        failures = 0
        told = ""
        while True:
            self._closed.clear()
            self._why = ""
            try:
                self._open()
                await self._closed.wait()
            except OSError as error:
                self._why = f"{self.path}: {error.strerror or error}"
            finally:
                was_ready = self._ready
                self._close()
            if was_ready:
                failures, told = 0, ""
            if was_ready or self._why != told:
                told = self._why
                self._listener.hw_disconnected(self._why)
            await asyncio.sleep(_RETRY_S[min(failures, len(_RETRY_S) - 1)])
            failures += 1

    def _open(self) -> None:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            link.connect(str(self.path))
            link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * frames.MAX_FRAME)
        except OSError:
            link.close()
            raise
        self._socket = link
        self._reader = frames.TableReader()
        hello = {"api": f"{API_VERSION[0]}.{API_VERSION[1]}", "wire": frames.WIRE_VERSION}
        for frame in frames.encode_table(frames.Kind.HELLO, 0, self._clock.now_ns(), frames.Table.HELLO, hello):
            self._put(frame)
        asyncio.get_running_loop().add_reader(link, self._receive)

    def _close(self) -> None:
        link, self._socket, self._ready = self._socket, None, False
        self._desired = None
        self._commands.clear()
        for _, beats in self._plans:
            if beats is not None:
                beats.close()
        self._plans.clear()
        if link is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(link)
        loop.remove_writer(link)
        with contextlib.suppress(OSError):
            while link.recv(frames.MAX_FRAME):  # what was under way is no longer: stepped time must not wait for it
                self._clock.flight(-1)
        link.close()

    def _fail(self, why: str) -> None:
        self._why = self._why or why
        self._closed.set()

    def _put(self, frame: bytes, beats: socket.socket | None = None) -> bool:
        """Send one frame; False when the socket is full."""
        if self._socket is None:
            return True
        self._clock.flight(1)
        try:
            passing.send(self._socket, frame, () if beats is None else (beats.fileno(),))
        except BlockingIOError:
            self._clock.flight(-1)
            return False
        except OSError as error:
            self._clock.flight(-1)
            self._fail(f"powerd-hw: {error.strerror or error}")
        return True

    def _flush(self) -> None:
        if self._socket is None or not self._ready:
            return
        loop = asyncio.get_running_loop()
        while self._commands:
            if not self._put(self._commands[0]):
                loop.add_writer(self._socket, self._flush)
                return
            self._commands.popleft()
        while self._plans and self._desired is None:  # a setpoint goes before the plan below it
            frame, beats = self._plans[0]
            if not self._put(frame, beats):
                loop.add_writer(self._socket, self._flush)
                return
            self._plans.popleft()
            if beats is not None:
                beats.close()
        if self._desired is not None:
            if not self._put(self._desired):
                loop.add_writer(self._socket, self._flush)
                return
            self._desired = None
            self._flush()
        elif self._socket is not None:
            loop.remove_writer(self._socket)

    def _receive(self) -> None:
        for _ in range(32):  # then let others have the loop
            if self._socket is None:
                return
            try:
                frame = self._socket.recv(frames.MAX_FRAME)
            except BlockingIOError:
                return
            except OSError as error:
                self._fail(f"powerd-hw: {error.strerror or error}")
                return
            if not frame:
                self._fail("powerd-hw closed the connection" if self._ready else "powerd-hw refused the connection")
                return
            self._clock.flight(-1)
            try:
                self._handle(frame)
            except frames.FrameError as error:
                log("hw_frame_refused", why=error)
                if not self._ready:
                    self._fail(f"powerd-hw: {error}")
                    return

    def _handle(self, frame: bytes) -> None:
        head = frames.header(frame)
        if head.kind is frames.Kind.SNAPSHOT:
            self._listener.hw_snapshot(head.seq, head.time_ns, frames.decode_snapshot(frame))
        elif head.kind is frames.Kind.OUTCOME:
            self._listener.hw_outcomes(frames.decode_outcomes(frame))
        elif head.kind not in (frames.Kind.HELLO, frames.Kind.TABLE, frames.Kind.EVENT):
            return  # a newer hw may say more
        elif (whole := self._reader.feed(frame)) is not None:
            table, content = whole
            if table is frames.Table.HELLO:
                self._greet(content)
            else:
                self._listener.hw_table(table, content)

    def _greet(self, hello: Any) -> None:
        if not isinstance(hello, dict):
            raise frames.FrameError("HELLO is not an object")
        if refused := hello.get("refused"):
            self._fail(f"powerd-hw refused: {refused}")
            return
        if hello.get("wire") != frames.WIRE_VERSION:
            raise frames.FrameError(f"wire version {hello.get('wire')}: upgrade powerd and powerd-hw together")
        self._ready = True
        self._listener.hw_connected(hello)
