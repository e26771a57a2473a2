"""The part of powerd-hw without NVML: what shall be set now, what holds it back, and the one worker that touches GPUs.

House rules: nobody but the supervisor starts a worker, one at a time, each with a higher generation; the watchdog is fed by
snapshots that flow, not by a loop that turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from powerd import __version__
from powerd.clock import NS, Clock
from powerd.config import Config, hw_socket, journal_dir
from powerd.errors import CODES, EXIT_OK, EXIT_TEMPFAIL, ConfigError
from powerd.hw import fence, frames, handover
from powerd.hw.armed import ArmedPlans
from powerd.hw.desired import DesiredTable
from powerd.hw.door import Door
from powerd.hw.frames import Command, FrameError, Kind, Table
from powerd.hw.journal import boot_id, prepare_directory
from powerd.hw.keeper import Keeper
from powerd.hw.rapl import HostEnergy, powercap
from powerd.hw.systemd import notify, watchdog_ns
from powerd.hw.tables import event_row
from powerd.hw.worker import CAUSES, LEAVE_SETTINGS
from powerd.killpoint import killpoint
from powerd.model import Event, Outcome, Restart, Verdict

_STOP_LIMIT_S = 20.0
_TELL_S = 5.0  # how long a child that cannot serve waits for its powerd to hear why
_LONELY_S = 60.0  # a development child that nobody ever talked to
_MONITOR_ONLY = "daemon.control = false in powerd-hw's own configuration: nothing is set"
_FIXED = ("run_dir", "journal_dir", "peer_user", "powercap_dir")  # of [hw]: what a running powerd-hw cannot change
_OUTCOMES = 64  # in one frame


class Supervisor:
    """One powerd-hw; ``run`` serves until SIGTERM and returns the exit code."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        *,
        path: Path | None = None,
        exit_with_peer: bool = False,
        load: Callable[[], Config] | None = None,
    ) -> None:
        self._config, self._clock = config, clock
        self._load = load or (lambda: config)  # reads the configuration again, at SIGHUP
        self._config_error = ""
        self._path = path or hw_socket(config)
        self._directory = journal_dir(config)
        self._exit_with_peer = exit_with_peer
        self._table = DesiredTable(round(config.hw.grace_s * NS), control=config.daemon.control)
        self._refused: frozenset[object] = frozenset()  # what control = false kept from being set, as last told
        self._wake = asyncio.Event()
        self._worker = Keeper(
            clock, self._directory, on_frame=self._worker_frame, on_table=self._worker_table, on_closed=self._wake.set
        )
        self._plans = ArmedPlans(clock, self._worker.send, lambda content: self._door.table(Table.PLANS, content))
        self._door: Door
        self._served = False  # a worker has served: its driver works
        self._watchdog_ns = watchdog_ns()
        self._capabilities: object = None
        self._processes: object = None
        self._host_energy = HostEnergy(powercap(config.hw.powercap_dir, clock.simulated))
        self._panic_file = False
        self._events = 0
        self._fed_ns = 0
        self._resume_ns: int | None = None
        self._exit: asyncio.Future[int]

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
        self._worker.lock_fd = lock
        self._door = Door(
            self._clock, self._path, self._config.hw.peer_user, hello=self._hello, on_arrival=self._peer_arrived,
            on_frame=self._peer_frame, on_refused=lambda why: self._tell("frame_refused", why), on_leave=self._peer_left,
        )  # fmt: skip
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._terminate)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        self._look_for_panic_file()
        if until_ns := handover.until(self._directory, self._clock.now_ns()):
            self._table.begin_grace(until_ns)
        self._door.listen(inherited)
        self._worker.start(self._config)
        keeper = loop.create_task(self._keep())
        keeper.add_done_callback(self._kept)
        try:
            return await self._exit
        finally:
            keeper.cancel()
            self._door.close()

    def _kept(self, keeper: asyncio.Task[None]) -> None:
        """Without its keeper nothing would expire: end with a traceback, so that the journal is replayed."""
        if not keeper.cancelled() and (error := keeper.exception()) is not None and not self._exit.done():
            self._exit.set_exception(error)

    def _terminate(self) -> None:
        self._table.drop("shutdown", Restart.SHUTDOWN)
        notify("STOPPING=1", "STATUS=restoring every GPU to baseline")
        self._stop_worker(Restart.SHUTDOWN)
        asyncio.get_running_loop().call_later(_STOP_LIMIT_S, self._finish, EXIT_TEMPFAIL)

    def _reload(self) -> None:
        """Take the configuration over as it is now in its files; one that is refused changes nothing."""
        if self._served:
            notify("RELOADING=1")
        try:
            self._configure(self._load())
            self._config_error = ""
        except ConfigError as error:
            self._config_error = str(error)
            self._tell("config_refused", f"{error}: the last good one stays in force")
        if self._served:
            notify("READY=1")
        self._status()

    def _configure(self, config: Config) -> None:
        old = self._config.hw
        fixed = {name: getattr(old, name) for name in _FIXED}
        later = [f"hw.{name}" for name in _FIXED if getattr(config.hw, name) != fixed[name]]
        self._config = config = replace(config, hw=replace(config.hw, **fixed))
        self._table.set_grace(round(config.hw.grace_s * NS))
        if not config.daemon.control:
            self._table.forbid()
        self._table.control = config.daemon.control
        self._refused = frozenset()
        self._worker.greet(config)
        if not self._table.adopting:
            self._send_desired()
        self._look_for_panic_file()
        self._tell("config_reloaded", f"takes effect at the next start: {', '.join(later)}" if later else "")

    def _finish(self, code: int) -> None:
        if not self._exit.done():
            self._exit.set_result(code)

    # the worker

    def _worker_frame(self, kind: Kind, frame: bytes) -> None:
        if kind is Kind.SNAPSHOT:
            self._progress()
            if (rows := self._host_energy.rows(self._clock.now_ns())) is not None:
                self._door.table(Table.HOST_ENERGY, rows)
        self._door.send(frame, may_drop=kind is Kind.SNAPSHOT)

    def _worker_table(self, table: Table, content: object) -> None:
        if table is Table.STATUS:
            if isinstance(content, dict) and content.get("ready"):
                self._serving()
            return
        if table is Table.PLANS:
            self._plans.heard(content)
            return
        if table is Table.CAPABILITIES:
            self._capabilities = content
        elif table is Table.PROCESSES:
            self._processes = content
        self._door.table(table, content)

    def _serving(self) -> None:
        """The worker has opened its GPUs: give it the table, unless a hand-over says to wait for powerd's."""
        self._served = True
        self._worker.heard()
        self._progress()
        if not self._table.adopting:
            self._send_desired()
        self._plans.serving(self._table.holds_clock)
        notify("READY=1", f"STATUS=generation {self._worker.generation} serves")
        self._status()

    def _send_desired(self) -> None:
        self._plans.prune(self._table.holds_clock, self._worker.ready)
        if not self._worker.ready or self._worker.asked:
            return
        handover.clear(self._directory)
        table = self._table
        self._worker.send(frames.encode_desired(table.seq, table.received_ns or self._clock.now_ns(), table.rows()))
        self._wake.set()

    def _progress(self) -> None:
        now_ns = self._clock.now_ns()
        if (every_ns := self._watchdog_ns) is not None and now_ns - self._fed_ns >= every_ns:
            self._fed_ns = now_ns
            notify("WATCHDOG=1")

    def _stop_worker(self, cause: Restart) -> None:
        """Ask the worker to restore everything, give back its handles and exit."""
        if self._worker.pid is None:
            self._worker_gone(EXIT_OK)
            return
        self._worker.asked = True
        leave = cause is Restart.SHUTDOWN and handover.active(self._directory, self._clock.now_ns())
        argument = CAUSES.index(cause) | (LEAVE_SETTINGS if leave else 0)
        self._worker.send(frames.encode_command(0, self._clock.now_ns(), Command.QUIESCE, argument))

    def _worker_gone(self, code: int) -> None:
        hold = self._table.hold
        self._plans.prune(self._table.holds_clock, ready=False)
        if hold == "shutdown":
            if self._worker.error:
                print(f"powerd-hw: {self._worker.error}", file=sys.stderr)
            self._finish(EXIT_OK if code == EXIT_OK else EXIT_TEMPFAIL)
        elif hold == "quiesced":
            self._status()
        else:
            self._crashed(code)

    def _crashed(self, code: int) -> None:
        worker = self._worker
        why = worker.error or f"the worker died ({f'signal {-code}' if code < 0 else f'exit code {code}'})"
        if not self._served:
            print(f"powerd-hw: {why}", file=sys.stderr)
            code = CODES[worker.error_code].exit_code if worker.error_code in CODES else EXIT_TEMPFAIL
            self._leave_told(code, self._clock.now_ns() + round(_TELL_S * NS))
            return
        self._tell("worker_died", why)
        if not worker.error and self._table.worker_died(self._clock.now_ns()):
            self._table.drop("safe_mode", Restart.JOURNAL_REPLAY)
            self._tell("safe_mode", "three crashes within a minute: everything at baseline, read-only until powerctl resume")
        asyncio.get_running_loop().call_later(worker.pause_s(), self._restart)

    def _leave_told(self, code: int, limit_ns: int) -> None:
        """End, but a development child first tells the powerd that started it why: it passes that on to whoever asks."""
        if self._exit_with_peer and not self._door.open and self._clock.now_ns() < limit_ns:
            asyncio.get_running_loop().call_later(_TELL_S / 100, self._leave_told, code, limit_ns)
            return
        self._status()
        self._finish(code)

    def _restart(self) -> None:
        if self._worker.pid is None and self._table.hold not in ("shutdown", "quiesced"):
            self._worker.start(self._config)

    # time

    async def _keep(self) -> None:
        """Expiries, grace, resume, a silent or dead worker."""
        started_ns = self._clock.now_ns()
        while True:
            now_ns = self._clock.now_ns()
            if (code := self._worker.reap()) is not None:
                self._worker_gone(code)
            self._look_for_panic_file()
            if self._table.expire(now_ns):
                self._send_desired()
                if self._exit_with_peer and not self._door.open and not self._table.in_grace:
                    self._terminate()
            if self._resume_ns is not None and now_ns >= self._resume_ns:
                self._resume()
            lonely = self._exit_with_peer and not self._door.had_peer and now_ns - started_ns > _LONELY_S * NS
            if lonely and self._table.hold != "shutdown":
                self._terminate()
            self._worker.end_silence()
            next_ns = min(self._table.next_ns(), self._resume_ns or self._table.next_ns(), now_ns + NS)
            self._wake.clear()
            if self._worker.dying:
                next_ns = min(next_ns, now_ns + NS // 100)  # its process ends in a moment
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(0.0, (next_ns - now_ns) / NS))

    def _look_for_panic_file(self) -> None:
        """While it is there every GPU is at baseline, also when powerd is dead; about once a second."""
        path = self._config.daemon.panic_file
        if (here := bool(path) and os.path.exists(path)) == self._panic_file:
            return
        self._panic_file = here
        if here:
            self._table.drop("panic_file", Restart.PANIC)
            self._send_desired()
            self._tell("panic", f"file {path}: everything to baseline; wants are refused while it is there")
        else:
            self._table.release("panic_file")
            self._tell("panic_file_gone", self._table.hold or "wants count again")
        self._status()

    # powerd

    def _hello(self) -> dict[str, object]:
        return {
            "role": "powerd-hw", "version": __version__, "wire": frames.WIRE_VERSION, "pid": os.getpid(),
            "generation": self._worker.generation, "boot_id": boot_id().hex(), "grace_s": self._config.hw.grace_s,
            "control": self._table.control,
        }  # fmt: skip

    def _peer_arrived(self) -> None:
        if self._capabilities is not None:
            self._door.table(Table.CAPABILITIES, self._capabilities)
        if self._processes is not None:
            self._door.table(Table.PROCESSES, self._processes)
        self._plans.tell()
        self._status()

    def _peer_left(self) -> None:
        self._table.peer_gone(self._clock.now_ns())
        self._plans.forget_peer()
        self._wake.set()

    def _peer_frame(self, head: frames.Header, frame: bytes, descriptors: list[int]) -> None:
        if head.kind is Kind.DESIRED:
            rows = frames.decode_desired(frame)
            killpoint("hw.desired.received")
            if self._table.hold is None:
                self._refuse(head.seq, self._table.submit(head.seq, rows, self._clock.now_ns()))
                self._send_desired()
            else:
                self._tell("desired_refused", f"{self._table.hold}: no wants until resume")
        elif head.kind is Kind.COMMAND:
            self._command(*frames.decode_command(frame))
        elif head.kind is Kind.PLAN:
            self._plans.take(frame, descriptors, self._table.holds_clock, self._worker.ready)
        else:
            raise FrameError(f"{head.kind.name} is not for powerd-hw")

    def _refuse(self, seq: int, rows: list[frames.Desired]) -> None:
        """Answer rows that the site does not let us set; the event comes once for the same rows."""
        now_ns = self._clock.now_ns()
        answers = [
            Outcome(r.uuid, r.control, seq, r.value, Verdict.FAILED, detail=_MONITOR_ONLY, received_ns=now_ns) for r in rows
        ]
        for n in range(0, len(answers), _OUTCOMES):
            self._door.send(frames.encode_outcomes(seq, now_ns, answers[n : n + _OUTCOMES]))
        refused: frozenset[object] = frozenset((r.uuid, r.control, r.value) for r in rows)
        if refused and refused != self._refused:
            self._tell("desired_refused", _MONITOR_ONLY)
        self._refused = refused

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
            self._worker.send(frames.encode_command(0, self._clock.now_ns(), Command.REFRESH))

    def _resume(self) -> None:
        self._resume_ns = None
        if self._table.hold == "shutdown":
            return
        self._table.release()
        if self._panic_file:
            self._tell("resume_refused", f"the panic file {self._config.daemon.panic_file} is still there: remove it")
        if self._worker.pid is None:
            self._worker.start(self._config)
        self._status()

    def _status(self) -> None:
        worker = self._worker
        state = {
            "generation": worker.generation, "worker_pid": worker.pid, "serving": worker.ready,
            "hold": "panic" if self._table.hold == "panic_file" else self._table.hold, "control": self._table.control,
            "error": worker.error or None, "config_error": self._config_error or None,
        }  # fmt: skip
        self._door.table(Table.STATUS, state)

    def _tell(self, kind: str, detail: str) -> None:
        self._events += 1
        print(f"powerd-hw: {kind}: {detail}", file=sys.stderr, flush=True)
        event = Event(self._events, self._clock.now_ns(), self._clock.wall_ns(), kind, None, "powerd-hw", detail)
        self._door.table(Table.EVENT, event_row(event), Kind.EVENT)
