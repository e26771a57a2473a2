"""A clock plan and the beats that drive it: what a beat means where the plan stands, and which clock holds then.

House rules: pure, time comes in; the state machine is a table, and what is not in it changes nothing; anything but the successor
means the safe clock until a later step begins; numbers that come from outside are checked before they are believed.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from powerd.clock import NEVER_NS, NS
from powerd.errors import RequestError
from powerd.hw.bounds import snap
from powerd.hw.frames import FrameError
from powerd.model import Capabilities, ClockPlan, Interval, PlanState

#: One beat: plan number, step, index. Index i says that instruction i comes next; SAFE_INDEX asks for the safe clock.
BEAT = struct.Struct("<III")
SAFE_INDEX = 0xFFFFFFFF
MAX_INSTRUCTIONS = 65536
MAX_ITERATION_S = 3600.0
MAX_LATE_FACTOR = 100.0
_MAX_ID = 32


class Beat(StrEnum):
    """What can happen to an armed plan (label ``verdict`` of powerd_plan_beats_total)."""

    BEGIN = "begin"  # the first instruction of a later step
    NEXT = "next"  # the next instruction of the present step
    ASKED = "asked"  # the holder asks for the safe clock
    WRONG = "wrong"  # not the successor, not this plan, not a beat at all
    IGNORED = "ignored"  # at the safe clock, until a step begins
    LATE = "late"  # none came for too long
    CLOSED = "closed"  # the holder closed the socket


_ARMED, _RUNNING, _SAFE = PlanState.ARMED, PlanState.RUNNING, PlanState.SAFE

#: (state, what happened) -> next state; what is absent changes nothing.
TRANSITIONS: Mapping[tuple[PlanState, Beat], PlanState] = {
    (_ARMED, Beat.BEGIN): _RUNNING,
    (_ARMED, Beat.ASKED): _SAFE,
    (_ARMED, Beat.WRONG): _SAFE,
    (_ARMED, Beat.CLOSED): _SAFE,
    (_RUNNING, Beat.BEGIN): _RUNNING,
    (_RUNNING, Beat.NEXT): _RUNNING,
    (_RUNNING, Beat.ASKED): _SAFE,
    (_RUNNING, Beat.WRONG): _SAFE,
    (_RUNNING, Beat.LATE): _SAFE,
    (_RUNNING, Beat.CLOSED): _SAFE,
    (_SAFE, Beat.BEGIN): _RUNNING,
    (_SAFE, Beat.CLOSED): _SAFE,
}
#: Somebody has to be told of these.
TROUBLE = frozenset({Beat.WRONG, Beat.LATE, Beat.CLOSED})


@dataclass(frozen=True, slots=True)
class Order:
    """What powerd asks of hw: follow this plan of this lease; ``number`` is what its beats carry."""

    number: int
    lease: str
    plan: ClockPlan
    why: str = ""  # not empty: it begins at the safe clock, for this reason

    def row(self) -> dict[str, Any]:
        """As it travels."""
        return {"do": "arm", "number": self.number, "lease": self.lease, "plan": asdict(self.plan), "why": self.why}


def order_of(content: Any) -> Order | int:
    """What a PLAN table says: a plan to arm, or the number of one to give up. FrameError when it makes no sense."""
    try:
        number = content["number"]
        if type(number) is not int or not 0 < number < 1 << 32:
            raise FrameError(f"plan number {number!r}")
        if content["do"] == "disarm":
            return number
        fields = dict(content["plan"])
        fields["clocks_mhz"] = tuple(fields["clocks_mhz"])
        order = Order(number, content["lease"], ClockPlan(**fields), content.get("why", ""))
        times = (float(order.plan.iteration_s), float(order.plan.late_factor))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise FrameError(f"plan: {error!r}") from error
    plan = order.plan
    texts = (order.lease, order.why, plan.id, plan.uuid)
    clocks = plan.clocks_mhz if plan.safe_mhz is None else (*plan.clocks_mhz, plan.safe_mhz)
    if (
        content["do"] != "arm"
        or not all(isinstance(t, str) for t in texts)
        or not all(type(c) is int for c in clocks)
        or not all(math.isfinite(t) for t in times)
    ):
        raise FrameError("plan: fields of a wrong type")
    return order


def no_row(order: Order, state: PlanState, why: str) -> dict[str, Any]:
    """What is known of a plan that no worker has told anything of."""
    return {
        "id": order.plan.id, "number": order.number, "lease": order.lease, "uuid": order.plan.uuid, "state": state.value,
        "instructions": len(order.plan.clocks_mhz), "step": None, "index": None, "ceiling_mhz": None, "switches": 0, "why": why,
        "beats": {},
    }  # fmt: skip


def checked(plan: ClockPlan, capabilities: Capabilities) -> ClockPlan:
    """The plan with every clock snapped to a supported one. RequestError (bad_value) that names what is wrong, and where."""

    def wrong(what: str, hint: str = "") -> RequestError:
        return RequestError(what, hint=hint, code="bad_value")

    if not 0 < len(plan.id) <= _MAX_ID or not plan.id.isprintable():
        raise wrong(f"a plan's id has 1 to {_MAX_ID} printable characters")
    if not 0 < len(plan.clocks_mhz) <= MAX_INSTRUCTIONS:
        raise wrong(f"a plan has 1 to {MAX_INSTRUCTIONS} instructions, this one {len(plan.clocks_mhz)}")
    if not (math.isfinite(plan.iteration_s) and 0 < plan.iteration_s <= MAX_ITERATION_S):
        raise wrong(f"iteration_s {plan.iteration_s:g} is outside 0..{MAX_ITERATION_S:g}")
    if not 1 <= plan.late_factor <= MAX_LATE_FACTOR:
        raise wrong(f"late_factor {plan.late_factor:g} is outside 1..{MAX_LATE_FACTOR:g}")
    table = capabilities.sm_clocks_mhz
    if not table:
        raise wrong(f"{plan.uuid} offers no SM clocks")
    known: dict[int, int] = {}

    def snapped(clock_mhz: int, where: str) -> int:
        if clock_mhz not in known:
            if not table[0] <= clock_mhz <= table[-1]:
                raise wrong(f"{where}: {clock_mhz} MHz is outside the device's {table[0]}..{table[-1]} MHz")
            known[clock_mhz] = snap(Interval(clock_mhz, clock_mhz), table).high
        return known[clock_mhz]

    clocks = tuple(snapped(clock, f"clocks_mhz[{index}]") for index, clock in enumerate(plan.clocks_mhz))
    return replace(plan, clocks_mhz=clocks, safe_mhz=None if plan.safe_mhz is None else snapped(plan.safe_mhz, "safe_mhz"))


class Follower:
    """Where one armed plan stands; every message and the passing of time go through ``happen``."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.state = PlanState.SAFE if order.why else PlanState.ARMED
        self.why = order.why
        self.step: int | None = None  # of the last beat that was followed
        self.index: int | None = None
        self.beats: Counter[Beat] = Counter()
        self._count = len(order.plan.clocks_mhz)
        self._late_ns = round(order.plan.iteration_s * order.plan.late_factor * NS)
        self._last_ns = 0

    def meaning(self, message: bytes) -> Beat:
        """What a message is where the plan stands; changes nothing."""
        running = self.state is PlanState.RUNNING
        otherwise = Beat.IGNORED if self.state is PlanState.SAFE else Beat.WRONG
        if len(message) != BEAT.size:
            return otherwise
        number, step, index = BEAT.unpack(message)
        if number != self.order.number:
            return otherwise
        if index == SAFE_INDEX:
            return Beat.ASKED
        if running and step == self.step:
            return Beat.NEXT if self.index is not None and index == self.index + 1 < self._count else Beat.WRONG
        later = self.step is None or step > self.step
        return Beat.BEGIN if index == 0 and later and (not running or self.index == self._count - 1) else otherwise

    def take(self, message: bytes, now_ns: int) -> tuple[Beat, bool]:
        """Follow a message: what it was, and whether it changed the state."""
        what = self.meaning(message)
        if what in (Beat.NEXT, Beat.BEGIN):
            _, self.step, self.index = BEAT.unpack(message)
            self._last_ns = now_ns
        return what, self.happen(what)

    def happen(self, what: Beat) -> bool:
        """Count it and go where the table says; True when the state changed."""
        self.beats[what] += 1
        before = self.state
        self.state = TRANSITIONS.get((before, what), before)
        if before is PlanState.SAFE and what is Beat.CLOSED:
            self.why = str(what)
        if self.state is before:
            return False
        self.why = str(what) if self.state is PlanState.SAFE else ""
        return True

    @property
    def late_ns(self) -> int:
        """When the next beat has to have come."""
        return self._last_ns + self._late_ns if self.state is PlanState.RUNNING else NEVER_NS

    @property
    def clock_mhz(self) -> int | None:
        """The clock that holds now, before any ceiling; ``None``: the setpoint's own bounds."""
        if self.state is PlanState.RUNNING and self.index is not None:
            return self.order.plan.clocks_mhz[self.index]
        return self.order.plan.safe_mhz
