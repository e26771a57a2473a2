"""The report as JSON: these types, unchanged, are the schema that docs/report.md describes.

House rules: fields are only ever added within a schema number; units are in the names; None is "not measured", never 0.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Amount:
    """A figure with its interval; ``value`` None: not known as a whole, ``known`` is what was measured of it."""

    value: float | None
    low: float | None
    high: float | None
    known: float | None


@dataclass(frozen=True, slots=True)
class GpuPart:
    """One GPU's energy in the report's time."""

    uuid: str
    index: int | None
    name: str
    energy_j: Amount
    method: str  # counter, steps, none
    note: str = ""


@dataclass(frozen=True, slots=True)
class PowerSeries:
    """A node's GPUs together over time, for the plot; Unix seconds."""

    time_s: tuple[float, ...]
    power_w: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class NodePart:
    """One node's share; ``error`` says why there is none."""

    name: str
    error: str | None
    energy_j: Amount
    method: str
    gpus: tuple[GpuPart, ...] = ()
    steps_energy_j: float | None = None  # what the job itself reported for steps and checkpoints
    power: PowerSeries | None = None
    cpu_energy_j: Amount | None = None  # of the whole node, whoever used it; None: not measured
    dram_energy_j: Amount | None = None


@dataclass(frozen=True, slots=True)
class JobPart:
    """The job as it reported itself, all nodes together."""

    state: str
    steps: int  # kept
    lost_steps: int
    unmeasured_steps: int
    step_time_s: float | None  # median of the kept steps, slowest node
    energy_per_kept_step_j: float | None
    goodput_ratio: float | None  # time in kept steps by the time from begin to end
    lost_energy_j: float | None  # of steps that a restore rolled back; None: not measured
    checkpoints: int
    checkpoint_time_s: float
    checkpoint_energy_j: float | None
    exceptions: int
    plan: str | None


@dataclass(frozen=True, slots=True)
class ShareWithInterval:
    """A share (0.03 is 3 %) with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Saving:
    """The ledger's verdict; shares only where there was something to compare, ``saved_*`` only when a saving is proven."""

    outcome: str  # saving, costs more, not proven
    text: str
    baseline: str  # what it is compared with
    optimised: str
    method: str
    confidence: float
    pairs: int
    blocks: int
    unmeasured_blocks: int
    saving: ShareWithInterval | None = None
    slowdown: ShareWithInterval | None = None
    saved_energy_j: Amount | None = None
    saved_cost: Amount | None = None
    saved_carbon_g: Amount | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class StepPoint:
    """One kept step of the whole job, for the plot."""

    step: int
    time_s: float
    energy_j: float | None
    plan: str | None


@dataclass(frozen=True, slots=True)
class Gap:
    """Something that is missing: which node or GPU (or the whole report) and what."""

    where: str
    what: str


@dataclass(frozen=True, slots=True)
class Factors:
    """What energy is multiplied with; None: not given, so neither cost nor carbon is told."""

    price_per_kwh: float | None
    currency: str
    carbon_g_per_kwh: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a report says."""

    schema: int
    powerd_version: str
    title: str
    job_name: str | None
    begin_s: float  # Unix seconds
    end_s: float
    made_s: float
    source: str  # nodes, prometheus
    simulated: bool | None  # None: the source does not tell
    energy_j: Amount
    method: str
    contains: tuple[str, ...]  # what the energy is of: gpu
    lacks: tuple[str, ...]  # what it is not of
    cost: Amount | None
    carbon_g: Amount | None
    factors: Factors
    job: JobPart | None
    saving: Saving | None  # None: no job was asked for
    nodes: tuple[NodePart, ...]
    host_energy_j: Amount | None  # CPUs and DRAM of all these nodes, beside ``energy_j``; None: measured on none
    steps: tuple[StepPoint, ...]
    gaps: tuple[Gap, ...]
