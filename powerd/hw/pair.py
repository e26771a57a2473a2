"""One (GPU, control) as the actuator knows it, and the decisions about it.

House rules: pure, time comes in; a step down waits for its dwell, a step up and a restore never do; a verdict that was settled
changes only when the new one lasts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum

from powerd.clock import NEVER_NS, NS
from powerd.errors import DeviceError
from powerd.hw import verify
from powerd.model import Control, Interval, Outcome, Reading, Restart, Verdict

_STEADY_NS = NS  # a settled verdict changes only when the new one lasts this long


class Act(Enum):
    """What has to be done for a pair."""

    NOTHING = 0
    SET = 1
    RESTORE = 2


@dataclass(slots=True)
class Pair:
    """One (GPU, control): what is wished, what the driver was told, what is known of it."""

    control: Control
    wish: Interval | None = None
    seq: int = 0
    received_ns: int = 0
    dwell_ns: int = 0
    cause: Restart = Restart.LEASE_END
    target: Interval | None = None  # the wish as the device and the site admit it
    follows: bool = False  # a clock plan decides what is set below the target
    planned: Interval | None = None  # the lock that the plan wants now; None: the target as it is
    promised: Interval | None = None  # what the journal knows may be set
    told_ns: int = 0  # when powerd was last told an outcome
    untold: bool = False  # it has not been told the newest
    refused: DeviceError | None = None
    touched: bool = False  # it is or may be away from baseline
    held: Interval | None = None  # what the driver took; None with ``touched``: not known
    set_ns: int = 0
    stepped_down_ns: int = 0
    attempts: int = 0
    retry_ns: int = 0
    drifts: int = 0
    drift_ns: int = 0
    yielded: bool = False
    outcome: Outcome | None = None
    answered: bool = True  # the present wish has had its first settled outcome
    candidate: tuple[Verdict, int] | None = field(default=None)

    @property
    def goal(self) -> Interval | None:
        """What shall be set now."""
        return self.target if self.planned is None or self.target is None else self.planned


def evicted(pair: Pair) -> bool:
    """No value that the site permits is left for the wish: what the driver was told for it has to go."""
    return pair.wish is not None and pair.target is None and pair.refused is not None and pair.refused.code.name == "bad_value"


def decide(pair: Pair, now_ns: int) -> tuple[Act, int]:
    """What to do for a pair now, or (NOTHING, when to look again); pure."""
    if pair.wish is None or evicted(pair):
        if not pair.touched:
            return Act.NOTHING, NEVER_NS
        return (Act.NOTHING, pair.retry_ns) if now_ns < pair.retry_ns else (Act.RESTORE, 0)
    goal = pair.goal
    if pair.refused or pair.yielded or goal is None or pair.held == goal:
        return Act.NOTHING, NEVER_NS
    if now_ns < pair.retry_ns:
        return Act.NOTHING, pair.retry_ns
    due_ns = pair.stepped_down_ns + pair.dwell_ns
    waits = not pair.follows and pair.stepped_down_ns > 0  # a plan's own switch rate holds while it runs
    if waits and pair.held is not None and goal.high < pair.held.high and now_ns < due_ns:
        return Act.NOTHING, due_ns
    return Act.SET, 0


def look(pair: Pair, held: Interval, reading: Reading, slow_ns: int) -> verify.Finding | None:
    """What a reading (its slow part read at ``slow_ns``) says of the value held; ``None``: nothing yet."""
    if pair.control is Control.POWER_LIMIT:
        if slow_ns <= pair.set_ns:
            return None
        return verify.limit(held.high, reading.power_limit_requested_mw, reading.power_limit_enforced_mw)
    if pair.control is Control.SM_CLOCK:
        return verify.clock(held, reading.sm_clock_mhz, reading, pair.set_ns)
    fresh = reading if slow_ns > pair.set_ns else replace(reading, memory_clock_mhz=None)
    return verify.clock(held, fresh.memory_clock_mhz, reading, pair.set_ns)


def is_news(pair: Pair, last: Outcome, finding: verify.Finding, now_ns: int) -> bool:
    """Whether a finding is worth a new outcome; remembers since when it differs from a settled one."""
    same = finding.verdict is last.verdict and (finding.verdict is not Verdict.OVERRIDDEN or finding.detail == last.detail)
    if same or (finding.verdict in (Verdict.PENDING_LOAD, Verdict.PENDING) and last.verdict is not Verdict.PENDING):
        pair.candidate = None
        return False
    if last.verdict not in (Verdict.PENDING, Verdict.PENDING_LOAD):
        if pair.candidate is None or pair.candidate[0] is not finding.verdict:
            pair.candidate = (finding.verdict, now_ns)
        if now_ns - pair.candidate[1] < _STEADY_NS:
            return False
    pair.candidate = None
    return True


def failed(pair: Pair, uuid: str, verdict: Verdict, detail: str = "", nvml_code: int = 0) -> Outcome:
    """An outcome without a driver call that did something."""
    return Outcome(
        uuid=uuid, control=pair.control, seq=pair.seq, requested=pair.wish, verdict=verdict, detail=detail, nvml_code=nvml_code,
        received_ns=pair.received_ns,
    )  # fmt: skip


def found(outcome: Outcome, finding: verify.Finding, now_ns: int) -> Outcome:
    """The outcome with what was found by looking."""
    detail = "; ".join(part for part in (outcome.detail if finding.verdict is Verdict.PENDING else "", finding.detail) if part)
    return replace(
        outcome, verdict=finding.verdict, detail=detail, enforced=finding.enforced, observed=finding.observed, verified_ns=now_ns
    )


def clamped(wish: Interval | None, value: Interval) -> str:
    """How the value differs from the wish; empty when it does not."""
    return "" if wish == value or wish is None else f"{wish.low}..{wish.high} admitted as {value.low}..{value.high}"


def by_gpu(
    rows: Iterable[tuple[str, Control, Interval | None, int, Restart]],
) -> dict[str, dict[Control, tuple[Interval | None, int, Restart]]]:
    """Desired rows sorted by GPU, as ``Actuator.want`` takes them."""
    table: dict[str, dict[Control, tuple[Interval | None, int, Restart]]] = {}
    for uuid, control, value, dwell_ns, cause in rows:
        table.setdefault(uuid, {})[control] = (value, dwell_ns, cause)
    return table
