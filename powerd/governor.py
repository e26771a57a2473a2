"""What clock one replica may have: from good and bad pages to a ceiling or to none. A state machine as a table, and a ladder.

House rules: pure; who is not sure gives the full clock: it is the answer to every page that is late, cut off or absurd; the way
up is one page, the way back down takes several good ones; a promise that was broken is remembered.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from powerd.engineload import Figures
from powerd.policytable import InstanceLoad, InstancePolicy
from powerd.replicatypes import SloSpec

STEP_SHARE = 0.05  # of the highest clock: so much more after each broken promise
RELAX_S = 60.0  # without one, after which a step is forgotten


class State(StrEnum):
    """Where a replica stands."""

    STARTING = "starting"  # no page could be believed yet
    FRESH = "fresh"  # its clock is decided
    IDLE = "idle"  # likewise; it has had nothing to do for a while
    STALE = "stale"  # full clock until good pages come again


class Sign(StrEnum):
    """What a look at its page has shown."""

    STEADY = "steady"  # so many good pages in a row that it can be controlled, and there is work
    EMPTY = "empty"  # likewise, and there has been nothing to do for a while
    GARBAGE = "garbage"  # a page that cannot be believed
    SILENT = "silent"  # no good page for too long


#: (state, sign) -> next state; what is not here changes nothing.
TRANSITIONS: Mapping[tuple[State, Sign], State] = {
    (State.STARTING, Sign.STEADY): State.FRESH,
    (State.STARTING, Sign.EMPTY): State.IDLE,
    (State.STALE, Sign.STEADY): State.FRESH,
    (State.STALE, Sign.EMPTY): State.IDLE,
    (State.FRESH, Sign.EMPTY): State.IDLE,
    (State.FRESH, Sign.GARBAGE): State.STALE,
    (State.FRESH, Sign.SILENT): State.STALE,
    (State.IDLE, Sign.STEADY): State.FRESH,
    (State.IDLE, Sign.GARBAGE): State.STALE,
    (State.IDLE, Sign.SILENT): State.STALE,
}


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What its GPUs shall be held to; None: nothing, the full clock."""

    clock_mhz: int | None
    reason: str


class Governor:
    """Decides for one replica; ``clocks_mhz`` are those of its GPUs, ascending."""

    def __init__(
        self, policy: InstancePolicy, slo: SloSpec, clocks_mhz: Sequence[int], *, now_s: float, stale_s: float,
        good_scrapes: int, park_after_s: float,
    ) -> None:  # fmt: skip
        self.state = State.STARTING
        self.ceiling = Ceiling(None, "no metrics yet")
        self._policy, self._slo, self._clocks = policy, slo, tuple(clocks_mhz)
        self._stale_s, self._needed, self._park_after_s = stale_s, good_scrapes, park_after_s
        self._good = 0
        self._good_s = now_s  # when the newest good page came
        self._busy_s = now_s  # when there was something to do
        self._steps = 0  # above the decided clock: what broken promises have taught
        self._broken = False
        self._kept_s = now_s  # since when promises are kept

    def good(self, now_s: float, figures: Figures) -> Ceiling:
        """A page that is believed."""
        self._good, self._good_s = self._good + 1, now_s
        page = figures.page
        if page.running or page.waiting:
            self._busy_s = now_s
        decision = self._policy.clock(now_s, _load(figures))
        if self._good < self._needed and self.state in (State.STARTING, State.STALE):
            return self._full(f"{self._good} of {self._needed} good pages in a row")
        idle = now_s - self._busy_s >= self._park_after_s
        self._go(Sign.EMPTY if idle else Sign.STEADY)
        self._learn(now_s, figures, busy=bool(page.running or page.waiting))
        if self._broken:
            return self._full(_complaint(figures, self._slo))
        if decision.clock_mhz >= self._policy.max_mhz:
            return self._full(decision.reason)
        more_mhz = round(self._steps * STEP_SHARE * self._policy.max_mhz)
        at = bisect_left(self._clocks, decision.clock_mhz + more_mhz)  # never below what was decided
        if at >= len(self._clocks) - 1:
            return self._full(decision.reason)
        more = f", and {more_mhz} MHz since the SLO was missed" if more_mhz else ""
        self.ceiling = Ceiling(self._clocks[at], decision.reason + more)
        return self.ceiling

    def garbage(self, why: str) -> Ceiling:
        """A page that cannot be believed."""
        self._good = 0
        self._go(Sign.GARBAGE)
        return self._full(why)

    def silent(self, now_s: float, why: str) -> Ceiling:
        """No answer: for a while the last decision holds."""
        age_s = now_s - self._good_s
        if self.state in (State.STARTING, State.STALE):
            self._good = 0
            return self._full(f"no metrics: {why}")
        if age_s < self._stale_s and self.state is not State.IDLE:  # while it is parked nobody waits to see what has come
            return self.ceiling
        self._good = 0
        self._go(Sign.SILENT)
        return self._full(f"metrics are {age_s:.0f} s old: {why}")

    def _go(self, sign: Sign) -> None:
        self.state = TRANSITIONS.get((self.state, sign), self.state)

    def _full(self, why: str) -> Ceiling:
        self.ceiling = Ceiling(None, why)
        return self.ceiling

    def _learn(self, now_s: float, figures: Figures, *, busy: bool) -> None:
        """A promise broken at a lowered clock lifts all later decisions; a long time without one takes a step back."""
        broken = busy and figures.within_slo is False
        if broken and not self._broken and self.ceiling.clock_mhz is not None:
            self._steps = min(self._steps + 1, round(1 / STEP_SHARE))
        elif not broken and self._steps and now_s - self._kept_s >= RELAX_S:
            self._steps -= 1
            self._kept_s = now_s
        if broken:
            self._kept_s = now_s
        self._broken = broken


def _load(figures: Figures) -> InstanceLoad:
    """What the controller is told.

    A histogram's p99 is the upper edge of a coarse bucket: whether the promise was kept can be read from it, and is (``_learn``),
    but not how near it was, so the controller must not take it for a measured gap.
    """
    page = figures.page
    return InstanceLoad(
        running=page.running, queued=page.waiting, queued_prompt_tokens=None, kv_used_ratio=page.kv_used_ratio,
        oldest_wait_s=None, requests_per_s=figures.requests_per_s, prompt_tokens_per_s=figures.prompt_tokens_per_s,
        output_tokens_per_s=figures.output_tokens_per_s, ttft_p99_s=None, tbt_p99_s=None,
        prompt_bands=None if figures.prompts is None else figures.prompts.bands(),
    )  # fmt: skip


def _complaint(figures: Figures, slo: SloSpec) -> str:
    said = []
    for name, latency, promised_s in (("TTFT", figures.ttft, slo.ttft_s), ("TBT", figures.tbt, slo.tbt_s)):
        if latency.kept is not False or latency.p99_s is None or latency.share is None or promised_s is None:
            continue
        if name == "TTFT" and slo.classes:
            said.append(f"{1 - latency.share:.1%} of first tokens are later than the lengths of prompts explain")
            continue
        how = "up to" if latency.exact else "beyond"
        said.append(f"p99 of {name} is {how} {latency.p99_s:g} s, the SLO {promised_s:g} s")
    return f"full clock: {' and '.join(said)}"
