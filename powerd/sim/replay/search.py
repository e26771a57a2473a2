"""Searches with the simulator: the largest load that a fleet keeps, and the cheapest fixed fleet that keeps a load.

House rules: what is searched on a part of a trace is verified on the whole of it; a search that finds nothing says what came
closest; whether a fleet keeps a load is decided by the same rule as in reports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from powerd.sim.replay.trace import Trace

KEPT: Final = 0.99
CLASS_KEPT: Final = 0.95


def largest_load(keeps: Callable[[float], bool], start: float = 1.0, tolerance: float = 0.01) -> float:
    """Return the largest factor that ``keeps`` accepts, to a relative ``tolerance``: doubling or halving, then bisection.

    ValueError when not even a 64th of ``start`` is kept.
    """
    low, high = (start, 2 * start) if keeps(start) else (start / 2, start)
    if high > start:
        while keeps(high):
            low, high = high, 2 * high
    else:
        while not keeps(low):
            low, high = low / 2, low
            if low < start / 64:
                raise ValueError(f"not even {low:g} times the load is kept")
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def busiest(trace: Trace, share: float = 0.9, window_s: float = 3600.0) -> list[Trace]:
    """Return the windows with at least ``share`` of the busiest one's prompt tokens: where a fixed fleet fails first."""
    if trace.length_s <= 1.5 * window_s:
        return [trace]
    count = int(trace.length_s // window_s)
    tokens = np.bincount((trace.arrival_s // window_s).astype(int), trace.prompt_tokens, count + 1)[:count]
    return [trace.between(n * window_s, (n + 1) * window_s) for n in np.flatnonzero(tokens >= share * tokens.max())]
