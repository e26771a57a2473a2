"""An EngineModel at any clock: what the table holds, linear in between, and an assumption below it.

House rules: between two clocks of the table every coefficient is linear in the clock; above the table its highest row stands;
below it times grow as 1/clock (assumed: the most pessimistic) and power stays that of the lowest row.
"""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

from powerd_policies.dynamollm.engine_model import Coefficients, EngineModel

TIMES = ("prefill_fixed_s", "prefill_token_s", "decode_fixed_s", "decode_request_s")


class Speed:
    """One tensor parallelism of a model; ValueError when the model does not hold it."""

    def __init__(self, model: EngineModel, tp: int) -> None:
        if tp not in model.tps:
            raise ValueError(f"model {model.name} has no table for TP {tp}: it holds {', '.join(map(str, model.tps))}")
        self.model, self.tp = model, tp
        self._clocks = tuple(reversed(model.clocks_mhz(tp)))
        self._known: dict[float, Coefficients] = {}

    def at(self, clock_mhz: float) -> Coefficients:
        """The coefficients at a clock."""
        found = self._known.get(clock_mhz)
        if found is None:
            if len(self._known) > 4096:  # a capped GPU's clock is not on a grid
                self._known.clear()
            found = self._known[clock_mhz] = self._compute(clock_mhz)
        return found

    def _compute(self, clock_mhz: float) -> Coefficients:
        table, tp = self.model.table, self.tp
        low, high = self._clocks[0], self._clocks[-1]
        if clock_mhz >= high:
            return table[tp, high]
        if clock_mhz < low:
            row = table[tp, low]
            return replace(row, **{name: getattr(row, name) * low / max(1.0, clock_mhz) for name in TIMES})
        for a, b in itertools.pairwise(self._clocks):
            if clock_mhz <= b:
                share = (clock_mhz - a) / (b - a)
                one, two = table[tp, a], table[tp, b]
                names = [field.name for field in fields(Coefficients)]
                return Coefficients(**{n: (1 - share) * getattr(one, n) + share * getattr(two, n) for n in names})
        return table[tp, high]
