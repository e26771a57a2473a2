"""The process with NVML: all threads, one node, one generation; it does what its supervisor's tables say and restores when alone.

House rules: the main thread makes no driver call once it serves, so that no hang can silence it; a fatal finding is told to the
supervisor and ends the process; only the supervisor starts the next one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from powerd.clock import NS, Clock, from_environment
from powerd.config import Config, sections
from powerd.errors import EXIT_OK, EXIT_TEMPFAIL, DeviceError
from powerd.hw import bounds, frames, handover, nvml, passing
from powerd.hw.actuator import Actuator
from powerd.hw.beats import Plans
from powerd.hw.energy import EnergyTracker
from powerd.hw.fence import Fence, StaleGenerationError
from powerd.hw.frames import Command, Kind, Table
from powerd.hw.journal import Journal
from powerd.hw.pair import by_gpu
from powerd.hw.port import Device, Node
from powerd.hw.sampler import Rounds, Sampler
from powerd.hw.tables import GpuProcess, capabilities_row, event_row, processes_row
from powerd.killpoint import killpoint
from powerd.model import Capabilities, Control, Event, Health, Interval, Outcome, Restart

CAUSES: tuple[Restart, ...] = tuple(Restart)
LEAVE_SETTINGS = 1 << 8  # argument of QUIESCE: an upgrade is under way, keep what is set
_RESTORE_LIMIT_NS = 15 * NS
_EPOCH_NOTE_NS = 60 * NS
_LOOK_NS = 5 * NS
_WATCH_NS = NS // 5  # how often deadlines are looked at


class Line:
    """The worker's end of the socket to its supervisor; any thread may send."""

    def __init__(self, link: socket.socket, clock: Clock) -> None:
        self._link, self._clock = link, clock
        self._lock = threading.Lock()
        self._events = 0

    def send(self, frame: bytes, *, may_drop: bool = False) -> None:
        """Send one frame; one that may be dropped is, when the supervisor is behind."""
        self._clock.flight(1)
        try:
            self._link.send(frame, socket.MSG_DONTWAIT if may_drop else 0)
        except OSError:  # full, or the supervisor is gone: the receiving thread will see that
            self._clock.flight(-1)

    def table(self, kind: Kind, table: Table, content: object) -> None:
        """Send one table, its chunks together."""
        with self._lock:
            self._events += 1
            for frame in frames.encode_table(kind, self._events, self._clock.now_ns(), table, content):
                self.send(frame)

    def outcome(self, outcome: Outcome) -> None:
        """Send what became of one pair."""
        self.send(frames.encode_outcomes(outcome.seq, self._clock.now_ns(), [outcome]))

    def tell(self, kind: str, uuid: str | None = None, subject: str | None = None, detail: str = "", **data: str | int) -> None:
        """Send an event."""
        now_ns, wall_ns = self._clock.now_ns(), self._clock.wall_ns()
        self.table(
            Kind.EVENT, Table.EVENT, event_row(Event(self._events + 1, now_ns, wall_ns, kind, uuid, subject, detail, data))
        )


class Gpu:
    """One GPU's sampler, and its actuator with the thread that sets."""

    def __init__(self, actuator: Actuator, sampler: Sampler, clock: Clock, stale: Callable[[], None]) -> None:
        self.actuator, self.sampler = actuator, sampler
        self._stale = stale
        self._clock = clock

    def start(self) -> None:
        """Start the setter thread."""
        threading.Thread(target=self._run, name=f"set-{self.actuator.uuid[-6:]}", daemon=True).start()

    def _run(self) -> None:
        # joined here and not before: until the first table nobody may wait for this thread
        waiter = self._clock.waiter(f"set {self.actuator.uuid}")
        self.actuator.changed = waiter.wake
        while True:
            try:
                next_ns = self.actuator.step()
            except StaleGenerationError:
                self._stale()
                return
            waiter.wait_until(next_ns)


def everything(capabilities: list[Capabilities], config: Config) -> dict[tuple[str, Control], Interval | None]:
    """Each control that can be set on each GPU, with the baseline that holds when the one found is not known any more."""
    return {
        (c.gpu.uuid, control): bounds.fallback_baseline(control, c, config.baseline)
        for c in capabilities
        for control, support in c.controls.items()
        if support.available
    }


def tracker_for(device: Device, capabilities: Capabilities, journal: Journal) -> EnergyTracker:
    """The energy tracker of a GPU, in the epoch that the journal remembers or the one after it."""
    known = journal.recovered.epochs.get(device.gpu.uuid)
    goes_on = known is not None and capabilities.energy_counter and not journal.recovered.stale
    epoch = 1 if known is None else known[0] if goes_on else known[0] + 1
    return EnergyTracker(
        epoch,
        counter=capabilities.energy_counter,
        limit_mw=capabilities.power_limit_max_mw,
        last_mj=known[1] if known is not None and goes_on else None,
    )


class Worker:
    """Everything of one generation."""

    def __init__(self, node: Node, line: Line, clock: Clock, config: Config, directory: Path, generation: int) -> None:
        self._line, self._clock, self._config, self._directory = line, clock, config, directory
        self._waiter = clock.waiter("worker")
        self._ending: Restart | None = None
        self._leave = False
        self._started = threading.Lock()
        self._hellos = frames.TableReader()
        self._fatal = ""
        devices = list(node.devices())
        if node.count() > len(devices):
            threading.Thread(target=self._look, args=(node, len(devices)), name="look", daemon=True).start()
        capabilities = [device.capabilities() for device in devices]
        self.journal = Journal(directory, node.driver_load_id, generation, everything(capabilities, config))
        self._gpus = [self._gpu(node, d, c, generation) for d, c in zip(devices, capabilities, strict=True)]
        self._rounds = Rounds([gpu.sampler for gpu in self._gpus], clock, config.hw.sample_hz, self._publish)
        self._plans = Plans({gpu.actuator.uuid: gpu.actuator for gpu in self._gpus}, clock, line, self._waiter.wake)
        self._capabilities = capabilities
        self._processes_seen: list[tuple[GpuProcess, ...] | None] = [None] * len(devices)
        self._publishing = threading.Lock()
        self._seq = self._sent_ns = 0
        self._report()

    def _gpu(self, node: Node, device: Device, capabilities: Capabilities, generation: int) -> Gpu:
        clock, config, tell = self._clock, self._config, self._line.tell
        fence = Fence(self._directory, generation)
        actuator = Actuator(device, capabilities, config, clock, self.journal, fence, self._line.outcome, tell)
        tracker = tracker_for(device, capabilities, self.journal)
        sampler = Sampler(
            node, device, tracker, clock, config.hw, observe=actuator.observe,
            clock_wanted=actuator.clock_wanted, lost=actuator.lost, returned=actuator.returned,
            driver_gone=self._driver_gone, tell=tell,
        )  # fmt: skip
        return Gpu(actuator, sampler, clock, self._stale)

    def _report(self) -> None:
        found = self.journal.recovered
        if found.damaged:
            aside = str(found.quarantined or "")
            self._line.tell("journal_damaged", None, None, f"{found.damaged}: everything goes to its rule baseline", aside=aside)
        if found.stale:
            self._line.tell("journal_stale", None, None, "of another boot or driver load: discarded")
        self._line.table(Kind.TABLE, Table.CAPABILITIES, [capabilities_row(c) for c in self._capabilities])

    def _start_setters(self) -> None:
        """With the first table, not before: until then nobody has said which journalled settings are still wanted."""
        if self._started.acquire(blocking=False):
            for gpu in self._gpus:
                gpu.start()

    def _look(self, node: Node, known: int) -> None:
        """For GPUs that did not answer at the start: when one does, the next worker opens them all."""
        waiter = self._clock.waiter("look")
        with contextlib.suppress(DeviceError):
            while len(node.devices()) <= known:
                waiter.wait_until(self._clock.now_ns() + _LOOK_NS)
        self._end("a GPU has come back")

    # ends

    def _end(self, why: str) -> None:
        self._fatal = why
        self._waiter.wake()

    def _driver_gone(self, error: DeviceError) -> None:
        self._end(str(error))

    def _stale(self) -> None:
        self._end("a newer worker has taken over")

    # what the supervisor says

    def receive(self, link: socket.socket) -> None:
        """Take frames until the supervisor is gone; then restore and end."""
        while True:
            try:
                frame, descriptors = passing.receive(link)
            except OSError:
                frame = b""
            if not frame:
                self._leave = handover.active(self._directory, self._clock.now_ns())
                self._ending = self._ending or Restart.SHUTDOWN
                self._waiter.wake()
                return
            try:
                self._frame(frame, descriptors)
            finally:
                passing.close(descriptors)
                self._clock.flight(-1)

    def _frame(self, frame: bytes, descriptors: list[int]) -> None:
        head = frames.header(frame)
        if head.kind is Kind.DESIRED and self._ending is None:
            rows = (
                (r.uuid, r.control, r.value, r.dwell_ms * 1_000_000, CAUSES[r.tag] if r.value is None else Restart.LEASE_END)
                for r in frames.decode_desired(frame)
            )
            table = by_gpu(rows)
            for gpu in self._gpus:
                gpu.actuator.want(table.get(gpu.actuator.uuid, {}), head.seq, head.time_ns)
            self._start_setters()
        elif head.kind is Kind.PLAN and self._ending is None:
            self._plans.take(frame, descriptors)
        elif head.kind is Kind.HELLO:
            if (whole := self._hellos.feed(frame)) is not None:
                self._configure(config_of(whole[1]))
        elif head.kind is Kind.COMMAND:
            command, argument = frames.decode_command(frame)
            if command is Command.QUIESCE:
                self._leave = bool(argument & LEAVE_SETTINGS)
                self._ending = CAUSES[argument & 0xFF]
            elif command is Command.REFRESH:
                self._rounds.refresh()
            self._waiter.wake()

    def _configure(self, config: Config) -> None:
        """A reload: nothing is opened anew, and what the new configuration admits stays as it is."""
        self._config = config
        for gpu in self._gpus:
            gpu.sampler.configure(config.hw)
            gpu.actuator.configure(config)
        self._rounds.configure(config.hw.sample_hz)

    # the rounds

    def run(self) -> int:
        """Serve until told to end; the exit code."""
        noted_ns = 0
        self._rounds.start()
        while not self._fatal and self._ending is None:
            period_ns = round(NS / self._config.hw.sample_hz)
            now_ns = self._waiter.wait_until(self._clock.now_ns() + max(period_ns, _WATCH_NS))
            self._watch(now_ns)
            self._plans.tell(now_ns)
            if now_ns - self._sent_ns > period_ns * 3 // 2:
                self._publish()  # the round hangs: the other GPUs' readings go out all the same
            if now_ns - noted_ns >= _EPOCH_NOTE_NS:
                noted_ns = now_ns
                self._note_epochs()
        return self._finish()

    def _watch(self, now_ns: int) -> None:
        """Deadlines of every call under way."""
        self._rounds.watch(now_ns)
        wedged = [gpu.sampler.overdue(now_ns) for gpu in self._gpus]
        for gpu in self._gpus:
            gpu.actuator.overdue(now_ns)
        if wedged and all(wedged):
            self._fatal = "no GPU answers"
        if self._gpus and all(gpu.sampler.reading.health is Health.LOST for gpu in self._gpus):
            self._fatal = "every GPU is lost: the driver was reloaded or is gone"

    def _publish(self) -> None:
        """Send all readings as they are now; called at the end of each round by the thread that read."""
        with self._publishing:
            self._sent_ns = now_ns = self._clock.now_ns()
            self._seq += 1
            readings = []
            for gpu in self._gpus:
                reading = gpu.sampler.reading
                if gpu.actuator.wedged and reading.health is Health.UP:
                    reading = replace(reading, health=Health.WEDGED)
                readings.append(reading)
            self._line.send(frames.encode_snapshot(self._seq, now_ns, readings), may_drop=True)
            if self._processes_seen != (seen := [g.sampler.processes for g in self._gpus]):
                self._processes_seen = seen
                known = {g.actuator.uuid: p for g, p in zip(self._gpus, seen, strict=True) if p is not None}
                self._line.table(Kind.TABLE, Table.PROCESSES, processes_row(known))
            if self._capabilities != (capabilities := [g.actuator.capabilities for g in self._gpus]):
                self._capabilities = capabilities
                self._line.table(Kind.TABLE, Table.CAPABILITIES, [capabilities_row(c) for c in capabilities])

    def _note_epochs(self) -> None:
        for gpu in self._gpus:
            tracker = gpu.sampler.tracker
            if tracker.energy_mj is not None:
                with contextlib.suppress(OSError):
                    self.journal.epoch(gpu.actuator.uuid, tracker.epoch, tracker.energy_mj)

    def _finish(self) -> int:
        if self._fatal:
            self._line.table(Kind.TABLE, Table.STATUS, {"error": self._fatal})
            return EXIT_TEMPFAIL
        if self._leave:
            return EXIT_OK
        cause = self._ending or Restart.SHUTDOWN
        now_ns = self._clock.now_ns()
        for gpu in self._gpus:
            gpu.actuator.want(dict.fromkeys(Control, (None, 0, cause)), 0, now_ns)
        self._start_setters()
        limit_ns = now_ns + _RESTORE_LIMIT_NS
        while left := [(g.actuator.uuid, c) for g in self._gpus for c in g.actuator.unsettled()]:
            now_ns = self._waiter.wait_until(min(limit_ns, now_ns + NS // 100))
            for gpu in self._gpus:
                gpu.actuator.overdue(now_ns)
            if now_ns >= limit_ns or self._fatal:
                self._line.table(Kind.TABLE, Table.STATUS, {"error": f"not restored: {left}"})
                return EXIT_TEMPFAIL
        self._note_epochs()
        return EXIT_OK


def greeting(config: Config, directory: Path, generation: int) -> dict[str, object]:
    """What the supervisor tells a new worker first."""
    return {"config": asdict(config), "directory": str(directory), "generation": generation}


def config_of(hello: Any) -> Config:
    """The configuration in a greeting."""
    return Config(**{name: type(getattr(Config(), name))(**hello["config"][name]) for name in sections()})  # no replicas


def _greeted(link: socket.socket, clock: Clock) -> tuple[Config, Path, int]:
    reader = frames.TableReader()
    while True:
        frame = link.recv(frames.MAX_FRAME)
        clock.flight(-1)
        if not frame:
            raise SystemExit(EXIT_TEMPFAIL)
        if (whole := reader.feed(frame)) is not None:
            content = whole[1]
            return config_of(content), Path(content["directory"]), int(content["generation"])


def main(descriptor: int) -> int:
    """Serve the supervisor at the other end of this socket; the exit code."""
    link = socket.socket(fileno=descriptor)
    clock = from_environment()
    config, directory, generation = _greeted(link, clock)
    line = Line(link, clock)
    try:
        worker = Worker(nvml.open_node(), line, clock, config, directory, generation)
    except (DeviceError, OSError) as error:
        failure = error.code.name if isinstance(error, DeviceError) else "internal"
        line.table(Kind.TABLE, Table.STATUS, {"error": str(error), "code": failure})
        return EXIT_TEMPFAIL
    killpoint("hw.worker.started")
    line.table(Kind.TABLE, Table.STATUS, {"ready": True, "generation": generation})
    threading.Thread(target=worker.receive, args=(link,), name="tables", daemon=True).start()
    exit_code = worker.run()
    # a thread may hang in the driver: leave without waiting for it
    os._exit(exit_code)
