"""What the JSON tables of the wire hold: capabilities, processes, events, as plain rows of powerd.model's fields.

House rules: field names are the model's own; a row that does not fit is a FrameError; pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from powerd.hw.frames import FrameError
from powerd.model import Capabilities, Control, Event, Gpu, Support


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """One process on one GPU as NVML reports it: a host PID and the GPU memory it uses (``None``: not told)."""

    pid: int
    memory_bytes: int | None


def capabilities_row(capabilities: Capabilities) -> dict[str, Any]:
    """One row of the CAPABILITIES table."""
    row = asdict(capabilities)
    row["controls"] = {control.value: asdict(support) for control, support in capabilities.controls.items()}
    return row


def capabilities_of(row: Mapping[str, Any]) -> Capabilities:
    """The Capabilities of one row."""
    try:
        fields = dict(row)
        fields["gpu"] = Gpu(**fields["gpu"])
        fields["controls"] = {Control(name): Support(**support) for name, support in fields["controls"].items()}
        for name in ("sm_clocks_mhz", "memory_clocks_mhz"):
            fields[name] = tuple(fields[name])
        return Capabilities(**fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FrameError(f"capabilities: {error}") from error


def event_row(event: Event) -> dict[str, Any]:
    """The content of an EVENT table; ``seq`` is hw's own count."""
    return asdict(event)


def event_of(row: Mapping[str, Any]) -> Event:
    """The Event of an EVENT table."""
    try:
        return Event(**row)
    except TypeError as error:
        raise FrameError(f"event: {error}") from error


def processes_row(processes: Mapping[str, Sequence[GpuProcess]]) -> dict[str, list[list[int | None]]]:
    """The content of the PROCESSES table: UUID -> [[pid, memory_bytes], ...]; a GPU that cannot tell is absent."""
    return {uuid: [[p.pid, p.memory_bytes] for p in rows] for uuid, rows in processes.items()}


def processes_of(content: Mapping[str, Any]) -> dict[str, tuple[GpuProcess, ...]]:
    """The processes per GPU UUID of a PROCESSES table."""
    try:
        return {uuid: tuple(GpuProcess(int(pid), used) for pid, used in rows) for uuid, rows in content.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise FrameError(f"processes: {error}") from error
