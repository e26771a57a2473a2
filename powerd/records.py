"""What a node stores and shows again as it is: steps of jobs, past leases, the load of the host.

House rules: stdlib only, as powerd.api, whose types these are a part of; a row of a store's table is one of these.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JobStepRow:
    """One step of a job, all ranks that reported it so far together: the row of every sink, replaced by (job, attempt, step)."""

    job: str
    attempt: int  # rises with every restore
    step: int
    wall_ns: int  # of its end as it was first told; a millisecond is of one step of a job only, and stays whoever tells more
    begin_ns: int
    end_ns: int
    time_s: float  # of the slowest rank
    energy_j: float | None  # of all ranks
    clock_mhz: float | None
    plan: str | None
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LeaseRow:
    """``GET /v1/history/leases``: a lease as it was last, also long after its end."""

    id: str
    wall_ns: int  # of its last change
    state: str
    ending: str | None  # why it ended
    uid: int
    job: str | None
    reason: str
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process on a GPU and whose it is."""

    uuid: str
    pid: int
    user: str | None  # None: it has gone
    name: str | None


@dataclass(frozen=True, slots=True)
class HostLoad:
    """``GET /v1/node/load``: the host around the GPUs over the last second; ``processes`` only for who may read everything."""

    wall_ns: int
    cpu_ratio: float | None  # of all CPUs, 0 to 1
    load_1min: float | None
    memory_used_bytes: int | None
    memory_size_bytes: int | None
    processes: tuple[GpuProcess, ...] = ()
    cpu_energy_j: float | None = None  # of all packages, rising; begins again with powerd; None: RAPL cannot be read
    dram_energy_j: float | None = None
