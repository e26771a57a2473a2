"""The vocabulary of powerd: every field is defined here once, for server, client, hw and simulator alike.

House rules: frozen and slotted; units in names; missing is ``None``, never 0; a GPU is its UUID, an index is only printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum


class Control(StrEnum):
    """A setting of one GPU that powerd may change; nothing else is ever set."""

    POWER_LIMIT = "power_limit"
    SM_CLOCK = "sm_clock"
    MEMORY_CLOCK = "memory_clock"

    @property
    def unit(self) -> str:
        """The unit of values of this control as NVML counts it."""
        return "mW" if self is Control.POWER_LIMIT else "MHz"


class WantClass(IntEnum):
    """Precedence of a want: a smaller number is intersected first and so wins (design.md section 4)."""

    SAFETY = 0
    SITE_LIMIT = 1
    BUDGET = 2
    LEASE = 3
    POLICY = 4
    DEFAULT = 5


class Health(StrEnum):
    """Whether powerd can still talk to a GPU."""

    UP = "up"
    LOST = "lost"
    WEDGED = "wedged"
    SUSPECT = "suspect"


class EnergyMethod(StrEnum):
    """How an energy figure came about."""

    COUNTER = "counter"
    INTEGRATED = "integrated"


class Verdict(StrEnum):
    """What is known of a setpoint after the driver was asked (daemons.md fact 4: success is not effect)."""

    PENDING = "pending"
    APPLIED = "applied"
    PENDING_LOAD = "pending_load"
    OVERRIDDEN = "overridden"
    FAILED = "failed"


class LeaseState(StrEnum):
    """Where a lease stands; transitions are the table of powerd.lease."""

    ACTIVE = "active"
    DETACHED = "detached"
    SUSPENDED = "suspended"
    ENDED = "ended"


class LeaseEnd(StrEnum):
    """Why a lease ended; shown to its holder and counted in powerd_restore_total."""

    RELEASED = "released"
    EXPIRED = "expired"
    HOLDER_DIED = "holder_died"
    CONNECTION_CLOSED = "connection_closed"
    NOT_REATTACHED = "not_reattached"
    REVOKED = "revoked"
    PANIC = "panic"
    GPU_GONE = "gpu_gone"
    DRIFT = "drift"


class Restart(StrEnum):
    """Why settings went back to baseline (label ``cause`` of powerd_restore_total)."""

    LEASE_END = "lease_end"
    SETPOINT_EXPIRED = "setpoint_expired"
    GRACE_ENDED = "grace_ended"
    JOURNAL_REPLAY = "journal_replay"
    PANIC = "panic"
    SHUTDOWN = "shutdown"
    QUIESCE = "quiesce"


#: Clock event reason bits of NVML and their names in metrics, API and explain.
CLOCK_EVENT_REASONS: Mapping[int, str] = {
    0x1: "gpu_idle",
    0x2: "applications_clocks",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake",
    0x100: "display_clocks",
    0x200: "board_limit",
    0x400: "reliability",
}


def reason_names(bits: int) -> tuple[str, ...]:
    """The names of all set clock event reason bits, unknown bits as ``0x...``."""
    known = tuple(name for bit, name in CLOCK_EVENT_REASONS.items() if bits & bit)
    rest = bits & ~sum(CLOCK_EVENT_REASONS)
    return (*known, hex(rest)) if rest else known


@dataclass(frozen=True, slots=True)
class Gpu:
    """Who a GPU is: stable for the life of a driver load."""

    uuid: str
    index: int
    name: str
    pci_bus_id: str
    minor_number: int | None = None


@dataclass(frozen=True, slots=True)
class Support:
    """Whether a control can be used on this GPU and, if not, why (capability matrix)."""

    available: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one GPU can do under the loaded driver, probed once per driver generation."""

    gpu: Gpu
    driver_version: str
    power_limit_min_mw: int | None
    power_limit_max_mw: int | None
    power_limit_default_mw: int | None
    sm_clocks_mhz: tuple[int, ...]  # ascending
    memory_clocks_mhz: tuple[int, ...]  # ascending
    energy_counter: bool
    persistence: bool | None
    mig: bool | None
    simulated: bool
    controls: Mapping[Control, Support]

    def interval(self, control: Control) -> Interval | None:
        """The device's own range for a control, or ``None`` when it has none."""
        if control is Control.POWER_LIMIT:
            if self.power_limit_min_mw is None or self.power_limit_max_mw is None:
                return None
            return Interval(self.power_limit_min_mw, self.power_limit_max_mw)
        table = self.sm_clocks_mhz if control is Control.SM_CLOCK else self.memory_clocks_mhz
        return Interval(table[0], table[-1]) if table else None


@dataclass(frozen=True, slots=True)
class Reading:
    """One GPU at one moment; times are nanoseconds of the daemon's CLOCK_BOOTTIME."""

    uuid: str
    time_ns: int
    health: Health
    epoch: int  # rises when the energy counter restarts: never subtract across epochs
    energy_mj: int | None = None
    energy_time_ns: int | None = None  # when this counter value was first seen
    power_mw: int | None = None
    power_average_mw: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    temperature_c: int | None = None
    utilization_percent: int | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    power_limit_requested_mw: int | None = None
    power_limit_enforced_mw: int | None = None
    clock_event_reasons: int | None = None
    energy_method: EnergyMethod = EnergyMethod.COUNTER


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All GPUs of the node as last read; immutable, replaced as a whole by one writer."""

    seq: int
    time_ns: int
    wall_ns: int  # time_ns on the wall clock
    readings: tuple[Reading, ...]

    def of(self, uuid: str) -> Reading | None:
        """The reading of one GPU, or ``None``."""
        return next((r for r in self.readings if r.uuid == uuid), None)


@dataclass(frozen=True, slots=True)
class Interval:
    """A closed range of values in the control's NVML unit (mW or MHz)."""

    low: int
    high: int

    def meet(self, other: Interval) -> Interval | None:
        """The intersection, or ``None`` when it would be empty."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        return Interval(low, high) if low <= high else None

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Want:
    """One principal's wish for one (GPU, control): an interval, a class and a stated reason."""

    source: str  # lease id, policy name, "site", "safety", ...
    uuid: str
    control: Control
    interval: Interval
    want_class: WantClass
    reason: str
    since_ns: int = 0  # orders equals: the older want goes first
    min_dwell_ns: int | None = None  # own dwell of an admitted clock plan or sweep; None: the node's


@dataclass(frozen=True, slots=True)
class Refusal:
    """A want that would have emptied the interval (or cannot be served) and was skipped; its holder is told."""

    want: Want
    why: str


@dataclass(frozen=True, slots=True)
class Setpoint:
    """What one (GPU, control) shall be, with everything that led there; ``value`` None means baseline."""

    uuid: str
    control: Control
    value: Interval | None  # power limit: low == high; clocks: the (min, max) lock
    winner: str | None = None
    reason: str = ""
    considered: tuple[Want, ...] = ()
    refused: tuple[Refusal, ...] = ()
    deferred_until_ns: int | None = None  # a step down waits for the minimum dwell


class PlanState(StrEnum):
    """Where an armed clock plan stands."""

    ARMED = "armed"  # no beat yet: the safe clock holds
    RUNNING = "running"
    SAFE = "safe"  # a wrong or late beat, or one that asked for it: the safe clock holds until a step begins again
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class ClockPlan:
    """The SM clocks of one GPU for one iteration, in the order of its instructions; armed once, followed by beats.

    A plan only ever lowers: what is set is each clock cut to the setpoint that the lease's own want on this GPU leads to.
    """

    id: str  # at most 32 printable characters; shown by explain, events and the job's log
    uuid: str
    clocks_mhz: tuple[int, ...]  # one per instruction
    safe_mhz: int | None  # holds before the first beat and after a wrong, late or missing one; None: the lease's own bounds
    iteration_s: float  # planned time of one iteration
    late_factor: float = 2.0  # no beat for so many iterations means the safe clock


@dataclass(frozen=True, slots=True)
class Outcome:
    """What hw did for one (GPU, control): requested, accepted, enforced, observed, and how long each step took."""

    uuid: str
    control: Control
    seq: int  # of the desired table that asked
    requested: Interval | None  # None: baseline
    verdict: Verdict
    accepted: Interval | None = None  # what the driver was told and took
    enforced: int | None = None  # read back (power limit) in mW
    observed: int | None = None  # seen under load (clock) in MHz
    nvml_code: int = 0
    detail: str = ""
    received_ns: int = 0
    called_ns: int = 0
    returned_ns: int = 0
    verified_ns: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that changed and that somebody may have to know; INFO lines and SSE come from these."""

    seq: int
    time_ns: int
    wall_ns: int
    kind: str  # lease_granted, lease_ended, restored, drift, gpu_lost, ...
    uuid: str | None = None
    subject: str | None = None  # lease id, control, policy
    detail: str = ""
    data: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SloClass:
    """Prompts of at most so many tokens, which the class before does not hold, and their seconds to the first token."""

    max_prompt_tokens: int
    ttft_s: float
