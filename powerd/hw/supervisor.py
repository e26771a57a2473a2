"""The part of powerd-hw without NVML: owns the socket, the desired table and its ends, and the one worker that touches GPUs.

House rules: nothing powerd says is believed before it is decoded; nobody but the supervisor starts a worker, one at a time, each
with a higher generation; the watchdog is fed by snapshots that flow, not by a loop that turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

from powerd import __version__
from powerd.clock import NS, Clock
from powerd.config import Config, hw_socket, journal_dir
from powerd.errors import CODES, EXIT_OK, EXIT_TEMPFAIL, ConfigError
from powerd.hw import fence, frames, handover
from powerd.hw.desired import DesiredTable
from powerd.hw.frames import Command, FrameError, Kind, Table
from powerd.hw.journal import boot_id, prepare_directory
from powerd.hw.peer import Peer
from powerd.hw.systemd import inherited_listener, notify, watchdog_ns
from powerd.hw.tables import event_row
from powerd.hw.worker import CAUSES, LEAVE_SETTINGS, greeting
from powerd.killpoint import killpoint
from powerd.model import Event, Restart

_START_LIMIT_S = 120.0  # initialising a GPU takes seconds without persistence, each
_SILENCE_S = 20.0  # a starved machine is slow, not broken
_RESTART_S = (0.0, 0.5, 1.0, 2.0, 5.0)
_STOP_LIMIT_S = 20.0
_LONELY_S = 60.0  # a development child that nobody ever talked to


class Supervisor:
    """One powerd-hw; ``run`` serves until SIGTERM and returns the exit code."""

    def __init__(self, config: Config, clock: Clock, *, path: Path | None = None, exit_with_peer: bool = False) -> None:
        self._config, self._clock = config, clock
        self._path = path or hw_socket(config)
        self._directory = journal_dir(config)
        self._exit_with_peer = exit_with_peer
        self._table = DesiredTable(round(config.hw.grace_s * NS))
        self._peer: Peer | None = None
        self._had_peer = False
        self._worker: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._worker_tables = frames.TableReader()
        self._ready = False  # the present worker serves
        self._was_ready = False
        self._asked = False  # the present worker was told to end
        self._error, self._error_code = "", ""
        self._failures = 0
        self._generation = 0
        self._generation_started = False
        self._watchdog_ns = watchdog_ns()
        self._capabilities: object = None
        self._processes: object = None
        self._events = 0
        self._heard_ns = self._started_ns = 0
        self._fed_ns = 0
        self._resume_ns: int | None = None
        self._exit: asyncio.Future[int]
        self._wake = asyncio.Event()
        self._lock_fd = -1
        self._allowed = {0, os.geteuid()}

    # life

    async def run(self, inherited: socket.socket | None = None) -> int:
        """Serve; 0 after a clean end, 75 when something is left to restore or another powerd-hw runs."""
        loop = asyncio.get_running_loop()
        self._exit = loop.create_future()
        prepare_directory(self._directory)
        lock = fence.take_lock(self._directory)
        if lock is None:
            print(f"powerd-hw: another one holds {self._directory}/lock: stop it first", file=sys.stderr)
            return EXIT_TEMPFAIL
        self._lock_fd = lock
        if user := self._config.hw.peer_user:
            try:
                self._allowed.add(pwd.getpwnam(user).pw_uid)
            except KeyError as error:
                raise ConfigError(f"hw.peer_user: there is no user {user!r}") from error
        listener = inherited_listener() or self._listen()
        listener.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._terminate)
        loop.add_reader(listener, self._accept, listener)
        if until_ns := handover.until(self._directory, self._clock.now_ns()):
            self._table.begin_grace(until_ns)
        if inherited is not None:
            self._adopt(inherited)
        self._start_worker()
        keeper = loop.create_task(self._keep())
        keeper.add_done_callback(self._kept)
        try:
            return await self._exit
        finally:
            keeper.cancel()
            loop.remove_reader(listener)
            listener.close()
            if self._peer:
                self._peer.close()
            with contextlib.suppress(FileNotFoundError):
                if not os.environ.get("NOTIFY_SOCKET"):
                    self._path.unlink()

    def _listen(self) -> socket.socket:
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()  # ours alone: the lock is held
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        listener.bind(str(self._path))
        os.chmod(self._path, 0o666 if self._config.hw.peer_user else 0o600)  # the uid is checked on every connection
        listener.listen(8)
        return listener

    def _kept(self, keeper: asyncio.Task[None]) -> None:
        """Without its keeper nothing would expire: end with a traceback, so that the journal is replayed."""
        if not keeper.cancelled() and (error := keeper.exception()) is not None and not self._exit.done():
            self._exit.set_exception(error)

    def _terminate(self) -> None:
        self._table.drop("shutdown", Restart.SHUTDOWN)
        notify("STOPPING=1", "STATUS=restoring every GPU to baseline")
        self._stop_worker(Restart.SHUTDOWN)
        asyncio.get_running_loop().call_later(_STOP_LIMIT_S, self._finish, EXIT_TEMPFAIL)

    def _finish(self, code: int) -> None:
        if not self._exit.done():
            self._exit.set_result(code)

    # the worker

    def _start_worker(self) -> None:
        """Begin the next generation; its first table says what is still wanted, everything else it restores."""
        patience, waiter = round(self._config.hw.write_deadline_s * 10), self._clock.waiter("fence")

        def wait(attempt: int) -> bool:
            waiter.wait_until(self._clock.now_ns() + NS // 10)
            return attempt < patience

        self._generation = fence.next_generation(self._directory, wait)
        waiter.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * frames.MAX_FRAME)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * frames.MAX_FRAME)
        environment = dict(os.environ)
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            environment.pop(name, None)
        if self._generation_started:
            environment.pop("POWERD_KILL_AT", None)  # a kill point is for the first worker, not for all that follow
        self._worker = subprocess.Popen(
            [sys.executable, "-I", "-m", "powerd.hw", "_worker", str(theirs.fileno())],
            pass_fds=(theirs.fileno(), self._lock_fd), env=environment, stdin=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip
        self._generation_started = True
        theirs.close()
        self._link, self._ready, self._asked, self._error = ours, False, False, ""
        self._worker_tables = frames.TableReader()
        self._heard_ns = self._started_ns = self._clock.now_ns()
        hello = greeting(self._config, self._directory, self._generation)
        for frame in frames.encode_table(Kind.HELLO, 0, self._heard_ns, Table.HELLO, hello):
            self._to_worker(frame)
        asyncio.get_running_loop().add_reader(ours, self._from_worker)

    def _to_worker(self, frame: bytes) -> None:
        if self._link is None:
            return
        self._clock.flight(1)
        try:
            self._link.send(frame)
        except OSError:  # dying, or so far behind that it will be found silent
            self._clock.flight(-1)

    def _from_worker(self) -> None:
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
                self._worker_closed()
                return
            try:
                self._worker_frame(frame)
            finally:
                self._clock.flight(-1)

    def _worker_frame(self, frame: bytes) -> None:
        head = frames.header(frame)
        if head.kind is Kind.SNAPSHOT:
            self._progress()
            if self._peer:
                self._peer.send(frame, may_drop=True)
        elif head.kind is Kind.TABLE:
            if (whole := self._worker_tables.feed(frame)) is not None:
                self._worker_table(*whole)
        elif self._peer:
            self._peer.send(frame)

    def _worker_table(self, table: Table, content: object) -> None:
        if table is Table.STATUS and isinstance(content, dict):
            self._error, self._error_code = str(content.get("error", self._error)), str(content.get("code", ""))
            if content.get("ready"):
                self._serving()
            return
        if table is Table.CAPABILITIES:
            self._capabilities = content
        elif table is Table.PROCESSES:
            self._processes = content
        self._tell_table(table, content)

    def _serving(self) -> None:
        """The worker has opened its GPUs: give it the table, unless a hand-over says to wait for powerd's."""
        self._ready = self._was_ready = True
        self._progress()
        if not self._table.adopting:
            self._send_desired()
        notify("READY=1", f"STATUS=generation {self._generation} serves")
        self._status()

    def _send_desired(self) -> None:
        if not self._ready or self._asked:
            return
        handover.clear(self._directory)
        table = self._table
        self._to_worker(frames.encode_desired(table.seq, table.received_ns or self._clock.now_ns(), table.rows()))
        self._wake.set()

    def _progress(self) -> None:
        now_ns = self._heard_ns = self._clock.now_ns()
        if (every_ns := self._watchdog_ns) is not None and now_ns - self._fed_ns >= every_ns:
            self._fed_ns = now_ns
            notify("WATCHDOG=1")

    def _stop_worker(self, cause: Restart) -> None:
        """Ask the worker to restore everything, give back its handles and exit."""
        if self._worker is None:
            self._worker_gone(EXIT_OK)
            return
        self._asked = True
        leave = cause is Restart.SHUTDOWN and handover.active(self._directory, self._clock.now_ns())
        argument = CAUSES.index(cause) | (LEAVE_SETTINGS if leave else 0)
        self._to_worker(frames.encode_command(0, self._clock.now_ns(), Command.QUIESCE, argument))

    def _worker_closed(self) -> None:
        """Its socket is closed: it has ended or will at once; one that hangs in the kernel keeps us from starting another."""
        link, self._link, self._ready = self._link, None, False
        if link is not None:
            asyncio.get_running_loop().remove_reader(link)
            link.close()
        self._wake.set()

    def _worker_gone(self, code: int) -> None:
        self._worker = None
        self._worker_closed()
        hold = self._table.hold
        if hold == "shutdown":
            if self._error:
                print(f"powerd-hw: {self._error}", file=sys.stderr)
            self._finish(EXIT_OK if code == EXIT_OK else EXIT_TEMPFAIL)
        elif hold == "quiesced":
            self._status()
        else:
            self._crashed(code)

    def _crashed(self, code: int) -> None:
        why = self._error or f"the worker died ({f'signal {-code}' if code < 0 else f'exit code {code}'})"
        if not self._was_ready:
            print(f"powerd-hw: {why}", file=sys.stderr)
            self._status()  # powerd passes the reason on to whoever asks
            self._finish(CODES[self._error_code].exit_code if self._error_code in CODES else EXIT_TEMPFAIL)
            return
        self._tell("worker_died", why)
        now_ns = self._clock.now_ns()
        if not self._error and self._table.worker_died(now_ns):
            self._table.drop("safe_mode", Restart.JOURNAL_REPLAY)
            self._tell("safe_mode", "three crashes within a minute: everything at baseline, read-only until powerctl resume")
        self._failures = 0 if now_ns - self._started_ns > _START_LIMIT_S * NS else self._failures + 1
        delay_s = _RESTART_S[min(self._failures - 1, len(_RESTART_S) - 1)] if self._failures else 0.0
        asyncio.get_running_loop().call_later(delay_s, self._restart)

    def _restart(self) -> None:
        if self._worker is None and self._table.hold not in ("shutdown", "quiesced"):
            self._start_worker()

    # time

    async def _keep(self) -> None:
        """Expiries, grace, resume, a silent or dead worker."""
        started_ns = self._clock.now_ns()
        while True:
            now_ns = self._clock.now_ns()
            self._reap()
            if self._table.expire(now_ns):
                self._send_desired()
                if self._exit_with_peer and self._peer is None and not self._table.in_grace:
                    self._terminate()
            if self._resume_ns is not None and now_ns >= self._resume_ns:
                self._resume()
            lonely = self._exit_with_peer and not self._had_peer and now_ns - started_ns > _LONELY_S * NS
            if lonely and self._table.hold != "shutdown":
                self._terminate()
            self._check_silence(now_ns)
            next_ns = min(self._table.next_ns(), self._resume_ns or self._table.next_ns(), now_ns + NS)
            self._wake.clear()
            if self._worker is not None and self._link is None:
                next_ns = min(next_ns, now_ns + NS // 100)  # its socket closed: the process ends in a moment
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(0.0, (next_ns - now_ns) / NS))

    def _reap(self) -> None:
        if self._worker is not None and (code := self._worker.poll()) is not None:
            self._worker_gone(code)

    def _check_silence(self, now_ns: int) -> None:
        """A worker whose main thread says nothing makes no driver calls there: it is broken, and its death is safe to force."""
        if self._worker is None or self._asked:
            return
        limit_s = _SILENCE_S if self._ready else _START_LIMIT_S
        if self._clock.scale and now_ns - self._heard_ns > limit_s * NS * max(1.0, self._clock.scale):
            self._worker.kill()

    # powerd

    def _accept(self, listener: socket.socket) -> None:
        try:
            link, _ = listener.accept()
        except OSError:
            return
        link.setblocking(False)
        uid = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if uid not in self._allowed:
            self._refuse(link, f"uid {uid} may not connect to powerd-hw: set hw.peer_user")
        elif self._peer is not None and not self._peer_has_left():
            self._refuse(link, "another powerd is connected")
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
        self._drop_peer()
        return True

    def _refuse(self, link: socket.socket, why: str) -> None:
        for frame in frames.encode_table(Kind.HELLO, 0, self._clock.now_ns(), Table.HELLO, {**self._hello(), "refused": why}):
            self._clock.flight(1)
            try:
                link.send(frame)
            except OSError:
                self._clock.flight(-1)
        link.close()

    def _hello(self) -> dict[str, object]:
        return {
            "role": "powerd-hw", "version": __version__, "wire": frames.WIRE_VERSION, "pid": os.getpid(),
            "generation": self._generation, "boot_id": boot_id().hex(), "grace_s": self._config.hw.grace_s,
        }  # fmt: skip

    def _adopt(self, link: socket.socket) -> None:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * frames.MAX_FRAME)
        link.setblocking(False)
        self._peer, self._had_peer = Peer(link, self._clock), True
        asyncio.get_running_loop().add_reader(link, self._from_peer)
        for frame in frames.encode_table(Kind.HELLO, 0, self._clock.now_ns(), Table.HELLO, self._hello()):
            self._peer.send(frame)
        if self._capabilities is not None:
            self._tell_table(Table.CAPABILITIES, self._capabilities)
        if self._processes is not None:
            self._tell_table(Table.PROCESSES, self._processes)
        self._status()

    def _from_peer(self) -> None:
        for _ in range(64):
            peer = self._peer
            if peer is None:
                return
            try:
                frame = peer.link.recv(frames.MAX_FRAME)
            except BlockingIOError:
                return
            except OSError:
                frame = b""
            if not frame or peer.broken:
                self._drop_peer()
                return
            try:
                self._peer_frame(peer, frame)
            except FrameError as error:
                self._tell("frame_refused", str(error))
                with contextlib.suppress(FrameError):
                    frames.header(frame)
                    continue
                self._refuse_peer(str(error))
                return
            finally:
                self._clock.flight(-1)

    def _refuse_peer(self, why: str) -> None:
        peer = self._peer
        if peer is not None:
            for frame in frames.encode_table(Kind.HELLO, 0, self._clock.now_ns(), Table.HELLO, {**self._hello(), "refused": why}):
                peer.send(frame)
            self._drop_peer()

    def _peer_frame(self, peer: Peer, frame: bytes) -> None:
        head = frames.header(frame)
        if head.kind is Kind.DESIRED:
            rows = frames.decode_desired(frame)
            killpoint("hw.desired.received")
            if self._table.hold is None:
                self._table.submit(head.seq, rows, self._clock.now_ns())
                self._send_desired()
            else:
                self._tell("desired_refused", f"{self._table.hold}: no wants until resume")
        elif head.kind is Kind.COMMAND:
            self._command(*frames.decode_command(frame))
        elif head.kind is Kind.HELLO:
            whole = peer.reader.feed(frame)
            if whole and isinstance(whole[1], dict) and whole[1].get("wire") != frames.WIRE_VERSION:
                self._refuse_peer(f"wire version {whole[1].get('wire')}, this side speaks {frames.WIRE_VERSION}: upgrade both")
        elif head.kind is Kind.PLAN:
            raise FrameError("this powerd-hw takes no clock plans")
        else:
            raise FrameError(f"{head.kind.name} is not for powerd-hw")

    def _command(self, command: Command, argument: int) -> None:
        if command is Command.PANIC:
            self._table.drop("panic", Restart.PANIC)
            self._send_desired()
            self._tell("panic", "everything to baseline; wants are refused until resume")
            self._status()
        elif command is Command.QUIESCE and self._table.hold != "shutdown":
            self._table.drop("quiesced", Restart.QUIESCE)
            self._resume_ns = self._clock.now_ns() + argument * 1_000_000 if argument else None
            self._stop_worker(Restart.QUIESCE)
            self._wake.set()
        elif command is Command.RESUME:
            self._resume()
        elif command is Command.REFRESH:
            self._to_worker(frames.encode_command(0, self._clock.now_ns(), Command.REFRESH))

    def _resume(self) -> None:
        self._resume_ns = None
        if self._table.hold == "shutdown":
            return
        self._table.release()
        if self._worker is None:
            self._start_worker()
        self._status()

    def _drop_peer(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None
            self._table.peer_gone(self._clock.now_ns())
            self._wake.set()

    def _tell_table(self, table: Table, content: object, kind: Kind = Kind.TABLE) -> None:
        if self._peer is not None:
            for frame in frames.encode_table(kind, 0, self._clock.now_ns(), table, content):
                self._peer.send(frame)

    def _status(self) -> None:
        state = {
            "generation": self._generation, "worker_pid": self._worker.pid if self._worker else None, "serving": self._ready,
            "hold": self._table.hold, "error": self._error or None,
        }  # fmt: skip
        self._tell_table(Table.STATUS, state)

    def _tell(self, kind: str, detail: str) -> None:
        self._events += 1
        print(f"powerd-hw: {kind}: {detail}", file=sys.stderr, flush=True)
        event = Event(self._events, self._clock.now_ns(), self._clock.wall_ns(), kind, None, "powerd-hw", detail)
        self._tell_table(Table.EVENT, event_row(event), Kind.EVENT)
