"""A watt budget for a fleet: the highest clock at which its instances together stay within it.

House rules: pure; modelled watts are corrected by what was measured, upwards at once and downwards slowly; a budget below
what the lowest clocks draw is said to be one, and the lowest clocks are what it gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from powerd_policies.dynamollm.capacity import steady_w
from powerd_policies.dynamollm.engine_model import Coefficients, EngineModel

AIM = 0.95  # of the budget: load moves within the seconds between two looks
MOST_RUNNING = 256  # requests in decode on one instance
UNLEARN = 0.05  # of a correction that proves too high is forgotten at every look


@dataclass(frozen=True, slots=True)
class Draw:
    """``count`` instances alike: their clock, and what each computes (tokens per second)."""

    tp: int
    count: int
    clock_mhz: int
    prompt_tokens_per_s: float
    output_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The clock that no instance may exceed (None: no need for one) and the watts then; ``kept``: whether that is enough."""

    clock_mhz: int | None
    power_w: float
    kept: bool


class WattBudget:
    """Keeps a fleet within ``budget_w``: what load makes likely within it, or (``strict``) whatever its instances may compute."""

    def __init__(self, model: EngineModel, budget_w: float, strict: bool = False) -> None:
        self.model, self.budget_w, self.strict = model, budget_w, strict
        self._aim_w = budget_w if strict else AIM * budget_w
        self.correction = 1.0

    def learn(self, measured_w: float | None, modelled_w: float) -> None:
        """Compare what was drawn with what the model said it would be."""
        if measured_w is None or measured_w <= 0 or modelled_w <= 0:
            return
        # Peaks are not seen all the time: that less is drawn does not say that they are lower.
        seen = min(2.0, max(1.0 if self.strict else 0.5, measured_w / modelled_w))
        self.correction = seen if seen > self.correction else self.correction + UNLEARN * (seen - self.correction)

    def power_w(self, draws: Sequence[Draw], ceiling_mhz: int | None = None) -> float:
        """Return the modelled watts of the fleet with no clock above ``ceiling_mhz``, without correction."""
        return sum(draw.count * draw.tp * self._gpu_w(draw, ceiling_mhz) for draw in draws)

    def ceiling(self, draws: Sequence[Draw], more_w: float = 0.0) -> Ceiling:
        """Return the highest ceiling that keeps the budget; ``more_w`` is drawn whatever the ceiling."""
        power_w = self.correction * (more_w + self.power_w(draws))
        if power_w <= self._aim_w:
            return Ceiling(None, power_w, True)
        for clock in sorted({clock for _, clock in self.model.table}, reverse=True):
            power_w = self.correction * (more_w + self.power_w(draws, clock))
            if power_w <= self._aim_w:
                return Ceiling(clock, power_w, True)
        return Ceiling(min(clock for _, clock in self.model.table), power_w, power_w <= self.budget_w)

    def _gpu_w(self, draw: Draw, ceiling_mhz: int | None) -> float:
        clocks = self.model.clocks_mhz(draw.tp)
        above = [each for each in clocks if each >= draw.clock_mhz > 0]  # a live GPU may have any clock; 0: not known
        clock = above[-1] if above else clocks[0]
        if ceiling_mhz is not None and clock > ceiling_mhz:
            clock = next((each for each in clocks if each <= ceiling_mhz), clocks[-1])
        at = self.model.table[draw.tp, clock]
        return peak_w(at) if self.strict else steady_w(at, draw.prompt_tokens_per_s, draw.output_tokens_per_s)


def peak_w(at: Coefficients) -> float:
    """Return the most watts that one GPU draws at a clock, whatever its instance computes."""
    return max(at.prefill_w, at.decoding_w(MOST_RUNNING), at.idle_w)
