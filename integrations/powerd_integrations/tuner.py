"""Blocks of training steps for the search: when one ends, what it took on all ranks, which clock comes next.

House rules: no thread, no request and no clock of its own; all ranks count the same steps and hear the same figures, so all take
the same decision at the same step; whoever cannot measure makes everybody stay at the top clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from powerd_integrations.search import Search, SearchState, Trial

#: (block number, seconds per step, joules per step of this rank); NaN: could not be measured
Measure = tuple[int, float, float]

_NS = 1_000_000_000
_NOTHING: Measure = (-1, math.nan, math.nan)
_CALM = 8  # a settled search looks at blocks this many times as long

#: What every rank says, in the order of ranks; called by all ranks at the same step.
Exchange = Callable[[list[float]], Sequence[Sequence[float]]]


def alone(mine: list[float]) -> Sequence[Sequence[float]]:
    """The exchange of a job of one process."""
    return [mine]


@dataclass
class Block:
    """Consecutive steps at one clock: the moment each began, and when the last was over, in the node's nanoseconds."""

    number: int
    clock_mhz: int
    begins_ns: list[int] = field(default_factory=list)
    steps_told: list[int] = field(default_factory=list)  # what training calls them
    end_ns: int = 0
    whole: bool = True  # False: an exception or another clock came in between

    @property
    def steps(self) -> int:
        """How many steps it has."""
        return len(self.begins_ns)


class Tuner:
    """Counts steps into blocks and asks the search what to do; ``begin_step`` is called by every rank at every step."""

    def __init__(
        self, search: Search, *, block_s: float = 3.0, least_steps: int = 3, warmup_steps: int = 5, exchange: Exchange = alone
    ) -> None:
        self.search = search
        self._block_s, self._least_steps, self._warmup = block_s, least_steps, warmup_steps
        self._exchange = exchange
        self._begins: list[int] = []
        self._steps_per_block = 0  # 0: still warming up
        self._block: Block | None = None
        self._mine: deque[Measure] = deque()  # measured here, not yet told; another thread appends
        self._heard: dict[int, dict[int, Measure]] = {}

    @property
    def clock_mhz(self) -> int:
        """The clock that shall be set now."""
        return self._block.clock_mhz if self._block else self.search.top

    def measured(self, number: int, time_s: float | None, energy_j: float | None) -> None:
        """What a finished block took on this rank, per step; may come at any time before or after the next block's end."""
        self._mine.append((number, time_s or math.nan, energy_j or math.nan))

    def spoil(self) -> None:
        """The present block is no measurement any more."""
        if self._block:
            self._block.whole = False
        self._begins.clear()

    def begin_step(self, now_ns: int, step: int = 0) -> Block | None:
        """A step begins; answers the block that has just ended, if one has. ``clock_mhz`` may have changed then."""
        if not self._steps_per_block:
            self._warm_up(now_ns, step)
            return None
        block = self._block
        if block is None or block.steps < self._length():
            if block:
                block.begins_ns.append(now_ns)
                block.steps_told.append(step)
            return None
        block.end_ns = now_ns
        self._hear()
        self._open(now_ns, step)
        return block

    def cut(self, now_ns: int) -> Block | None:
        """What there is of a block when training ends; no part of the search."""
        block, self._block = self._block, None
        if block is not None:
            block.end_ns = now_ns
            self._steps_per_block = 0
            self._begins.clear()
            self.search.report(block.number, None, None)
        return block

    def _length(self) -> int:
        return self._steps_per_block * (1 if self.search.state is SearchState.SEARCHING else _CALM)

    def _warm_up(self, now_ns: int, step: int) -> None:
        self._begins.append(now_ns)
        if len(self._begins) <= self._warmup:
            return
        times = [(b - a) / _NS for a, b in zip(self._begins, self._begins[1:], strict=False)]
        usual_s = max(row[0] for row in self._exchange([median(times[-self._warmup :])]))
        self._steps_per_block = max(self._least_steps, math.ceil(self._block_s / max(usual_s, 1e-6)))
        self._open(now_ns, step)

    def _open(self, now_ns: int, step: int) -> None:
        trial: Trial = self.search.propose()
        self._block = Block(trial.number, trial.clock_mhz, [now_ns], [step])

    def _hear(self) -> None:
        """Tell one measured block, hear one of every rank, and report those that all ranks have told."""
        said = self._exchange(list(map(float, self._mine.popleft() if self._mine else _NOTHING)))
        for rank, (number, time_s, energy_j) in enumerate(said):
            if number >= 0:
                self._heard.setdefault(int(number), {})[rank] = (int(number), time_s, energy_j)
        for number in sorted(self._heard):
            rows = list(self._heard[number].values())
            if len(rows) < len(said):
                continue
            del self._heard[number]
            known = all(math.isfinite(t) and math.isfinite(e) for _, t, e in rows)
            slowest_s = max(t for _, t, _ in rows) if known else None
            self.search.report(number, slowest_s, sum(e for _, _, e in rows) if known else None)
