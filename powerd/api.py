"""Request and response types shared by server and client; with the routes (powerd.routes) OpenAPI is made from them.

House rules: stdlib only; a field is defined once (powerd.model's where one exists); fields are only ever added within a major
version; JSON names are the field names; UUIDs address GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from powerd.model import (
    Capabilities,
    ClockPlan,
    Control,
    Event,
    Interval,
    LeaseEnd,
    LeaseState,
    Outcome,
    PlanState,
    Reading,
    Setpoint,
    WantClass,
)

#: An older client of the same major version keeps working; header ``Powerd-Api`` on every request and response.
API_VERSION = (1, 0)
API_HEADER = "Powerd-Api"
MAX_BODY_BYTES = 64 * 1024  # of a request, unless its route says more
FLIGHT_HEADER = "Powerd-Sim-Flight"  # the client counts its messages on a stepped clock


@dataclass(frozen=True, slots=True)
class WantSpec:
    """What a client asks for one control: at least one bound; equal bounds pin it. mW or MHz."""

    control: Control
    low: int | None = None
    high: int | None = None


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """``POST /v1/leases``: set these controls on these GPUs for this reason until released, expired or the holder dies."""

    gpus: tuple[str, ...]  # UUIDs
    wants: tuple[WantSpec, ...]
    reason: str
    ttl_s: float | None = None  # None: the daemon's default
    job: str | None = None
    detached: bool = False  # True: bound to TTL and heartbeat only, not to a connection
    min_dwell_s: float | None = None  # declared by a clock plan or a profiling sweep
    dry_run: bool = False
    wait_s: float = 2.0  # how long the answer may wait for outcomes
    want_class: WantClass = WantClass.LEASE  # 2 budget, 3 lease, 4 policy, 5 default; safety and site limits are not for clients


@dataclass(frozen=True, slots=True)
class LeaseChange:
    """``PATCH /v1/leases/{id}``: replace the wants of a live lease (header ``Powerd-Lease-Token``)."""

    wants: tuple[WantSpec, ...]
    wait_s: float = 2.0


@dataclass(frozen=True, slots=True)
class LeaseView:
    """A lease as anybody who may see it sees it; ``token`` only in the answer that grants it."""

    id: str
    state: LeaseState
    want_class: WantClass
    uid: int
    user: str
    pid: int | None
    gpus: tuple[str, ...]
    wants: tuple[WantSpec, ...]
    reason: str
    job: str | None
    detached: bool
    ttl_s: float
    expires_in_s: float
    age_s: float
    outcomes: tuple[Outcome, ...] = ()
    refused: tuple[RefusalView, ...] = ()
    end: LeaseEnd | None = None
    token: str | None = None
    dry_run: bool = False
    plans: tuple[PlanView, ...] = ()


@dataclass(frozen=True, slots=True)
class RefusalView:
    """A want that is not served and why."""

    uuid: str
    control: Control
    why: str


@dataclass(frozen=True, slots=True)
class NodeView:
    """``GET /v1/node``: what this node is and whether powerd may set anything."""

    version: str
    api_version: str
    hostname: str
    simulated: bool
    time_scale: float | None  # of a simulated node; 0 = stepped
    control: bool
    control_why: str  # why not, in one line
    panic: bool
    quiesced: bool
    driver_version: str | None
    hw_connected: bool
    hw_generation: int | None
    sample_hz: float
    started_wall_ns: int
    config_reload_ok: bool
    config_error: str
    gpus: tuple[Capabilities, ...]


@dataclass(frozen=True, slots=True)
class SnapshotView:
    """``GET /v1/snapshot``: the readings that the caller may see; ``age_s`` is that of the oldest."""

    seq: int
    time_ns: int
    wall_ns: int
    age_s: float
    simulated: bool
    readings: tuple[Reading, ...]


@dataclass(frozen=True, slots=True)
class ControlExplain:
    """Why one control of one GPU is what it is."""

    control: Control
    available: bool
    unavailable_reason: str
    baseline: Interval | None
    device: Interval | None
    site: Interval | None
    setpoint: Setpoint | None  # winner, losers (refused), everything considered
    outcome: Outcome | None  # requested / accepted / enforced / observed
    last_change_by: str | None


@dataclass(frozen=True, slots=True)
class Explain:
    """``GET /v1/explain/{uuid}``: requested, accepted, enforced, observed, winner, losers, limits, clock event reasons."""

    uuid: str
    index: int
    name: str
    health: str
    reading: Reading | None
    clock_event_reasons: tuple[str, ...]
    controls: tuple[ControlExplain, ...]
    leases: tuple[LeaseView, ...]
    recent_events: tuple[Event, ...]
    plans: tuple[PlanView, ...] = ()  # clock plans on this GPU


@dataclass(frozen=True, slots=True)
class WindowBegin:
    """``POST /v1/windows``: start measuring energy on these GPUs."""

    gpus: tuple[str, ...]
    name: str = ""
    job: str | None = None


@dataclass(frozen=True, slots=True)
class EnergyFigure:
    """Energy of one GPU in one window: the true value lies in ``low_j..high_j`` with 95 % confidence."""

    uuid: str
    energy_j: float | None  # None when it cannot be known (GPU lost, counter reset inside the window)
    low_j: float | None
    high_j: float | None
    average_power_w: float | None
    method: str  # counter, counter+power, integrated
    epochs: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class WindowView:
    """An energy window; ``figures`` once it has ended. ``duration_s`` is between the two requests as the daemon saw them."""

    id: str
    name: str
    job: str | None
    begin_ns: int
    end_ns: int | None
    duration_s: float | None
    figures: tuple[EnergyFigure, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """``POST /v1/leases/{id}/plans``: arm a clock plan on one GPU of a live lease that wants a bound on the SM clock.

    The answer comes when powerd-hw has taken it; the beat socket arrives on the lease's attach connection (fd passing).
    A plan already armed on that GPU is replaced, at the next beat with index 0.
    """

    plan: ClockPlan


@dataclass(frozen=True, slots=True)
class PlanView:
    """A clock plan as it stands; ``ceiling_mhz`` is what its clocks are cut to now, None when nothing cuts them."""

    id: str
    lease: str
    uuid: str
    state: PlanState
    instructions: int
    step: int | None  # of the newest beat
    index: int | None
    ceiling_mhz: int | None
    switches: int  # clocks set since it was armed
    why: str = ""  # it is safe or has ended
    number: int = 0  # what its beats carry
    plan: ClockPlan | None = None  # GET .../plans only; None there: armed before this powerd started


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of time of one GPU with a label; CLOCK_BOOTTIME nanoseconds of the node."""

    label: str
    begin_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class SpansRequest:
    """``POST /v1/energy/spans``: what each kind of work on one GPU used, from samples that are already there.

    Spans do not overlap; what no span covers between the first begin and the last end is answered with label ``""``.
    """

    uuid: str
    spans: tuple[Span, ...]
    wait: bool = True  # for the sample that closes the last span


@dataclass(frozen=True, slots=True)
class LabelEnergy:
    """All spans of one label together; the true energy lies in ``low_j..high_j`` with 95 % confidence."""

    label: str
    spans: int
    time_s: float
    energy_j: float | None  # None: not known (GPU lost, counter restarted, older than what is kept)
    low_j: float | None
    high_j: float | None
    clock_event_reasons: tuple[str, ...] = ()  # seen while it ran
    sm_clock_mhz: int | None = None  # median seen while it ran


@dataclass(frozen=True, slots=True)
class SpansView:
    """The energy of every label, fitted to the counter's course: spans may be shorter than a sampling period."""

    uuid: str
    labels: tuple[LabelEnergy, ...]
    samples: int
    method: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class JobStep:
    """One training step as a job reports it; energy is of the reporting ranks' GPUs."""

    step: int
    begin_ns: int  # CLOCK_BOOTTIME of the node
    end_ns: int
    gpus: tuple[str, ...]
    plan: str | None = None  # id of the clock plan in force; "baseline": full clock, to compare with; "profile": a sweep
    energy_j: float | None = None
    clock_mhz: float | None = None  # time-weighted mean


@dataclass(frozen=True, slots=True)
class JobEvent:
    """``POST /v1/jobs/{job}/events``: start, step, restore, checkpoint_begin, checkpoint_end, exception, end, note."""

    kind: str
    rank: int = 0
    steps: tuple[JobStep, ...] = ()  # of kind step; several at once
    step: int | None = None  # restore: the last step that is kept
    detail: str = ""
    time_ns: int | None = None  # CLOCK_BOOTTIME of what happened; None: when it arrived
    energy_j: float | None = None  # checkpoint_end: what the checkpoint used


@dataclass(frozen=True, slots=True)
class JobView:
    """``GET /v1/jobs`` and ``/v1/jobs/{job}``: a job's time and energy; goodput counts only steps that were kept."""

    job: str
    state: str  # running, ended, failed, silent
    begin_wall_ns: int
    end_wall_ns: int | None
    steps: int  # retained
    lost_steps: int  # rolled back by a restore
    time_s: float | None  # median step
    energy_j: float | None  # all of it
    energy_per_retained_step_j: float | None
    saving_fraction: float | None  # against the job's own steps at full clock; None: not measured
    plan: str | None
    gpus: tuple[str, ...]
    unmeasured_steps: int = 0  # whose energy is not known: in no sum
    checkpoints: int = 0
    checkpoint_time_s: float = 0.0
    checkpoint_energy_j: float | None = None
    exceptions: int = 0
    last_detail: str = ""  # of the newest exception, end or note


@dataclass(frozen=True, slots=True)
class HistorySeries:
    """One GPU's history: ``columns[name][i]`` belongs to ``time_s[i]`` (Unix seconds, start of the bucket)."""

    uuid: str
    step_s: float
    time_s: tuple[float, ...]
    columns: Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True, slots=True)
class HistoryView:
    """``GET /v1/history?gpu=&since=&until=&points=&columns=``: from the table that answers the range cheaply."""

    table: str
    since_s: float
    until_s: float
    series: tuple[HistorySeries, ...]


@dataclass(frozen=True, slots=True)
class ErrorView:
    """Every error answer: ``{"error": {...}}``."""

    code: str
    message: str
    hint: str
    fault: str


@dataclass(frozen=True, slots=True)
class Ack:
    """A command was carried out; ``detail`` says what changed."""

    ok: bool = True
    detail: str = ""


@dataclass(frozen=True, slots=True)
class QuiesceRequest:
    """``POST /v1/quiesce``: baseline everywhere, close every NVML handle, resume by itself after ``max_s``."""

    max_s: float = 900.0
    reason: str = ""


#: First message on the attach socket (SOCK_SEQPACKET, JSON): {"api": "1.0", "lease": id, "token": token}; the answer is an
#: ErrorView or a LeaseView. From then on the lease lives no longer than this connection and the process that opened it.
#: Later messages are LeaseViews, an ErrorView at its end, {"beats": plan id, "number": n} with one end of a beat socket, and
#: {"plan": PlanView} when a clock plan is cut to another ceiling, falls back to its safe clock or ends.
ATTACH_MAX_BYTES = 4096
LEASE_TOKEN_HEADER = "Powerd-Lease-Token"  # noqa: S105 (a header's name, not a secret)
