"""The worker process as its supervisor sees it: started with the next generation, told, listened to, asked to end, buried.

House rules: one at a time; a new one only when the last one is gone; this side never loads NVML and never waits for the worker.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from powerd.clock import NS, Clock
from powerd.config import Config
from powerd.hw import fence, frames, passing
from powerd.hw.frames import Kind, Table
from powerd.hw.worker import greeting

_START_LIMIT_S = 120.0  # initialising a GPU takes seconds without persistence, each
_SILENCE_S = 20.0  # a starved machine is slow, not broken
_RESTART_S = (0.0, 0.5, 1.0, 2.0, 5.0)


class Keeper:
    """At most one worker and the socket to it; ``on_frame`` and ``on_table`` get what it says, ``on_closed`` the end of that."""

    def __init__(
        self,
        clock: Clock,
        directory: Path,
        *,
        on_frame: Callable[[Kind, bytes], None],
        on_table: Callable[[Table, object], None],
        on_closed: Callable[[], None],
    ) -> None:
        self.generation = 0
        self.ready = False  # the present worker serves
        self.asked = False  # the present worker was told to end
        self.error, self.error_code = "", ""  # what it said last before its end
        self.lock_fd = -1
        self._clock, self._directory = clock, directory
        self._on_frame, self._on_table, self._on_closed = on_frame, on_table, on_closed
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._tables = frames.TableReader()
        self._started_before = False
        self._failures = 0
        self._heard_ns = self._started_ns = 0

    @property
    def pid(self) -> int | None:
        """The worker's process id while there is one."""
        return None if self._process is None else self._process.pid

    @property
    def dying(self) -> bool:
        """Its socket is closed and its process has not ended yet."""
        return self._process is not None and self._link is None

    def start(self, config: Config) -> None:
        """Begin the next generation; its first table says what is still wanted, everything else it restores."""
        patience, waiter = round(config.hw.write_deadline_s * 10), self._clock.waiter("fence")

        def wait(attempt: int) -> bool:
            waiter.wait_until(self._clock.now_ns() + NS // 10)
            return attempt < patience

        self.generation = fence.next_generation(self._directory, wait)
        waiter.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * frames.MAX_FRAME)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * frames.MAX_FRAME)
        environment = dict(os.environ)
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            environment.pop(name, None)
        if self._started_before:
            environment.pop("POWERD_KILL_AT", None)  # a kill point is for the first worker, not for all that follow
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-m", "powerd.hw", "_worker", str(theirs.fileno())],
            pass_fds=(theirs.fileno(), self.lock_fd), env=environment, stdin=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip
        self._started_before = True
        theirs.close()
        self._link, self.ready, self.asked, self.error = ours, False, False, ""
        self._tables = frames.TableReader()
        self._heard_ns = self._started_ns = self._clock.now_ns()
        self.greet(config)
        asyncio.get_running_loop().add_reader(ours, self._receive)

    def greet(self, config: Config) -> None:
        """Tell the worker who it is and its configuration."""
        hello = greeting(config, self._directory, self.generation)
        for frame in frames.encode_table(Kind.HELLO, 0, self._clock.now_ns(), Table.HELLO, hello):
            self.send(frame)

    def send(self, frame: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send one frame to the worker, if there is one that listens; the descriptors stay ours as well."""
        if self._link is None:
            return
        self._clock.flight(1)
        try:
            passing.send(self._link, frame, descriptors)
        except OSError:  # dying, or so far behind that it will be found silent
            self._clock.flight(-1)

    def _receive(self) -> None:
        for _ in range(64):
            if self._link is None:
                return
            try:
                frame = self._link.recv(frames.MAX_FRAME)
            except BlockingIOError:
                return
            except OSError:
                frame = b""
            if not frame:
                self._close()
                return
            try:
                self._frame(frame)
            finally:
                self._clock.flight(-1)

    def _frame(self, frame: bytes) -> None:
        kind = frames.header(frame).kind
        if kind is Kind.SNAPSHOT:
            self.heard()
        if kind is not Kind.TABLE:
            self._on_frame(kind, frame)
        elif (whole := self._tables.feed(frame)) is not None:
            table, content = whole
            if table is Table.STATUS and isinstance(content, dict):
                self.error, self.error_code = str(content.get("error", self.error)), str(content.get("code", ""))
                self.ready = self.ready or bool(content.get("ready"))
            self._on_table(table, content)

    def heard(self) -> None:
        """The worker makes progress."""
        self._heard_ns = self._clock.now_ns()

    def _close(self) -> None:
        """Its socket is closed: it has ended or will at once; one that hangs in the kernel keeps us from starting another."""
        link, self._link, self.ready = self._link, None, False
        if link is not None:
            asyncio.get_running_loop().remove_reader(link)
            link.close()
        self._on_closed()

    def reap(self) -> int | None:
        """The exit code of a worker that has ended since the last call (negative: the signal), else ``None``."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        self._process = None
        self._close()
        return code

    def end_silence(self) -> None:
        """Kill a worker whose main thread says nothing: it makes no driver calls there, so it is broken and its death is safe."""
        if self._process is None or self.asked:
            return
        limit_s = _SILENCE_S if self.ready else _START_LIMIT_S
        if self._clock.scale and self._clock.now_ns() - self._heard_ns > limit_s * NS * max(1.0, self._clock.scale):
            self._process.kill()

    def pause_s(self) -> float:
        """How long to wait before the next worker after one that died: longer each time, at once after a long life."""
        self._failures = 0 if self._clock.now_ns() - self._started_ns > _START_LIMIT_S * NS else self._failures + 1
        return _RESTART_S[min(self._failures - 1, len(_RESTART_S) - 1)] if self._failures else 0.0
