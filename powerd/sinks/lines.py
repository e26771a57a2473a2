"""powerd's rows as InfluxDB line protocol: few measurements, many fields, four tags, explicit milliseconds.

House rules: pure; what is unknown is left out; base units as on the Prometheus page; a field keeps its type for ever
(its unit says which); no text of a user can end a line, forge a field or make more series than the guard lets through.
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from powerd.api import LeaseView
from powerd.clock import NS
from powerd.jobs import JobRestored, JobRow, Record
from powerd.model import CLOCK_EVENT_REASONS, Control, Event, Health, LeaseState, Reading, Snapshot
from powerd.records import JobStepRow

MEASUREMENTS = ("gpu", "lease", "job", "inference", "event")
TAGS = ("host", "uuid", "job", "pool")
OTHER = "other"  # the tag value of whatever the guard did not let through
_DAY_S = 86_400
_TAG_LENGTH = 128
_TEXT_LENGTH = 1000
_UUID = re.compile(r"[A-Za-z0-9-]{1,80}")
_INT64 = 1 << 63
_FLOATS = ("_watts", "_joules", "_hertz", "_celsius", "_ratio", "_seconds", "_per_second")  # never integers
_REMEMBERED = 4096  # steps whose other ranks may still report

Value = str | int | float | bool | None


def tag(text: str) -> str:
    """A tag value as it will be stored: printable, no backslash (engines disagree on it), at most 128 characters."""
    clean = "".join(c if c.isprintable() and c != "\\" else "_" for c in text[:_TAG_LENGTH])
    return clean.encode("utf-8", "replace").decode()


def _escaped(text: str) -> str:
    return text.replace(",", "\\,").replace("=", "\\=").replace(" ", "\\ ")


def text_field(text: str) -> str:
    """A string field as it will be stored: at most 1000 characters, a space for each that cannot be printed (line feeds too)."""
    clean = "".join(c if c.isprintable() else " " for c in text[:_TEXT_LENGTH])
    return clean.encode("utf-8", "replace").decode()


def _field(name: str, value: Value) -> str | None:
    """A field's value in line protocol; None: it is left out."""
    if value is None:
        return None
    if type(value) is int and name.endswith(_FLOATS):
        value = float(value)
    if isinstance(value, str):
        return '"' + text_field(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value}i" if -_INT64 <= value < _INT64 else None
    return repr(value) if math.isfinite(value) else None


def line(measurement: str, tags: Mapping[str, str | None], fields: Mapping[str, Value], time_ms: int) -> str | None:
    """One line without its line feed; None when no field is known. Tag values are cleaned here, names are our own."""
    body = [f"{name}={text}" for name, value in fields.items() if (text := _field(name, value)) is not None]
    if not body:
        return None
    key = "".join(f",{name}={_escaped(clean)}" for name, value in tags.items() if value and (clean := tag(value)))
    return f"{measurement}{key} {','.join(body)} {time_ms}"


class Guard:
    """Lets so many different values of a tag through in a day; what comes after is ``other`` and is counted."""

    def __init__(self, limit: int) -> None:
        self.refused = 0
        self._limit = limit
        self._day = -1
        self._seen: set[str] = set()

    def __call__(self, value: str, wall_ns: int) -> str:
        """The value itself, or ``other``."""
        clean = tag(value)
        if (day := wall_ns // NS // _DAY_S) != self._day:
            self._day, self._seen = day, set()
        if clean in self._seen:
            return clean
        if len(self._seen) >= self._limit:
            self.refused += 1
            return OTHER
        self._seen.add(clean)
        return clean


@dataclass(frozen=True, slots=True)
class InferenceRow:
    """One pool of inference replicas over the seconds before ``wall_ns``."""

    pool: str
    wall_ns: int
    replicas: int | None = None
    tensor_parallel: int | None = None
    sm_clock_mhz: int | None = None
    requests_per_s: float | None = None
    queued: int | None = None
    ttft_p50_s: float | None = None
    ttft_p99_s: float | None = None
    tbt_p50_s: float | None = None
    tbt_p99_s: float | None = None
    energy_j: float | None = None
    slo_share: float | None = None  # of requests that met theirs
    fresh_replicas: int | None = None  # whose metrics are believed
    running: int | None = None
    power_w: float | None = None
    ttft_slo_s: float | None = None  # the strictest
    tbt_slo_s: float | None = None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _mean(values: Iterable[int | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _last(values: Iterable[int | None]) -> int | None:
    return next((v for v in reversed(list(values)) if v is not None), None)


def gpu_fields(readings: list[Reading]) -> dict[str, Value]:
    """The fields of one GPU's readings of one interval, oldest first: means of levels, the last of counters, all reasons seen."""
    one = len(readings) == 1
    now = readings[-1]

    def level(name: str, factor: float) -> float | None:
        return _scaled(getattr(now, name) if one else _mean(getattr(r, name) for r in readings), factor)

    def last(name: str) -> int | None:
        return getattr(now, name) if one else _last(getattr(r, name) for r in readings)

    up = now.health in (Health.UP, Health.SUSPECT)
    fields: dict[str, Value] = {
        "up": int(up),
        "energy_joules": _scaled(last("energy_mj"), 1e-3), "energy_epoch": now.epoch,
        "power_watts": level("power_mw", 1e-3), "power_average_watts": level("power_average_mw", 1e-3),
        "power_limit_requested_watts": _scaled(last("power_limit_requested_mw"), 1e-3),
        "power_limit_enforced_watts": _scaled(last("power_limit_enforced_mw"), 1e-3),
        "sm_clock_hertz": level("sm_clock_mhz", 1e6), "memory_clock_hertz": level("memory_clock_mhz", 1e6),
        "temperature_celsius": level("temperature_c", 1.0), "utilization_ratio": level("utilization_percent", 1e-2),
        "memory_used_bytes": last("memory_used_bytes"), "memory_size_bytes": last("memory_total_bytes"),
    }  # fmt: skip
    known = [r.clock_event_reasons for r in readings if r.clock_event_reasons is not None]
    if known:
        for bit, name in CLOCK_EVENT_REASONS.items():
            fields[f"event_{name}_ratio"] = sum(bool(bits & bit) for bits in known) / len(known)
    return fields


class Lines:
    """Turns rows into lines of one host; use it from one thread."""

    def __init__(self, host: str, *, sample_hz: float, every: bool, values_per_day: int = 1000) -> None:
        self.host = host
        self.guards = {"job": Guard(values_per_day), "pool": Guard(values_per_day)}
        self._step_ns = round(NS / sample_hz)
        self._every = every  # each snapshot is a point of its own
        self._slot = -1
        self._open: dict[str, list[Reading]] = {}
        self._open_ms = 0
        self._newest_ms: dict[str, int] = {}  # series -> its newest time, so that no two rows fall into one point
        self._steps: OrderedDict[tuple[str, int, int], int] = OrderedDict()

    @property
    def refused(self) -> int:
        """How many rows got ``other`` for a tag."""
        return sum(guard.refused for guard in self.guards.values())

    def snapshot(self, snapshot: Snapshot) -> list[str]:
        """The lines that are complete with this snapshot."""
        if self._every:
            return self._gpus({r.uuid: [r] for r in snapshot.readings}, snapshot.wall_ns // 1_000_000)
        out: list[str] = []
        if (slot := snapshot.wall_ns // self._step_ns) != self._slot:
            out, self._slot = self.finish(), slot
        for reading in snapshot.readings:
            self._open.setdefault(reading.uuid, []).append(reading)
        self._open_ms = snapshot.wall_ns // 1_000_000
        return out

    def finish(self) -> list[str]:
        """The lines of the interval that is open."""
        done, self._open = self._open, {}
        return self._gpus(done, self._open_ms)

    def _gpus(self, readings: Mapping[str, list[Reading]], time_ms: int) -> list[str]:
        made = (
            line("gpu", {"host": self.host, "uuid": uuid}, gpu_fields(own), time_ms)
            for uuid, own in readings.items()
            if _UUID.fullmatch(uuid)
        )
        return [one for one in made if one is not None]

    def _own(self, measurement: str, tags: Mapping[str, str | None], fields: Mapping[str, Value], time_ms: int) -> list[str]:
        """A line whose time no other row of its series has."""
        series = f"{measurement}{sorted(tags.items())}"
        newest = self._newest_ms.get(series, 0)
        if time_ms <= newest < time_ms + 60_000:  # a clock that stepped back further may reuse old times
            time_ms = newest + 1
        if len(self._newest_ms) > _REMEMBERED:
            self._newest_ms.clear()
        self._newest_ms[series] = time_ms
        made = line(measurement, {"host": self.host, **tags}, fields, time_ms)
        return [] if made is None else [made]

    def lease(self, wall_ns: int, view: LeaseView) -> list[str]:
        """How a lease stands now, once for each of its GPUs."""
        job = None if view.job is None else self.guards["job"](view.job, wall_ns)
        fields: dict[str, Value] = {
            "lease": view.id, "state": str(view.state), "active": int(view.state is LeaseState.ACTIVE),
            "class": view.want_class.value, "uid": view.uid, "user": view.user, "reason": view.reason,
            "end": None if view.end is None else str(view.end),
            "age_seconds": view.age_s, "expires_seconds": view.expires_in_s, "refused": len(view.refused),
        }  # fmt: skip
        for want in view.wants:
            power = want.control is Control.POWER_LIMIT
            name = f"{want.control}_{'watts' if power else 'hertz'}"
            for end, value in (("low", want.low), ("high", want.high)):
                fields[f"{end}_{name}"] = _scaled(value, 1e-3 if power else 1e6)
        out: list[str] = []
        for uuid in view.gpus:
            if _UUID.fullmatch(uuid):
                out += self._own("lease", {"uuid": uuid, "job": job}, fields, wall_ns // 1_000_000)
        return out

    def job(self, wall_ns: int, record: Record) -> list[str]:
        """A step of a job at its own time (told again by another rank it replaces itself), a restore, or a job's sums."""
        tags = {"job": self.guards["job"](record.job, wall_ns)}
        if isinstance(record, JobStepRow):
            return self._step(tags, record)
        if isinstance(record, JobRestored):
            return self._own("job", tags, {"attempt": record.attempt, "restored_step": record.step}, wall_ns // 1_000_000)
        return self._own("job", tags, _job_fields(record), wall_ns // 1_000_000)

    def _step(self, tags: Mapping[str, str], row: JobStepRow) -> list[str]:
        time_ms = row.wall_ns // 1_000_000  # no other step of the job has it, also after a restart
        if tags["job"] == OTHER:
            time_ms = self._among_others(row, time_ms)
        fields: dict[str, Value] = {
            "attempt": row.attempt, "step": row.step, "step_seconds": row.time_s, "step_energy_joules": row.energy_j,
            "step_sm_clock_hertz": _scaled(row.clock_mhz, 1e6), "step_plan": row.plan, "step_gpus": len(row.gpus),
        }  # fmt: skip
        made = line("job", {"host": self.host, **tags}, fields, time_ms)
        return [] if made is None else [made]

    def _among_others(self, row: JobStepRow, time_ms: int) -> int:
        """A time of its own for a step whose job shares its series with others; remembered for its other ranks."""
        key = (row.job, row.attempt, row.step)
        if (known_ms := self._steps.get(key)) is not None:
            return known_ms
        newest = self._newest_ms.get(OTHER, 0)
        if time_ms <= newest < time_ms + 60_000:
            time_ms = newest + 1
        self._newest_ms[OTHER] = self._steps[key] = time_ms
        if len(self._steps) > _REMEMBERED:
            self._steps.popitem(last=False)
        return time_ms

    def inference(self, row: InferenceRow) -> list[str]:
        """How a pool did."""
        fields: dict[str, Value] = {
            "replicas": row.replicas, "tensor_parallel": row.tensor_parallel, "sm_clock_hertz": _scaled(row.sm_clock_mhz, 1e6),
            "requests_per_second": row.requests_per_s, "queued": row.queued,
            "ttft_p50_seconds": row.ttft_p50_s, "ttft_p99_seconds": row.ttft_p99_s,
            "tbt_p50_seconds": row.tbt_p50_s, "tbt_p99_seconds": row.tbt_p99_s,
            "energy_joules": row.energy_j, "slo_ratio": row.slo_share,
            "fresh_replicas": row.fresh_replicas, "running": row.running, "power_watts": row.power_w,
            "ttft_slo_seconds": row.ttft_slo_s, "tbt_slo_seconds": row.tbt_slo_s,
        }  # fmt: skip
        return self._own("inference", {"pool": self.guards["pool"](row.pool, row.wall_ns)}, fields, row.wall_ns // 1_000_000)

    def event(self, event: Event) -> list[str]:
        """Something that happened."""
        uuid = event.uuid if event.uuid and _UUID.fullmatch(event.uuid) else None
        data = json.dumps(dict(event.data), separators=(",", ":")) if event.data else None
        fields: dict[str, Value] = {
            "kind": event.kind, "subject": event.subject, "detail": event.detail or None, "data": data, "number": event.seq,
        }  # fmt: skip
        return self._own("event", {"uuid": uuid}, fields, event.wall_ns // 1_000_000)


def _job_fields(row: JobRow) -> dict[str, Value]:
    return {
        "state": row.state, "running": int(row.state == "running"), "uid": row.uid, "attempt": row.attempt,
        "steps": row.steps, "lost_steps": row.lost_steps, "unmeasured_steps": row.unmeasured_steps,
        "energy_joules": row.energy_j, "exceptions": row.exceptions,
        "checkpoints": row.checkpoints, "checkpoint_seconds": row.checkpoint_time_s,
        "checkpoint_energy_joules": row.checkpoint_energy_j,
        "plan": row.plan, "gpus": len(row.gpus),
    }  # fmt: skip
