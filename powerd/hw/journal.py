"""What powerd has set and what was there before, on disk before the driver is told: so that any crash can be undone.

House rules: a record is on disk before the call it announces; nothing in a damaged file is believed further than its checksums
reach; the journal of another boot or driver load is worth nothing, because settings do not outlive those.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from uuid import UUID

from powerd.errors import ConfigError
from powerd.hw.frames import CONTROLS, gpu_bytes, gpu_uuid
from powerd.killpoint import killpoint
from powerd.model import Control, Interval

SCHEMA = 2
_READABLE = (1, 2)  # schema 1 had no epoch records
RECORD_BYTES = 64
CAPACITY_BYTES = 256 * 1024
_COMPACT_BYTES = CAPACITY_BYTES - 64 * RECORD_BYTES  # room for one record of everything while a compaction is due
_BODY = struct.Struct("<BBBxII16siiQ")  # type, control, flags, schema, generation, uuid, low, high, epoch/value
_CRC = struct.Struct("<I")
_HEADER = struct.Struct("<BxxxII16s16s")  # type, schema, generation, boot id, driver load id
_EMPTY = bytes(RECORD_BYTES)
FILE_NAME = "journal"
Key = tuple[str, Control]


class _Type(IntEnum):
    HEADER = 1
    BASELINE = 2
    INTENT = 3
    DONE = 4
    RESTORED = 5
    EPOCH = 6


@dataclass(frozen=True, slots=True)
class Entry:
    """One (GPU, control) that is or may be away from its baseline."""

    baseline: Interval | None  # found before the first write; None: unlocked, or a limit that could not be read
    intent: Interval | None = None  # what the driver was last about to be told
    done: bool = False


@dataclass(slots=True)
class Recovered:
    """What the file says, and how far it can be believed."""

    entries: dict[Key, Entry] = field(default_factory=dict)
    epochs: dict[str, tuple[int, int]] = field(default_factory=dict)  # uuid -> (epoch, energy_mj)
    stale: bool = False  # another boot or driver load: discarded
    damaged: str = ""  # why records may be missing: then every control of every GPU is restored by the rule
    quarantined: Path | None = None


def boot_id() -> bytes:
    """This boot, 16 bytes."""
    return UUID(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()).bytes


def _seal(body: bytes) -> bytes:
    body = body.ljust(RECORD_BYTES - _CRC.size, b"\0")
    return body + _CRC.pack(zlib.crc32(body) ^ 0x5057)


def _sound(record: bytes) -> bool:
    return int(_CRC.unpack_from(record, RECORD_BYTES - _CRC.size)[0]) == zlib.crc32(record[: -_CRC.size]) ^ 0x5057


def _record(kind: _Type, uuid: str, control: Control | None, value: Interval | None, generation: int, extra: int = 0) -> bytes:
    low, high = (value.low, value.high) if value else (0, 0)
    index = CONTROLS.index(control) if control else 0
    return _seal(_BODY.pack(kind, index, value is not None, SCHEMA, generation, gpu_bytes(uuid), low, high, extra))


def _fold(record: bytes, into: Recovered) -> bool:
    """Apply one sound record; False when it makes no sense."""
    kind, index, has_value, _, _, raw, low, high, extra = _BODY.unpack_from(record)
    if index >= len(CONTROLS) or kind not in set(_Type) - {_Type.HEADER}:
        return False
    uuid, value = gpu_uuid(raw), Interval(low, high) if has_value else None
    key = (uuid, CONTROLS[index])
    entry = into.entries.get(key)
    if kind == _Type.EPOCH:
        into.epochs[uuid] = (low, extra)
    elif kind == _Type.BASELINE:
        into.entries[key] = Entry(value)
    elif kind == _Type.RESTORED:
        into.entries.pop(key, None)
    elif entry is None:
        return False  # an intent or its completion without a baseline before it
    elif kind == _Type.INTENT:
        into.entries[key] = Entry(entry.baseline, value)
    else:
        into.entries[key] = Entry(entry.baseline, value, done=True)
    return True


def parse(data: bytes, boot: bytes, driver_load: bytes | None) -> Recovered:
    """Read the bytes of a journal; pure; ``driver_load`` may be ``None`` when it is not known yet.

    A torn tail keeps what is before it, a corrupt middle keeps nothing.
    """
    found = Recovered()
    if len(data) < RECORD_BYTES or not _sound(data[:RECORD_BYTES]):
        found.damaged = "the header is damaged"
        return found
    kind, schema, _, header_boot, header_load = _HEADER.unpack_from(data)
    if kind != _Type.HEADER or schema not in _READABLE:
        found.damaged = f"schema {schema} is not one this version reads ({', '.join(map(str, _READABLE))})"
        return found
    records = [data[i : i + RECORD_BYTES] for i in range(RECORD_BYTES, len(data), RECORD_BYTES)]
    end = max((n + 1 for n, record in enumerate(records) if record.strip(b"\0")), default=0)
    for n, record in enumerate(records[:end]):
        if len(record) == RECORD_BYTES and _sound(record) and _fold(record, found):
            continue
        if any(len(later) == RECORD_BYTES and _sound(later) for later in records[n + 1 : end]):
            found.entries.clear()
            found.damaged = f"record {n + 1} is damaged and others follow it"
        else:
            found.damaged = f"record {n + 1} is torn"
        break
    if not found.damaged and len(data) != CAPACITY_BYTES:
        found.damaged = f"{len(data)} bytes instead of {CAPACITY_BYTES}: its end is missing"
    if header_boot != boot or driver_load not in (None, header_load):
        found.stale, found.damaged = True, ""
        found.entries.clear()
    return found


def is_clean(directory: Path) -> bool:
    """Whether the journal says, without asking any driver, that there is nothing to restore."""
    try:
        fd = os.open(directory / FILE_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    with os.fdopen(fd, "rb") as stream:
        found = parse(stream.read(2 * CAPACITY_BYTES), boot_id(), None)
    return not found.entries and not found.damaged


def not_undone(data: bytes) -> list[str]:
    """One line for each thing that a journal's bytes say is away from its baseline; none when all has been undone.

    For a reader without a driver: which load the file is of does not matter to it, so the file's own word is taken.
    """
    found = parse(data, boot_id(), None)
    return [f"{uuid} {control.value}" for uuid, control in found.entries] + ([found.damaged] if found.damaged else [])


class Journal:
    """The open journal of the one worker that may write; every method may be called from any thread."""

    def __init__(
        self,
        directory: Path,
        driver_load: bytes,
        generation: int,
        everything: Mapping[Key, Interval | None],
        boot: bytes | None = None,
    ) -> None:
        """Recover what is there; after damage ``everything`` (each control of each GPU and its rule baseline) fills the gaps."""
        self._directory, self._load, self._generation = directory, driver_load, generation
        self._boot = boot or boot_id()
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._appended = self._synced = 0
        self._fd = -1
        self.recovered = self._recover()
        self._entries: dict[Key, Entry] = dict(self.recovered.entries)
        if self.recovered.damaged:
            for key, baseline in everything.items():
                self._entries.setdefault(key, Entry(baseline))
        self._epochs = dict(self.recovered.epochs)
        self._rewrite()

    @property
    def path(self) -> Path:
        """The file."""
        return self._directory / FILE_NAME

    def _recover(self) -> Recovered:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return Recovered()
        except OSError:
            return self._quarantine(Recovered(damaged="it is not a plain file"))
        with os.fdopen(fd, "rb") as stream:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
                return self._quarantine(Recovered(damaged="others own it or can reach it"))
            found = parse(stream.read(2 * CAPACITY_BYTES), self._boot, self._load)
        return self._quarantine(found) if found.damaged else found

    def _quarantine(self, found: Recovered) -> Recovered:
        for n in range(1_000_000):
            aside = self.path.with_name(f"{FILE_NAME}.invalid-{n}")
            if not os.path.lexists(aside):
                break
        # a copy stays in place until the rewrite below replaces it: no moment without a journal
        try:
            os.link(self.path, aside, follow_symlinks=False)
        except OSError:  # not a file at all
            os.rename(self.path, aside)
        found.quarantined = aside
        return found

    def _rewrite(self) -> None:
        """Compaction: header and live state into a new file that takes the old one's place in one step."""
        rows = [_seal(_HEADER.pack(_Type.HEADER, SCHEMA, self._generation, self._boot, self._load))]
        for uuid, (epoch, energy_mj) in list(self._epochs.items()):
            rows.append(_record(_Type.EPOCH, uuid, None, Interval(epoch, epoch), self._generation, energy_mj))
        for (uuid, control), entry in list(self._entries.items()):
            rows.append(_record(_Type.BASELINE, uuid, control, entry.baseline, self._generation))
            if entry.intent is not None or entry.done:
                rows.append(_record(_Type.DONE if entry.done else _Type.INTENT, uuid, control, entry.intent, self._generation))
        data = b"".join(rows)
        temporary = self._directory / f"{FILE_NAME}.new"
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            # zeros are written, not only reserved: a later fdatasync then moves data and no metadata, and never lacks space
            os.pwrite(fd, data.ljust(CAPACITY_BYTES, b"\0"), 0)
            os.fsync(fd)
            killpoint("hw.journal.compacted")
            os.replace(temporary, self.path)
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except BaseException:
            os.close(fd)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._end = fd, len(data)

    def _append(self, rows: list[bytes], sync: bool) -> None:
        data = b"".join(rows)
        with self._lock:
            if self._end + len(data) > _COMPACT_BYTES:
                with self._sync_lock:
                    self._rewrite()
                    self._synced = self._appended
            os.pwrite(self._fd, data, self._end)
            self._end += len(data)
            self._appended += 1
            mine = self._appended
        if not sync:
            return
        with self._sync_lock:  # whoever waited here may find that another thread's sync covered its record
            if self._synced >= mine:
                return
            covered = self._appended
            os.fdatasync(self._fd)
            self._synced = covered

    def entry(self, uuid: str, control: Control) -> Entry | None:
        """The journalled state of a pair, ``None`` when powerd has not touched it."""
        return self._entries.get((uuid, control))

    def touched(self) -> list[Key]:
        """Every pair that is not known to be at baseline."""
        return list(self._entries)

    def intend(self, uuid: str, control: Control, baseline: Interval | None, value: Interval) -> None:
        """On disk when this returns: the baseline (used at the first write of the pair only) and what the driver will be told."""
        key, rows = (uuid, control), []
        entry = self._entries.get(key)
        if entry is None:
            rows.append(_record(_Type.BASELINE, uuid, control, baseline, self._generation))
            entry = Entry(baseline)
        rows.append(_record(_Type.INTENT, uuid, control, value, self._generation))
        self._entries[key] = Entry(entry.baseline, value)
        self._append(rows, sync=True)

    def done(self, uuid: str, control: Control, value: Interval) -> None:
        """The driver has taken it; needs no sync: a lost one only makes the restore repeat itself."""
        entry = self._entries[uuid, control]
        self._entries[uuid, control] = Entry(entry.baseline, value, done=True)
        self._append([_record(_Type.DONE, uuid, control, value, self._generation)], sync=False)

    def restored(self, uuid: str, control: Control) -> None:
        """The pair is at baseline: forget it."""
        self._entries.pop((uuid, control), None)
        self._append([_record(_Type.RESTORED, uuid, control, None, self._generation)], sync=False)

    def epoch(self, uuid: str, epoch: int, energy_mj: int) -> None:
        """Remember which epoch the energy counter is in."""
        self._epochs[uuid] = (epoch, energy_mj)
        self._append([_record(_Type.EPOCH, uuid, None, Interval(epoch, epoch), self._generation, energy_mj)], sync=False)

    def close(self) -> None:
        """Leave the file as it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def prepare_directory(directory: Path) -> None:
    """Make the journal's directory (0700, ours); ConfigError when somebody else could put files into it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = directory.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise ConfigError(f"{directory}: others own or can write it", hint="chown it to the user of powerd-hw and chmod 0700")
