"""This rank's GPU through its node's daemon: who it is, the lease on its clocks, what its work used, the plan it follows.

House rules: everything here may take a moment and is called by the worker or at chosen step ends, never at an instruction; what
the daemon does not know is None; losing the lease is a state, not an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from powerd.client import Client, Lease, Span
from powerd.errors import PowerdError
from powerd.model import ClockPlan
from powerd_integrations.pipeline.measured import Row, Sheet
from powerd_integrations.pipeline.options import Options
from powerd_integrations.pipeline.recorded import BACKWARD, WEIGHT, Key

if TYPE_CHECKING:
    from powerd.client import Beats

SYNC = 1.3  # a last backward that takes so many times as long as the others has gradients to synchronise
OUTSIDE = "outside"  # between iterations: input, gradient synchronisation, optimizer
#: Clock event reasons that tell of a GPU that is held back; idle and the clocks that somebody asked for do not.
HELD_BACK = (
    "sw_power_cap",
    "hw_slowdown",
    "sw_thermal_slowdown",
    "hw_thermal_slowdown",
    "hw_power_brake",
    "board_limit",
    "reliability",
)


@dataclass(frozen=True, slots=True)
class Ran:
    """One iteration of this rank, in nanoseconds of the node's clock."""

    begin_ns: int
    end_ns: int
    instructions: tuple[tuple[Key, int, int], ...]  # what, begin, end

    @property
    def busy_s(self) -> float:
        """From the first instruction's begin to the last one's end: gradient synchronisation is outside."""
        return (self.instructions[-1][2] - self.instructions[0][1]) / 1e9

    @property
    def whole_s(self) -> float:
        """From the step's begin to the last instruction's end."""
        return (self.instructions[-1][2] - self.begin_ns) / 1e9


def iteration(begin_ns: int, end_ns: int, what: Sequence[Key], times_ns: Sequence[int]) -> Ran:
    """One iteration from the begin and end of each instruction; gradient synchronisation is cut off.

    Data parallelism by hooks (DDP, FSDP) synchronises inside each stage's last backward, where a pipeline waits for the slowest
    one: that backward counts for as long as the others of its kind take.
    """
    each: list[list[Any]] = [[key, begin, end] for key, begin, end in zip(what, times_ns[::2], times_ns[1::2], strict=True)]
    of_kind: dict[tuple[int, str], list[Any]] = {}
    for row in each:
        of_kind.setdefault(row[0][:2], []).append(row)
    for (_, kind), rows in of_kind.items():
        if kind in (BACKWARD, WEIGHT) and len(rows) > 2:
            last, usual_ns = rows[-1], median(end - begin for _, begin, end in rows[:-1])
            if last[2] - last[1] > SYNC * usual_ns:
                last[2] = last[1] + round(usual_ns)
    return Ran(begin_ns, end_ns, tuple((key, begin, end) for key, begin, end in each))


@dataclass(frozen=True, slots=True)
class Observed:
    """What the daemon saw of one stage in one iteration."""

    ceiling_mhz: int | None  # it never ran faster than this, though it was asked to
    reasons: tuple[str, ...]


def spans_of(steps: Sequence[Ran], label: Mapping[int, str] | None = None) -> list[Span]:
    """The iterations as labelled stretches of time, none overlapping; ``label`` adds a text to instruction n of each."""
    spans: list[Span] = []
    last_ns: int | None = None
    for step in steps:
        if last_ns is not None and step.begin_ns > last_ns:
            spans.append(Span(OUTSIDE, last_ns, step.begin_ns))
        for n, ((stage, kind, _), begin_ns, end_ns) in enumerate(step.instructions):
            if end_ns > begin_ns:
                spans.append(Span(f"{stage}/{kind}{(label or {}).get(n, '')}", begin_ns, end_ns))
        last_ns = max(step.end_ns, step.instructions[-1][2])
    return spans


class Gpu:
    """One GPU of this node and the lease that lets this job set its clocks."""

    def __init__(self, client: Client, uuid: str | None, options: Options, who: str) -> None:
        self.client, self.uuid, self._options, self._who = client, uuid, options, who
        self.name = self.driver = ""
        self.clocks_mhz: tuple[int, ...] = ()
        self._lease: Lease | None = None

    @property
    def ready(self) -> bool:
        """Whether its clocks can be set."""
        return self._lease is not None and self._lease.held and bool(self.clocks_mhz)

    @property
    def top_mhz(self) -> int:
        """The highest clock that this job may use."""
        return min(self.clocks_mhz[-1], self._options.highest_clock_mhz or self.clocks_mhz[-1])

    def prepare(self) -> bool:
        """Find the GPU and acquire its lease if that is not done; whether it is ready."""
        if self.ready:
            return True
        if self.uuid is None:
            self.uuid = self.client.guard("finding this rank's GPU", lambda: self.client.resolve("visible")[0], str) or None
            if self.uuid is None:
                return False
        if not self.clocks_mhz:
            for capabilities in self.client.node().gpus:
                if capabilities.gpu.uuid == self.uuid:
                    self.name, self.driver = capabilities.gpu.name, capabilities.driver_version
                    self.clocks_mhz = capabilities.sm_clocks_mhz
            if not self.clocks_mhz:
                return False
        self._lease = self.client.lease(
            [self.uuid], sm_clock_mhz=(None, self.top_mhz), reason=f"perseus: {self._who}", job=self._options.job, min_dwell_s=0.0
        )
        return self.ready

    def set_clock(self, mhz: int | None) -> None:
        """Pin the SM clock; None: up to the highest."""
        if self._lease is not None and self._lease.held:
            self._lease.change(sm_clock_mhz=(None, self.top_mhz) if mhz is None else mhz, wait_s=0.0)

    def arm(self, plan_id: str, clocks_mhz: Sequence[int | None], iteration_s: float) -> Beats | None:
        """Arm one pipeline rank's clocks; None when it is not ready. A clock of None (constant time) is the one before it."""
        if self._lease is None or self.uuid is None or not self.ready:
            return None
        top = self.top_mhz
        filled: list[int] = []
        for mhz in clocks_mhz:
            filled.append(mhz if mhz is not None else filled[-1] if filled else top)
        safe_mhz = self._options.safe_clock_mhz or top
        beats = self._lease.arm(ClockPlan(plan_id, self.uuid, tuple(filled), safe_mhz, iteration_s))
        return beats if beats.alive else None

    def sheet(self, mhz: int, steps: Sequence[Ran]) -> Sheet | None:
        """Time and energy per instruction of these iterations at this clock; None when the daemon cannot tell."""
        if not steps or self.uuid is None or not self.ready:
            return None
        view = self.client.spans(self.uuid, spans_of(steps))
        labels = {label.label: label for label in view.labels}
        times: dict[tuple[int, str], list[float]] = {}
        for step in steps:
            for (stage, kind, _), begin_ns, end_ns in step.instructions:
                times.setdefault((stage, kind), []).append((end_ns - begin_ns) / 1e9)
        rows = []
        for (stage, kind), seconds in sorted(times.items()):
            told = labels.get(f"{stage}/{kind}")
            if told is None or told.energy_j is None or told.time_s <= 0:
                return None
            time_s = median(seconds)  # an instruction that the machine held up does not count
            rows.append(Row(stage, kind, mhz, time_s, told.energy_j / told.time_s * time_s))
        blocked = labels.get("")
        watts = None
        if blocked is not None and blocked.energy_j is not None and blocked.time_s > 0:
            watts = max(0.0, blocked.energy_j / blocked.time_s)
        return Sheet(mhz, tuple(rows), watts, 0.0 if blocked is None else blocked.time_s)

    def observe(self, step: Ran, clocks_mhz: Sequence[int | None]) -> dict[int, Observed]:
        """Why the stages of this rank were slow in this iteration, as far as the daemon saw."""
        if self.uuid is None:
            return {}
        asked = {n: f"@{mhz}" for n, mhz in enumerate(clocks_mhz) if mhz is not None}
        view = self.client.spans(self.uuid, spans_of([step], asked))
        reasons: dict[int, set[str]] = {}
        ceilings: dict[int, list[int]] = {}
        for label in view.labels:
            name, _, wanted = label.label.partition("@")
            if not wanted:
                continue
            stage = int(name.partition("/")[0])
            held = reasons.setdefault(stage, set())
            held.update(reason for reason in label.clock_event_reasons if reason in HELD_BACK)
            if label.sm_clock_mhz is not None and label.sm_clock_mhz < 0.97 * int(wanted):
                ceilings.setdefault(stage, []).append(label.sm_clock_mhz)
        return {
            stage: Observed(max(ceilings.get(stage, ()), default=None), tuple(sorted(held))) for stage, held in reasons.items()
        }

    def release(self) -> None:
        """Give the lease back."""
        lease, self._lease = self._lease, None
        if lease is not None:
            try:
                lease.release()
            except PowerdError as error:
                self.client.warn("release", error)
