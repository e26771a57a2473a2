"""A stand-in for powerd-hw that speaks its frames: it sets nothing, says at once that it did, and shows what it was told."""

from __future__ import annotations

import select
import socket
import threading
import time
import uuid as uuids
from collections.abc import Callable
from pathlib import Path
from typing import Any

from powerd.hw import frames
from powerd.hw.frames import Kind, Table
from powerd.hw.tables import capabilities_row
from powerd.model import Capabilities, Control, Gpu, Health, Interval, Outcome, Reading, Support, Verdict

Key = tuple[str, Control]
PERIOD_S = 0.05


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def gpu(index: int) -> Capabilities:
    uuid = f"GPU-{uuids.UUID(int=index + 1)}"
    return Capabilities(
        gpu=Gpu(uuid, index, "Test GPU", f"00000000:{index:02X}:00.0", index), driver_version="580.1", power_limit_min_mw=200_000,
        power_limit_max_mw=700_000, power_limit_default_mw=700_000, sm_clocks_mhz=tuple(range(210, 1981, 15)),
        memory_clocks_mhz=(), energy_counter=True, persistence=True, mig=False, simulated=False,
        controls={
            Control.POWER_LIMIT: Support(True), Control.SM_CLOCK: Support(True),
            Control.MEMORY_CLOCK: Support(False, "memory clocks cannot be locked on this GPU"),
        },
    )  # fmt: skip


class FakeHw:
    def __init__(self, path: Path, gpus: int = 2) -> None:
        self.path = path
        self.gpus = [gpu(i) for i in range(gpus)]
        self.uuids = [c.gpu.uuid for c in self.gpus]
        self.desired: dict[Key, frames.Desired] = {}
        self.tables: list[dict[Key, Interval | None]] = []
        self.commands: list[tuple[frames.Command, int]] = []
        self.hellos: list[dict[str, Any]] = []
        self.processes: dict[str, list[list[int | None]]] = {}
        self.health: dict[str, Health] = dict.fromkeys(self.uuids, Health.UP)
        self.failing: int | None = None  # NVML code that every set answers
        self.hold: str | None = None
        self.wire = frames.WIRE_VERSION
        self.refused = ""
        self.connections = 0
        self._changed = threading.Condition()
        self._link: socket.socket | None = None
        self._reader = frames.TableReader()
        self._seq = 0
        self._energy_mj = 0
        self._do: list[Callable[[], None]] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # what tests do

    def wait(self, condition: Callable[[], Any], what: str = "", timeout_s: float = 10.0) -> Any:
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), f"{what}: {self.tables[-3:]} {self.commands[-3:]}"
            return condition()

    def value(self, uuid: str, control: Control) -> Interval | None:
        row = self.desired.get((uuid, control))
        return None if row is None else row.value

    def set_processes(self, processes: dict[str, list[int]]) -> None:
        self.processes = {uuid: [[pid, 1] for pid in pids] for uuid, pids in processes.items()}
        self._do.append(lambda: self._table(Table.PROCESSES, self.processes))

    def event(self, kind: str, uuid: str | None, subject: str | None, detail: str = "") -> None:
        row = {"seq": 1, "time_ns": now_ns(), "wall_ns": time.time_ns(), "kind": kind, "uuid": uuid, "subject": subject}
        self._do.append(lambda: self._table(Table.EVENT, {**row, "detail": detail, "data": {}}, Kind.EVENT))

    def set_hold(self, hold: str | None) -> None:
        self.hold = hold
        self._do.append(self._status)

    def forget_gpu(self, uuid: str) -> None:
        self.gpus = [c for c in self.gpus if c.gpu.uuid != uuid]
        self._do.append(lambda: self._table(Table.CAPABILITIES, [capabilities_row(c) for c in self.gpus]))

    def drop(self) -> None:
        self._do.append(self._hang_up)

    def close(self) -> None:
        self._closing = True
        self._thread.join(5)
        self._hang_up()
        self._listener.close()
        self.path.unlink(missing_ok=True)

    # what powerd hears

    def _run(self) -> None:
        due = time.monotonic()
        while not self._closing:
            sockets = [self._listener] + ([self._link] if self._link else [])
            ready, _, _ = select.select(sockets, [], [], max(0.0, min(0.02, due - time.monotonic())))
            if self._listener in ready:
                self._accept()
            if self._link is not None and self._link in ready:
                self._receive(self._link)
            while self._do:
                self._do.pop(0)()
            if time.monotonic() >= due:
                due += PERIOD_S
                self._sample()

    def _accept(self) -> None:
        self._hang_up()
        self._link, _ = self._listener.accept()
        self._reader = frames.TableReader()
        self.connections += 1
        hello = {"wire": self.wire, "generation": 1, "boot_id": "b", **({"refused": self.refused} if self.refused else {})}
        self._table(Table.HELLO, hello, Kind.HELLO)
        self._table(Table.CAPABILITIES, [capabilities_row(c) for c in self.gpus])
        self._table(Table.PROCESSES, self.processes)
        self._status()

    def _hang_up(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _send(self, frame: bytes) -> None:
        if self._link is not None:
            try:
                self._link.send(frame)
            except OSError:
                self._hang_up()

    def _table(self, table: Table, content: object, kind: Kind = Kind.TABLE) -> None:
        for frame in frames.encode_table(kind, 0, now_ns(), table, content):
            self._send(frame)

    def _status(self) -> None:
        self._table(Table.STATUS, {"generation": 1, "serving": True, "hold": self.hold, "error": None})

    def _sample(self) -> None:
        self._seq += 1
        self._energy_mj += 15_123
        at = now_ns()
        readings = []
        for index, uuid in enumerate(c.gpu.uuid for c in self.gpus):
            up = self.health[uuid] is Health.UP
            limit = self.value(uuid, Control.POWER_LIMIT)
            readings.append(
                Reading(
                    uuid, at, self.health[uuid], 1, energy_mj=self._energy_mj if up else None, energy_time_ns=at if up else None,
                    power_mw=300_499 + index if up else None, sm_clock_mhz=1980 if up else None,
                    power_limit_requested_mw=limit.high if limit else 700_000, clock_event_reasons=0x4,
                )
            )  # fmt: skip
        self._send(frames.encode_snapshot(self._seq, at, readings))

    def _receive(self, link: socket.socket) -> None:
        try:
            frame = link.recv(frames.MAX_FRAME)
        except OSError:
            frame = b""
        if not frame:
            self._hang_up()
            return
        head = frames.header(frame)
        with self._changed:
            if head.kind is Kind.DESIRED:
                self._desired(head.seq, frames.decode_desired(frame))
            elif head.kind is Kind.COMMAND:
                self._command(*frames.decode_command(frame))
            elif head.kind is Kind.HELLO and (whole := self._reader.feed(frame)) is not None:
                self.hellos.append(whole[1])
            self._changed.notify_all()

    def _command(self, command: frames.Command, argument: int) -> None:
        self.commands.append((command, argument))
        holds = {frames.Command.PANIC: "panic", frames.Command.QUIESCE: "quiesced", frames.Command.RESUME: None}
        if command in holds:
            self.hold = holds[command]
            self._desired(0, ())
            self._status()

    def _desired(self, seq: int, rows: tuple[frames.Desired, ...]) -> None:
        new = {(r.uuid, r.control): r for r in rows}
        assert all(r.expiry_ns > now_ns() for r in rows), "a row that has expired already"
        self.tables.append({key: r.value for key, r in new.items()})
        outcomes = []
        for key in new.keys() | self.desired.keys():
            value, old = (d[key].value if key in d else None for d in (new, self.desired))
            if value == old:
                continue
            failed = self.failing is not None and value is not None
            outcomes.append(
                Outcome(
                    key[0], key[1], seq, value, Verdict.FAILED if failed else Verdict.APPLIED, accepted=None if failed else value,
                    nvml_code=self.failing or 0 if failed else 0, detail="refused by the test" if failed else "",
                )
            )  # fmt: skip
        self.desired = new
        if outcomes:
            self._send(frames.encode_outcomes(seq, now_ns(), outcomes))
