"""The clock plans of this node's leases: handed to powerd-hw, told to their holders, given up with their lease.

House rules: what powerd-hw says of its plans is the truth, here and after a restart of either side; a plan belongs to one live,
attached lease and ends with it; a holder whose plan is cut, falls back or ends is told at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from powerd.api import PlanView
from powerd.clock import Clock
from powerd.decode import nearest
from powerd.errors import DeviceError, RequestError, UnavailableError
from powerd.hw.frames import FrameError
from powerd.hw.plan import Order, checked
from powerd.hwlink import Hw
from powerd.killpoint import killpoint
from powerd.lease import Lease
from powerd.leasebook import LeaseBook
from powerd.model import ClockPlan, Control, LeaseState, PlanState
from powerd.node import Node

_ANSWER_S = 5.0


@dataclass(slots=True)
class _Known:
    """One plan as powerd-hw told of it last."""

    view: PlanView
    answer: asyncio.Future[None] | None = None  # not taken by powerd-hw yet
    beats: Counter[str] = field(default_factory=Counter)
    plan: ClockPlan | None = None  # as it was asked for; powerd-hw does not tell it back


def view_of(row: dict[str, Any]) -> PlanView:
    """A row of the PLANS table. FrameError when it is none."""
    try:
        return PlanView(
            id=row["id"], lease=row["lease"], uuid=row["uuid"], state=PlanState(row["state"]), instructions=row["instructions"],
            step=row["step"], index=row["index"], ceiling_mhz=row["ceiling_mhz"], switches=row["switches"], why=row["why"],
            number=row["number"],
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise FrameError(f"plan: {error!r}") from error


def worth_telling(before: PlanView, after: PlanView) -> bool:
    """Whether a holder has to hear of the change."""
    fell = after.state in (PlanState.SAFE, PlanState.ENDED) and (before.state, before.why) != (after.state, after.why)
    return fell or before.ceiling_mhz != after.ceiling_mhz


class PlanBook:
    """All clock plans of this node."""

    def __init__(self, clock: Clock, book: LeaseBook, node: Node) -> None:
        self.hw: Hw | None = None
        self.on_plan: Callable[[PlanView], None] = lambda view: None  # its holder has to hear of it
        self.beats: Counter[str] = Counter()  # by what they were, of all plans since this powerd started
        self.switches = 0
        self._clock, self._book, self._node = clock, book, node
        self._plans: dict[int, _Known] = {}
        self._given_up: set[int] = set()  # powerd-hw may still tell of them

    # what is known

    def of(self, lease_id: str) -> tuple[PlanView, ...]:
        """The armed plans of a lease."""
        return tuple(k.view for k in self._plans.values() if k.view.lease == lease_id and k.answer is None)

    def shown(self, lease_id: str) -> tuple[PlanView, ...]:
        """The same with their clocks, where this powerd armed them."""
        return tuple(replace(view, plan=self._plans[view.number].plan) for view in self.of(lease_id))

    def __len__(self) -> int:
        return len(self._plans)

    # what holders ask for

    def check(self, lease: Lease, plan: ClockPlan) -> ClockPlan:
        """The plan as it can be armed for a lease. RequestError or DeviceError when it cannot."""
        if lease.detached or lease.state is LeaseState.DETACHED:
            raise RequestError(f"lease {lease.id} has no connection: no beat could come", hint="attach it first", code="conflict")
        if plan.uuid not in lease.gpus:
            hint = nearest(plan.uuid, list(lease.gpus))
            raise RequestError(f"GPU {plan.uuid[:80]!r} is not of lease {lease.id}", hint=hint, code="unknown_gpu")
        if plan.uuid in lease.lost or plan.uuid not in self._node.capabilities:
            raise DeviceError(f"{plan.uuid} cannot be reached now", hint="powerctl status shows its health", code="gpu_lost")
        if not any(want.control is Control.SM_CLOCK for want in lease.wants):
            hint = "want a ceiling: the plan's highest clock"
            raise RequestError(f"lease {lease.id} wants nothing of the SM clock", hint=hint, code="conflict")
        for other in (known.view for known in self._plans.values() if known.view.uuid == plan.uuid):
            if other.lease != lease.id and other.lease in self._book.live_leases:
                what = f"{plan.uuid} follows the clock plan {other.id} of lease {other.lease}"
                raise RequestError(what, hint="one lease at a time: wait for its end", code="conflict")
        return checked(plan, self._node.capabilities[plan.uuid])

    async def arm(self, lease: Lease, plan: ClockPlan) -> tuple[PlanView, socket.socket]:
        """Have powerd-hw follow a plan: (its view, the holder's end of the beat socket). Errors: nothing is armed."""
        plan = self.check(lease, plan)
        number = secrets.randbelow((1 << 32) - 2) + 1
        while number in self._plans:
            number = secrets.randbelow((1 << 32) - 2) + 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        waiting = asyncio.get_running_loop().create_future()
        view = PlanView(plan.id, lease.id, plan.uuid, PlanState.ARMED, len(plan.clocks_mhz), None, None, None, 0, number=number)
        self._plans[number] = _Known(view, waiting, plan=plan)
        try:
            if self.hw is None or not self.hw.plan(Order(number, lease.id, plan).row(), theirs):
                theirs.close()
                raise UnavailableError("powerd-hw is not connected", hint=self._node.hw_problem or "systemctl status powerd-hw")
            killpoint("powerd.plan.sent")
            async with asyncio.timeout(_ANSWER_S):
                await waiting
            self._book.live(lease.id)  # it may have ended meanwhile
            return self._plans[number].view, ours
        except BaseException as error:
            ours.close()
            self.give_up(number)
            if isinstance(error, TimeoutError):
                raise UnavailableError("powerd-hw did not answer", hint="powerctl status", code="timeout") from error
            raise

    def disarm(self, lease: Lease, plan_id: str) -> int:
        """Give up every plan of this id, or the one with this number; how many. RequestError(not_found) when there is none."""
        own = [view for view in self.of(lease.id) if plan_id in (view.id, str(view.number))]
        numbers = [view.number for view in own if str(view.number) == plan_id] or [view.number for view in own]
        if not numbers:
            ids = [view.id for view in self.of(lease.id)]
            raise RequestError(
                f"no clock plan {plan_id[:40]!r} in lease {lease.id}", hint=nearest(plan_id, ids), code="not_found"
            )
        for number in numbers:
            self.give_up(number)
        return len(numbers)

    def give_up(self, number: int) -> None:
        """Forget a plan, and have powerd-hw forget it."""
        self._plans.pop(number, None)
        self._given_up.add(number)
        if self.hw is not None:
            self.hw.plan({"do": "disarm", "number": number})

    def lease_changed(self, lease: Lease) -> None:
        """A lease has ended or wants something else: a plan lives only below its own SM clock want."""
        if not lease.live or not any(want.control is Control.SM_CLOCK for want in lease.wants):
            for view in self.of(lease.id):
                self.give_up(view.number)
                self.on_plan(replace(view, state=PlanState.ENDED, why="its lease has ended"))

    # what powerd-hw says

    def take(self, content: Any) -> None:
        """The PLANS table: every plan that powerd-hw follows, and those that have just ended."""
        standing = {view.number: (view, row) for row in content["rows"] for view in (view_of(row),)}
        for row in content["ended"]:
            self._ended(view_of(row), row)
        for number, (view, row) in standing.items():
            known = self._plans.get(number)
            if known is None:
                if number not in self._given_up:
                    self._found(view, row)
                continue
            self._count(known, view, row)
            before, known.view = known.view, view
            if known.answer is not None:
                if not known.answer.done():
                    known.answer.set_result(None)
                known.answer = None
            elif worth_telling(before, view):
                self.on_plan(view)
        for number, known in list(self._plans.items()):
            if known.answer is None and number not in standing:
                self._ended(replace(known.view, state=PlanState.ENDED, why="powerd-hw was restarted"), {})

    def _found(self, view: PlanView, row: dict[str, Any]) -> None:
        """A plan that this powerd has not armed: of the one before it, if the lease lives."""
        if view.lease in self._book.live_leases:
            known = self._plans[view.number] = _Known(view)
            known.beats.update(row["beats"])
        else:
            self.give_up(view.number)

    def _count(self, known: _Known, view: PlanView, row: dict[str, Any]) -> None:
        for what, count in row["beats"].items():
            more = count - known.beats[what]
            self.beats[what] += more if more >= 0 else count  # a new worker counts from nothing
            known.beats[what] = count
        more = view.switches - known.view.switches
        self.switches += more if more >= 0 else view.switches

    def _ended(self, view: PlanView, row: dict[str, Any]) -> None:
        known = self._plans.pop(view.number, None)
        self._given_up.discard(view.number)
        if known is None:
            return
        if row:
            self._count(known, view, row)
        if known.answer is not None:
            if not known.answer.done():
                known.answer.set_exception(DeviceError(f"the plan cannot be armed: {view.why}", code="not_supported"))
        else:
            self.on_plan(view)

    def hw_gone(self) -> None:
        """The connection to powerd-hw has closed: what it has not taken will not come; the rest it tells of when it is back."""
        self._given_up.clear()
        for known in list(self._plans.values()):
            if known.answer is not None and not known.answer.done():
                with contextlib.suppress(asyncio.InvalidStateError):
                    known.answer.set_exception(UnavailableError("powerd-hw has gone", hint="try again", code="busy"))
