"""The clock plans that are armed, as the supervisor keeps them: handed to the worker, and to the one that follows it.

House rules: what powerd says is checked before it is kept; a plan lives no longer than the setpoint below which it runs; a worker
that was started for a dead one gets every plan at its safe clock.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from powerd.clock import Clock
from powerd.hw import frames
from powerd.hw.frames import FrameError, Kind, Table, TableReader
from powerd.hw.plan import BEAT, MAX_INSTRUCTIONS, Order, no_row, order_of
from powerd.killpoint import killpoint
from powerd.model import PlanState

_RESTARTED = "powerd-hw's worker was restarted"
_MOST = 2 * frames.MAX_GPUS
_NO_SETPOINT = "nothing holds the SM clock of this GPU"

Send = Callable[[bytes, Sequence[int]], None]


class _Kept:
    """One plan with our copy of its socket."""

    def __init__(self, order: Order, descriptor: int) -> None:
        self.order, self.descriptor = order, descriptor
        self.row = no_row(order, PlanState.SAFE if order.why else PlanState.ARMED, order.why)


class ArmedPlans:
    """Every plan that is armed or about to be; ``report`` gets what powerd has to know."""

    def __init__(self, clock: Clock, send: Send, report: Callable[[dict[str, Any]], None]) -> None:
        self._clock, self._send, self._report = clock, send, report
        self._reader = TableReader()
        self._plans: dict[int, _Kept] = {}

    def _forward(self, content: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        chunks = frames.encode_table(Kind.PLAN, 0, self._clock.now_ns(), Table.PLAN, content)
        for chunk in chunks[:-1]:
            self._send(chunk, ())
        self._send(chunks[-1], descriptors)

    # powerd

    def take(self, frame: bytes, descriptors: list[int], holds_clock: Callable[[str], bool], ready: bool) -> None:
        """A PLAN frame of powerd; takes its descriptor out of the list with the last chunk. FrameError: refused."""
        whole = self._reader.feed(frame)
        if whole is None:
            return
        if whole[0] is not Table.PLAN:
            raise FrameError(f"table {whole[0].name} in a PLAN frame")
        what = order_of(whole[1])
        killpoint("hw.plan.received")
        if isinstance(what, int):
            self._disarm(what, ready)
            return
        if len(descriptors) != 1:
            raise FrameError(f"a plan comes with one beat socket, not with {len(descriptors)}")
        order = replace(what, why="")
        full = len(self._plans) >= _MOST or len(order.plan.clocks_mhz) > MAX_INSTRUCTIONS
        if order.number in self._plans or full or not holds_clock(order.plan.uuid):
            why = _NO_SETPOINT if not full else "too many plans"
            self._report({"rows": self.rows(), "ended": [no_row(order, PlanState.ENDED, why)]})
            return
        kept = self._plans[order.number] = _Kept(order, descriptors.pop())
        if ready:
            self._give(kept)
        else:
            self.tell()

    def _disarm(self, number: int, ready: bool) -> None:
        if ready:
            self._forward({"do": "disarm", "number": number})
        else:
            self._drop([number], "given up by its holder")

    def forget_peer(self) -> None:
        """powerd's connection has closed: half a table is worth nothing."""
        self._reader = TableReader()

    # the worker

    def serving(self, holds_clock: Callable[[str], bool]) -> None:
        """A worker has opened its GPUs and knows the setpoints: it gets every plan anew."""
        self.prune(holds_clock, ready=False)
        for kept in self._plans.values():
            self._give(kept)

    def _give(self, kept: _Kept) -> None:
        """A worker gets this plan, at its safe clock when it is not the first one."""
        self._forward(kept.order.row(), (kept.descriptor,))
        kept.order = replace(kept.order, why=_RESTARTED)

    def heard(self, content: Any) -> None:
        """The worker's PLANS table: how its plans stand, and which have ended."""
        for row in content["rows"]:
            if (kept := self._plans.get(row["number"])) is not None:
                kept.row = row
        for row in content["ended"]:
            if (gone := self._plans.pop(row["number"], None)) is not None:
                os.close(gone.descriptor)
        self._report({"rows": self.rows(), "ended": content["ended"]})

    def prune(self, holds_clock: Callable[[str], bool], ready: bool) -> None:
        """Without a worker, plans above which no setpoint is left end here; with one it ends them and says so."""
        if not ready:
            self._drop([n for n, kept in self._plans.items() if not holds_clock(kept.order.plan.uuid)], _NO_SETPOINT)

    def _drop(self, numbers: Sequence[int], why: str) -> None:
        ended = []
        for number in numbers:
            if (kept := self._plans.pop(number, None)) is None:
                continue
            with socket.socket(fileno=kept.descriptor) as link, contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
                while link.recv(BEAT.size, socket.MSG_DONTWAIT):  # stepped time must not wait for what nobody reads
                    self._clock.flight(-1)
            ended.append({**kept.row, "state": PlanState.ENDED.value, "why": why})
        if ended:
            self._report({"rows": self.rows(), "ended": ended})

    # what is told

    def rows(self) -> list[dict[str, Any]]:
        """Every plan as it is known to stand."""
        return [kept.row for kept in self._plans.values()]

    def tell(self) -> None:
        """Tell powerd everything that is armed."""
        self._report({"rows": self.rows(), "ended": []})
