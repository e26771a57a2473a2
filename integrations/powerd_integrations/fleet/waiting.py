"""Requests that wait for their first token, by replica, so that an emergency can call them back (DynamoLLM section 4.4).

House rules: only a request whose client has seen nothing is called back; one is sent elsewhere at most once, or it would go
round in circles; what is called back is counted.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

from powerd_integrations.fleet.tally import Passed
from powerd_policies.dynamollm.fleet import FleetPlan

Call = Literal["resteer", "shed"]


@dataclass(slots=True)
class Leash:
    """One waiting request; ``call`` says why it was called back."""

    passed: Passed
    timeout: asyncio.Timeout
    call: Call | None = None

    def pull(self, call: Call) -> None:
        """Call it back now."""
        if self.call is None:
            self.call = call
            self.timeout.reschedule(asyncio.get_running_loop().time())


@dataclass(slots=True)
class Waiting:
    """All waiting requests of a front."""

    _at: dict[str, dict[int, Leash]] = field(default_factory=lambda: defaultdict(dict))

    def hold(self, replica: str, passed: Passed, timeout: asyncio.Timeout) -> Leash:
        """From now on it waits there."""
        leash = self._at[replica][id(passed)] = Leash(passed, timeout)
        return leash

    def let_go(self, replica: str, passed: Passed) -> None:
        """It got its first token, or left; harmless when it had."""
        self._at[replica].pop(id(passed), None)

    def rescue(self, plan: FleetPlan, now_s: float) -> tuple[int, int]:
        """Do what a plan wants of waiting requests; how many were sent elsewhere and how many rejected."""
        moved = rejected = 0
        for replica, older_than_s in plan.shed.items():
            for leash in list(self._at[replica].values()):
                if leash.call is None and now_s - leash.passed.received_s > older_than_s:
                    leash.pull("shed")
                    rejected += 1
        for replica in plan.resteered:
            for leash in list(self._at[replica].values()):
                if leash.call is None and not leash.passed.moved:
                    leash.passed.moved = True
                    leash.pull("resteer")
                    moved += 1
        return moved, rejected
