"""What a front router counts: every request ends in exactly one way, and what arrived by class.

House rules: received = answered + failed + rejected + cancelled + in flight, always; a failure that a client saw is counted
as one, never hidden; latencies are of the loop's clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.fleet import ClassLoad

Outcome = Literal["answered", "failed", "rejected", "cancelled"]
OUTCOMES: Final[Mapping[str, str]] = {
    "answered": "the whole answer was passed on",
    "failed": "the engine ended in mid-answer or nobody could answer: the client saw an error",
    "rejected": "refused before anything was computed: bad request, too long, or nobody to serve it in time",
    "cancelled": "the client went away",
}


@dataclass(slots=True)
class Passed:
    """One request as the front saw it."""

    request_class: str | None
    prompt_tokens: int
    predicted_tokens: int
    received_s: float
    outcome: Outcome | None = None
    replica: str = ""
    attempts: int = 0
    moved: bool = False  # called back and sent elsewhere once, in an emergency
    first_s: float | None = None
    ended_s: float | None = None
    chunks: int = 0

    @property
    def output_size(self) -> int:
        """0, 1 or 2 for a short, medium or long answer, as predicted; of a request that has a class."""
        return NAMES.index(self.request_class or "") % 3


@dataclass(slots=True)
class Tally:
    """Counts of one front router."""

    received: int = 0
    retried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    by_class: Counter[str] = field(default_factory=Counter)
    at: Counter[str] = field(default_factory=Counter)  # in flight at a replica
    called_back: Counter[str] = field(default_factory=Counter)  # waiting requests that an emergency resteered or shed
    _rescued: Counter[tuple[str, str]] = field(default_factory=Counter)
    _arrived: dict[str, ClassLoad] = field(default_factory=dict)

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return self.received - sum(self.outcomes.values())

    @property
    def lost(self) -> int:
        """Requests that broke off, or that nobody could answer; refusals, also for want of room, are ``rejected``."""
        return self.outcomes["failed"]

    def arrived(self, request: Passed) -> None:
        """A request has come."""
        self.received += 1
        if (name := request.request_class) is None:
            return
        self.by_class[name] += 1
        had = self._arrived.get(name, ClassLoad())
        self._arrived[name] = ClassLoad(
            had.requests + 1, had.prompt_tokens + request.prompt_tokens, had.output_tokens + request.predicted_tokens
        )

    def ended(self, request: Passed, outcome: Outcome, now_s: float) -> None:
        """It has ended; only the first outcome counts."""
        if request.outcome is None:
            request.outcome, request.ended_s = outcome, now_s
            self.outcomes[outcome] += 1

    def called(self, replica: str, call: str) -> None:
        """A waiting request was called back from a replica."""
        self.called_back[call] += 1
        self._rescued[replica, call] += 1

    def take_rescued(self) -> dict[str, tuple[int, int]]:
        """By replica, how many waiting requests were sent elsewhere and how many rejected since the last call."""
        found, self._rescued = self._rescued, Counter()
        return {name: (found[name, "resteer"], found[name, "shed"]) for name in sorted({name for name, _ in found})}

    def take_arrivals(self) -> Mapping[str, ClassLoad]:
        """Arrivals by class since the last call: what a planner's window is fed with."""
        found, self._arrived = self._arrived, {}
        return found

    def page(self) -> str:
        """Prometheus text."""
        lines = [
            "# HELP powerd_front_requests_total Requests by how they ended.", "# TYPE powerd_front_requests_total counter",
            *(f'powerd_front_requests_total{{outcome="{name}"}} {self.outcomes[name]}' for name in OUTCOMES),
            "# HELP powerd_front_arrivals_total Requests that arrived, by class.", "# TYPE powerd_front_arrivals_total counter",
            *(f'powerd_front_arrivals_total{{class="{name}"}} {count}' for name, count in sorted(self.by_class.items())),
            "# HELP powerd_front_retries_total Requests sent to another replica.", "# TYPE powerd_front_retries_total counter",
            f"powerd_front_retries_total {self.retried}",
            "# HELP powerd_front_called_back_total Waiting requests that an emergency sent elsewhere or rejected.",
            "# TYPE powerd_front_called_back_total counter",
            *(f'powerd_front_called_back_total{{step="{step}"}} {self.called_back[step]}' for step in ("resteer", "shed")),
            "# HELP powerd_front_in_flight Requests in flight, by replica.", "# TYPE powerd_front_in_flight gauge",
            *(f'powerd_front_in_flight{{replica="{name}"}} {count}' for name, count in sorted(self.at.items()) if count),
        ]  # fmt: skip
        return "\n".join(lines) + "\n"
