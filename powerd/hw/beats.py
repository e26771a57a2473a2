"""The clock plans of one GPU inside the worker: their sockets, the one that is followed, and what becomes of its clocks.

House rules: whatever a beat socket says, its thread goes on or ends quietly; the setter is woken and never waited for; a plan
only lowers: every clock is cut to the setpoint, and whoever is cut is told; a flood is read slowly, so that it costs its sender.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from powerd.clock import NEVER_NS, NS, Clock
from powerd.config import LimitsConfig
from powerd.errors import DeviceError, PowerdError
from powerd.hw import bounds
from powerd.hw.frames import Kind, Table, TableReader
from powerd.hw.plan import BEAT, TROUBLE, Beat, Follower, Order, checked, no_row, order_of
from powerd.killpoint import killpoint
from powerd.model import Capabilities, Control, Interval, PlanState

_BURST = 64  # beats that may come at once
_BURST_NS = NS // 100
_LOOKS = 8
_NAP_S = 0.001  # a fifth of what the driver takes to set a clock
_PAUSE_S = 0.01  # for a sender that sends more
_TELL_NS = NS  # one event of a plan's trouble in this time, one table of how many beats came
_SOON_NS = NS // 20  # between two tables that tell of other states


class Follows(Protocol):
    """What an actuator is to its GPU's clock plans."""

    plans: GpuPlans

    def arm(self, order: Order, link: socket.socket) -> None: ...


class Tells(Protocol):
    """The line to the supervisor."""

    def table(self, kind: Kind, table: Table, content: object) -> None: ...


@dataclass(slots=True, eq=False)
class _Plan:
    """One armed plan with its socket."""

    follower: Follower
    link: socket.socket
    clocks: dict[int, int]  # a clock of the plan -> as the site's limits admit it
    highest_mhz: int
    ceiling_mhz: int | None = None
    switches: int = 0
    ended: bool = False
    told_ns: int = 0
    untold: int = 0

    @property
    def number(self) -> int:
        return self.follower.order.number

    def row(self) -> dict[str, Any]:
        follower, order = self.follower, self.follower.order
        return {
            "id": order.plan.id, "number": order.number, "lease": order.lease, "uuid": order.plan.uuid,
            "state": follower.state.value, "instructions": len(order.plan.clocks_mhz), "step": follower.step,
            "index": follower.index, "ceiling_mhz": self.ceiling_mhz, "switches": self.switches, "why": follower.why,
            "beats": {beat.value: count for beat, count in follower.beats.items()},
        }  # fmt: skip


class GpuPlans:
    """The plan that one GPU follows and the one that will replace it when a step begins."""

    def __init__(self, uuid: str, clock: Clock, tell: Callable[..., None], wake: Callable[[], None]) -> None:
        self.report: Callable[[], None] = lambda: None  # something worth telling powerd at once
        self.changed = False  # since it was last told
        self._uuid, self._clock, self._tell, self._wake = uuid, clock, tell, wake
        self._lock = threading.Lock()
        self._now: _Plan | None = None
        self._next: _Plan | None = None
        self._ended: list[dict[str, Any]] = []

    # what is armed

    @property
    def active(self) -> bool:
        """Whether a plan decides the SM clock."""
        return self._now is not None

    def arm(self, order: Order, link: socket.socket, capabilities: Capabilities, limits: LimitsConfig) -> None:
        """Follow a plan; when another one is followed, from this one's first beat on. RequestError, DeviceError: it cannot be."""
        order = Order(order.number, order.lease, checked(order.plan, capabilities), order.why)
        plan = _Plan(Follower(order), link, {}, 0)
        self._admit(plan, capabilities, limits)
        with self._lock:
            replaced, self._next = self._next, None
            if self._now is None or self._now.follower.why == Beat.CLOSED:
                replaced, self._now = self._now, plan
            else:
                self._next = plan
        if replaced is not None:
            self._end(replaced, "replaced before it began" if replaced.follower.step is None else "replaced")
        link.setblocking(True)
        threading.Thread(target=self._listen, args=(plan,), name=f"beats-{self._uuid[-6:]}", daemon=True).start()
        killpoint("hw.plan.armed")
        self._tell("plan_armed", self._uuid, order.plan.id, order.why, lease=order.lease, instructions=len(order.plan.clocks_mhz))
        self._news()

    @staticmethod
    def _admit(plan: _Plan, capabilities: Capabilities, limits: LimitsConfig) -> None:
        asked = plan.follower.order.plan
        clocks = {*asked.clocks_mhz} if asked.safe_mhz is None else {*asked.clocks_mhz, asked.safe_mhz}
        plan.clocks = {c: bounds.admit(Interval(c, c), Control.SM_CLOCK, capabilities, limits).high for c in clocks}
        plan.highest_mhz = max(clocks)

    def configure(self, capabilities: Capabilities, limits: LimitsConfig) -> None:
        """The site's limits have changed. DeviceError when they admit no clock at all."""
        with self._lock:
            for plan in filter(None, (self._now, self._next)):
                self._admit(plan, capabilities, limits)

    def disarm(self, number: int) -> None:
        """Give up the plan with this number, if there is one."""
        with self._lock:
            gone = next((p for p in (self._now, self._next) if p is not None and p.number == number), None)
            if gone is not None and gone is self._now:
                self._now, self._next = self._next, None
            elif gone is not None:
                self._next = None
        if gone is not None:
            self._end(gone, "given up by its holder")
            self._wake()

    def end_all(self, why: str) -> None:
        """The SM clock is nobody's any more."""
        with self._lock:
            gone, self._now, self._next = (self._now, self._next), None, None
        for plan in filter(None, gone):
            self._end(plan, why)

    def _end(self, plan: _Plan, why: str) -> None:
        """Its thread reads what is under way to the end and closes; its holder's next beat fails."""
        order = plan.follower.order
        with self._lock:
            plan.ended, plan.follower.state, plan.follower.why = True, PlanState.ENDED, why
            self._ended.append(plan.row())
        with contextlib.suppress(OSError):  # the holder has gone already
            plan.link.shutdown(socket.SHUT_RDWR)
        self._tell("plan_ended", self._uuid, order.plan.id, why, lease=order.lease, switches=plan.switches)
        self._news()

    # beats

    def _listen(self, plan: _Plan) -> None:
        """The thread of one socket."""
        link, count, since_ns = plan.link, 0, 0
        while True:
            message = self._next_message(link, soon=count > 0)
            if not message:
                break
            try:
                self._beat(plan, message)
            finally:
                self._clock.flight(-1)
            count += 1
            if count % _BURST == 0:
                now_ns = self._clock.now_ns()
                if now_ns - since_ns < _BURST_NS:
                    threading.Event().wait(_PAUSE_S)
                since_ns = now_ns
        self._happened(plan, Beat.CLOSED)
        link.close()

    @staticmethod
    def _next_message(link: socket.socket, soon: bool) -> bytes:
        """What comes next; empty when the socket is closed.

        To wake a reader that waits costs its sender more than the sending. Short instructions come in rows, so after one the
        next is looked for a few times before the thread waits for it.
        """
        try:
            for _ in range(_LOOKS if soon else 0):
                try:
                    return link.recv(BEAT.size + 1, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    time.sleep(_NAP_S)
            return link.recv(BEAT.size + 1)
        except OSError:
            return b""

    def _beat(self, plan: _Plan, message: bytes) -> None:
        replaced: _Plan | None = None
        now_ns = self._clock.now_ns()
        with self._lock:
            if plan.ended:
                return
            what, changed = plan.follower.take(message, now_ns)
            if plan is self._next and what is Beat.BEGIN:
                replaced, self._now, self._next = self._now, plan, None
        self._wake()
        self.changed = True
        if replaced is not None:
            self._end(replaced, "replaced")
        if changed:
            self._changed(plan, what)

    def _happened(self, plan: _Plan, what: Beat) -> None:
        with self._lock:
            if plan.ended:
                return
            changed = plan.follower.happen(what)
        self._wake()
        if changed:
            self._changed(plan, what)

    def _changed(self, plan: _Plan, what: Beat) -> None:
        """Its state is another one now."""
        if what in TROUBLE:
            now_ns = self._clock.now_ns()
            if now_ns - plan.told_ns >= _TELL_NS or not plan.told_ns:
                plan.told_ns = now_ns
                order, follower = plan.follower.order, plan.follower
                why = {Beat.WRONG: "a wrong beat", Beat.LATE: "no beat in time", Beat.CLOSED: "its socket was closed"}[what]
                more, plan.untold = plan.untold, 0
                where = "before its first step" if follower.step is None else f"at step {follower.step}, index {follower.index}"
                self._tell(
                    "plan_safe",
                    self._uuid,
                    order.plan.id,
                    f"{why} {where}: safe clock",
                    lease=order.lease,
                    verdict=what,
                    untold=more,
                )
            else:
                plan.untold += 1
        self._news()

    def _news(self) -> None:
        self.changed = True
        self.report()

    # what the setter asks

    def follow(self, now_ns: int, target: Interval) -> Interval | None:
        """The lock that the plan wants now below this setpoint; ``None``: the setpoint as it is."""
        late = None
        with self._lock:
            plan = self._now
            if plan is None:
                return None
            if now_ns >= plan.follower.late_ns:
                late = plan.follower.happen(Beat.LATE)
            clock_mhz = plan.follower.clock_mhz
            value = None
            if clock_mhz is not None:
                effective = min(plan.clocks[clock_mhz], target.high)
                value = Interval(effective, effective)
            ceiling = target.high if target.high < plan.highest_mhz else None
            clamped, plan.ceiling_mhz = ceiling != plan.ceiling_mhz, ceiling
        if late:
            self._changed(plan, Beat.LATE)
        if clamped:
            order = plan.follower.order
            detail = "nothing cuts it any more" if ceiling is None else f"its clocks are cut to {ceiling} MHz"
            self._tell("plan_clamped", self._uuid, order.plan.id, detail, lease=order.lease, ceiling_mhz=ceiling or 0)
            self._news()
        return value

    def span(self, target: Interval) -> Interval:
        """Everything that the plan may ever set below this setpoint: what the journal is told once."""
        with self._lock:
            clocks = [min(c, target.high) for p in (self._now, self._next) if p is not None for c in p.clocks.values()]
        return Interval(min([target.low, *clocks]), max([target.high, *clocks]))

    def switched(self) -> None:
        """The driver has taken another clock."""
        with self._lock:
            if self._now is not None:
                self._now.switches += 1
        self.changed = True

    @property
    def late_ns(self) -> int:
        """When ``follow`` has to be asked again although no beat came."""
        plan = self._now
        return NEVER_NS if plan is None else plan.follower.late_ns

    # what is told

    def take_rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The plans as they stand, and those that have ended since the last call."""
        with self._lock:
            self.changed = False
            ended, self._ended = self._ended, []
            return [plan.row() for plan in (self._now, self._next) if plan is not None], ended


class Plans:
    """The clock plans of all GPUs of a worker: what the supervisor says of them, and what it is told."""

    def __init__(self, actuators: Mapping[str, Follows], clock: Clock, line: Tells, wake: Callable[[], None]) -> None:
        self._actuators, self._clock, self._line, self._wake = actuators, clock, line, wake
        self._reader = TableReader()
        self._telling = threading.Lock()  # an older picture must not follow a newer one
        self._urgent = False
        self._told_ns = 0
        for actuator in actuators.values():
            actuator.plans.report = self._report

    def _report(self) -> None:
        self._urgent = True
        self._wake()

    def take(self, frame: bytes, descriptors: list[int]) -> None:
        """A PLAN frame of the supervisor; a plan that cannot be followed is answered as ended."""
        if (whole := self._reader.feed(frame)) is None:
            return
        what = order_of(whole[1])
        if isinstance(what, int):
            for actuator in self._actuators.values():
                actuator.plans.disarm(what)
        elif descriptors:
            link = socket.socket(fileno=descriptors.pop())
            try:
                if what.plan.uuid not in self._actuators:
                    raise DeviceError(f"no GPU {what.plan.uuid}", code="gpu_lost")
                self._actuators[what.plan.uuid].arm(what, link)
            except PowerdError as error:
                self._line.table(Kind.TABLE, Table.PLANS, {"rows": [], "ended": [no_row(what, PlanState.ENDED, str(error))]})
                link.close()
        self.tell(self._clock.now_ns(), at_once=True)

    def tell(self, now_ns: int, *, at_once: bool = False) -> None:
        """Say how the plans stand: a change of state soon, numbers that only grow once a second."""
        with self._telling:
            pause_ns = 0 if at_once else _SOON_NS if self._urgent else _TELL_NS
            if now_ns < self._told_ns + pause_ns or not any(a.plans.changed for a in self._actuators.values()):
                return
            self._urgent, self._told_ns = False, now_ns
            rows, ended = [], []
            for actuator in self._actuators.values():
                standing, gone = actuator.plans.take_rows()
                rows += standing
                ended += gone
            self._line.table(Kind.TABLE, Table.PLANS, {"rows": rows, "ended": ended})
