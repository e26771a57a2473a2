"""The wire between powerd and powerd-hw: one SOCK_SEQPACKET message is one frame of fixed-size records.

House rules: both sides check magic, version, sizes and ranges before they believe a byte; tables travel in numbered chunks with a
checksum; encode/decode are pure; a frame that does not parse is an error and changes nothing.
"""

from __future__ import annotations

import json
import struct
import uuid as uuidlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from operator import attrgetter
from typing import Any

from powerd.model import Control, EnergyMethod, Health, Interval, Outcome, Reading, Verdict

MAGIC = 0x5057
WIRE_VERSION = 1
MAX_GPUS = 64
MAX_FRAME = 32 * 1024
CHUNK_BYTES = 16 * 1024

_HEADER = struct.Struct("<HBBIQ")  # magic, version, kind, seq, time_ns
_UUID = 16
_READING = struct.Struct("<16sQQQQQIIIIIIHHhBBBBH")
_WANT = struct.Struct("<16sBBHIIQQ")  # uuid, control, flags, dwell_ms, low, high, expiry_ns, tag
_OUTCOME = struct.Struct("<16sBBBBIIIIIIIiQQQQ96s")
_CHUNK = struct.Struct("<HHHHII")  # table, chunk, chunks, bytes, crc of the whole, whole length
_COMMAND = struct.Struct("<HHIQ")

CONTROLS: tuple[Control, ...] = tuple(Control)
_HEALTHS: tuple[Health, ...] = tuple(Health)
_VERDICTS: tuple[Verdict, ...] = tuple(Verdict)
_METHODS: tuple[EnergyMethod, ...] = tuple(EnergyMethod)


class FrameError(ValueError):
    """A frame that is not ours, not this version, or out of range."""


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1  # table: who I am (both ways)
    TABLE = 2  # hw -> powerd: capabilities, processes, status (JSON in chunks)
    SNAPSHOT = 3  # hw -> powerd: one record per GPU
    DESIRED = 4  # powerd -> hw: the whole desired table
    OUTCOME = 5  # hw -> powerd: one record per (GPU, control)
    EVENT = 6  # hw -> powerd: table (JSON)
    COMMAND = 7  # powerd -> hw
    PLAN = 8  # powerd -> hw: table (JSON); a clock plan to arm, its beat socket with the last chunk, or one to give up


class Table(IntEnum):
    """Which table a chunk belongs to."""

    HELLO = 1
    CAPABILITIES = 2
    PROCESSES = 3
    EVENT = 4
    STATUS = 5
    PLAN = 6
    PLANS = 7  # hw -> powerd: the clock plans that are armed and how they stand, and those that have just ended
    HOST_ENERGY = 8  # hw -> powerd: [domain, package, microjoules since hw began] once a second, where RAPL is readable


class Command(IntEnum):
    """What powerd may ask of hw beside a desired table."""

    KEEPALIVE = 1
    PANIC = 2  # everything to baseline now, refuse wants until RESUME
    QUIESCE = 3  # baseline, then close every NVML handle; argument: milliseconds until it resumes by itself
    RESUME = 4
    REFRESH = 5  # take a snapshot now


@dataclass(frozen=True, slots=True)
class Header:
    """What every frame begins with."""

    kind: Kind
    seq: int
    time_ns: int


@dataclass(frozen=True, slots=True)
class Desired:
    """One row of the desired table: hw re-validates it against the device and the site's own limits."""

    uuid: str
    control: Control
    value: Interval | None  # None: baseline
    expiry_ns: int  # CLOCK_BOOTTIME; hw restores by itself when it passes
    dwell_ms: int = 0  # minimum between two changes downward; 0: the node's
    tag: int = 0  # crc of the winning source, for events


@lru_cache(maxsize=4 * MAX_GPUS)
def gpu_bytes(uuid: str) -> bytes:
    """The 16 bytes of ``GPU-xxxxxxxx-...``; FrameError for any other form."""
    try:
        return uuidlib.UUID(uuid.removeprefix("GPU-")).bytes
    except ValueError as error:
        raise FrameError(f"not a GPU UUID: {uuid!r}") from error


@lru_cache(maxsize=4 * MAX_GPUS)
def gpu_uuid(raw: bytes) -> str:
    """The textual UUID of 16 bytes."""
    return f"GPU-{uuidlib.UUID(bytes=raw)}"


def header(frame: bytes) -> Header:
    """Check and decode the header of a frame."""
    if len(frame) < _HEADER.size or len(frame) > MAX_FRAME:
        raise FrameError(f"frame of {len(frame)} bytes")
    magic, version, kind, seq, time_ns = _HEADER.unpack_from(frame)
    if magic != MAGIC:
        raise FrameError("not a powerd frame")
    if version != WIRE_VERSION:
        raise FrameError(f"wire version {version}, this side speaks {WIRE_VERSION}: upgrade powerd and powerd-hw together")
    try:
        return Header(Kind(kind), seq, time_ns)
    except ValueError as error:
        raise FrameError(f"frame kind {kind}") from error


def _head(kind: Kind, seq: int, time_ns: int) -> bytes:
    return _HEADER.pack(MAGIC, WIRE_VERSION, kind, seq & 0xFFFFFFFF, time_ns)


_OPTIONAL = (
    "energy_mj", "energy_time_ns", "power_mw", "power_average_mw", "sm_clock_mhz", "memory_clock_mhz", "temperature_c",
    "utilization_percent", "memory_used_bytes", "memory_total_bytes", "power_limit_requested_mw", "power_limit_enforced_mw",
    "clock_event_reasons",
)  # fmt: skip
_OPTIONAL_BITS = tuple(1 << bit for bit in range(len(_OPTIONAL)))
_ALL_PRESENT = sum(_OPTIONAL_BITS)
_optional = attrgetter(*_OPTIONAL)


def encode_snapshot(seq: int, time_ns: int, readings: Sequence[Reading]) -> bytes:
    """All readings of one tick in one frame."""
    rows = []
    for r in readings:
        present = 0
        for bit, value in zip(_OPTIONAL_BITS, _optional(r), strict=True):
            if value is not None:
                present |= bit
        rows.append(
            _READING.pack(
                gpu_bytes(r.uuid), r.time_ns, r.energy_mj or 0, r.energy_time_ns or 0, r.memory_used_bytes or 0,
                r.memory_total_bytes or 0, r.epoch, r.power_mw or 0, r.power_average_mw or 0, r.power_limit_requested_mw or 0,
                r.power_limit_enforced_mw or 0, r.clock_event_reasons or 0, r.sm_clock_mhz or 0, r.memory_clock_mhz or 0,
                r.temperature_c or 0, r.utilization_percent or 0, _HEALTHS.index(r.health), _METHODS.index(r.energy_method), 0,
                present,
            )
        )  # fmt: skip
    return _head(Kind.SNAPSHOT, seq, time_ns) + b"".join(rows)


def _rows(frame: bytes, record: struct.Struct) -> list[tuple[Any, ...]]:
    body = memoryview(frame)[_HEADER.size :]
    if len(body) % record.size or len(body) // record.size > MAX_GPUS * len(CONTROLS):
        raise FrameError(f"{len(body)} bytes are not whole records of {record.size}")
    return list(record.iter_unpack(body))


def _pick(values: Sequence[Any], index: int, what: str) -> Any:
    if not 0 <= index < len(values):
        raise FrameError(f"{what} {index}")
    return values[index]


def decode_snapshot(frame: bytes) -> tuple[Reading, ...]:
    """The readings of a SNAPSHOT frame."""
    readings = []
    for row in _rows(frame, _READING):
        (uuid, time_ns, energy, energy_time, used, total, epoch, power, average, requested, enforced, reasons, sm, mem, temp,
         util, health, method, _, present) = row  # fmt: skip
        values: tuple[int | None, ...] = (
            energy, energy_time, power, average, sm, mem, temp, util, used, total, requested, enforced, reasons,
        )  # fmt: skip
        if present & _ALL_PRESENT != _ALL_PRESENT:
            values = tuple(v if present & bit else None for bit, v in zip(_OPTIONAL_BITS, values, strict=True))
        who = (gpu_uuid(uuid), time_ns, _pick(_HEALTHS, health, "health"), epoch)
        # in the order of Reading's fields: by name it takes several times as long, ten times a second
        everything: tuple[Any, ...] = (*who, *values, _pick(_METHODS, method, "method"))
        readings.append(Reading(*everything))
    return tuple(readings)


def encode_desired(seq: int, time_ns: int, rows: Sequence[Desired]) -> bytes:
    """The whole desired table; a (GPU, control) that is not in it shall be at baseline."""
    return _head(Kind.DESIRED, seq, time_ns) + b"".join(
        _WANT.pack(
            gpu_bytes(r.uuid), CONTROLS.index(r.control), 0 if r.value is None else 1, min(r.dwell_ms, 0xFFFF),
            0 if r.value is None else r.value.low, 0 if r.value is None else r.value.high, r.expiry_ns, r.tag,
        )
        for r in rows
    )  # fmt: skip


def decode_desired(frame: bytes) -> tuple[Desired, ...]:
    """The rows of a DESIRED frame; values are still to be checked against the device."""
    rows = []
    for uuid, control, flags, dwell_ms, low, high, expiry_ns, tag in _rows(frame, _WANT):
        if flags & 1 and low > high:
            raise FrameError(f"empty interval {low}..{high}")
        value = Interval(low, high) if flags & 1 else None
        rows.append(Desired(gpu_uuid(uuid), _pick(CONTROLS, control, "control"), value, expiry_ns, dwell_ms, tag))
    return tuple(rows)


def encode_outcomes(seq: int, time_ns: int, outcomes: Sequence[Outcome]) -> bytes:
    """What became of desired rows."""
    rows = []
    for o in outcomes:
        flags = (o.requested is not None) | (o.accepted is not None) << 1 | (o.enforced is not None) << 2
        flags |= (o.observed is not None) << 3
        req, acc = o.requested or Interval(0, 0), o.accepted or Interval(0, 0)
        rows.append(
            _OUTCOME.pack(
                gpu_bytes(o.uuid), CONTROLS.index(o.control), _VERDICTS.index(o.verdict), flags, 0, o.seq, req.low, req.high,
                acc.low, acc.high, o.enforced or 0, o.observed or 0, o.nvml_code, o.received_ns, o.called_ns, o.returned_ns,
                o.verified_ns, o.detail.encode()[:96],
            )
        )  # fmt: skip
    return _head(Kind.OUTCOME, seq, time_ns) + b"".join(rows)


def decode_outcomes(frame: bytes) -> tuple[Outcome, ...]:
    """The records of an OUTCOME frame."""
    outcomes = []
    for row in _rows(frame, _OUTCOME):
        (uuid, control, verdict, flags, _, seq, req_lo, req_hi, acc_lo, acc_hi, enforced, observed, code, received, called,
         returned, verified, detail) = row  # fmt: skip
        outcomes.append(
            Outcome(
                uuid=gpu_uuid(uuid), control=_pick(CONTROLS, control, "control"), seq=seq,
                requested=Interval(req_lo, req_hi) if flags & 1 else None,
                verdict=_pick(_VERDICTS, verdict, "verdict"),
                accepted=Interval(acc_lo, acc_hi) if flags & 2 else None,
                enforced=enforced if flags & 4 else None, observed=observed if flags & 8 else None, nvml_code=code,
                detail=detail.rstrip(b"\0").decode(errors="replace"), received_ns=received, called_ns=called,
                returned_ns=returned, verified_ns=verified,
            )
        )  # fmt: skip
    return tuple(outcomes)


def encode_command(seq: int, time_ns: int, command: Command, argument: int = 0) -> bytes:
    """One command."""
    return _head(Kind.COMMAND, seq, time_ns) + _COMMAND.pack(command, 0, 0, argument)


def decode_command(frame: bytes) -> tuple[Command, int]:
    """The command of a COMMAND frame and its argument."""
    if len(frame) != _HEADER.size + _COMMAND.size:
        raise FrameError("command of a wrong size")
    number, _, _, argument = _COMMAND.unpack_from(frame, _HEADER.size)
    try:
        return Command(number), argument
    except ValueError as error:
        raise FrameError(f"command {number}") from error


def encode_table(kind: Kind, seq: int, time_ns: int, table: Table, content: object) -> list[bytes]:
    """A JSON table as numbered chunks with a checksum over the whole."""
    data = json.dumps(content, separators=(",", ":")).encode()
    parts = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)] or [b""]
    crc = zlib.crc32(data)
    return [
        _head(kind, seq, time_ns) + _CHUNK.pack(table, n, len(parts), len(part), crc, len(data)) + part
        for n, part in enumerate(parts)
    ]


class TableReader:
    """Puts chunks together again; a gap, a wrong size or a wrong checksum is a FrameError and forgets the table."""

    def __init__(self, limit_bytes: int = 1 << 20) -> None:
        self._limit = limit_bytes
        self._open: dict[Table, list[bytes]] = {}

    def feed(self, frame: bytes) -> tuple[Table, Any] | None:
        """Take one chunk; returns (table, content) with the last one."""
        if len(frame) < _HEADER.size + _CHUNK.size:
            raise FrameError("short chunk")
        number, chunk, chunks, size, crc, total = _CHUNK.unpack_from(frame, _HEADER.size)
        part = frame[_HEADER.size + _CHUNK.size :]
        try:
            table = Table(number)
        except ValueError as error:
            raise FrameError(f"table {number}") from error
        parts = self._open.setdefault(table, [])
        if chunk == 0:
            parts.clear()
        if len(part) != size or chunk != len(parts) or total > self._limit or chunk >= chunks:
            self._open.pop(table, None)
            raise FrameError(f"chunk {chunk} of {chunks} of table {table.name} out of order or too large")
        parts.append(part)
        if chunk + 1 < chunks:
            return None
        data = b"".join(self._open.pop(table))
        if len(data) != total or zlib.crc32(data) != crc:
            raise FrameError(f"table {table.name}: wrong checksum")
        try:
            return table, json.loads(data)
        except ValueError as error:
            raise FrameError(f"table {table.name}: not JSON") from error
