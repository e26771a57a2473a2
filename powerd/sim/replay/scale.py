"""More or less of a trace: jittered copies above its own load, thinning below it, any factor between.

House rules: lengths stay those of real requests, copied whole; a seed and a factor decide everything; what a factor keeps a
larger factor keeps as well, so that a search over factors compares like with like.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from powerd.errors import RequestError
from powerd.sim.replay.trace import Trace

JITTER_S: Final = 15.0


def scaled(trace: Trace, factor: float, seed: int = 0, jitter_s: float = JITTER_S) -> Trace:
    """Return ``factor`` times the requests in the same time: copies are moved by up to +-``jitter_s``, the last one is thinned.

    RequestError for a factor that is not above 0 or makes more than 100 copies.
    """
    if not 0 < factor <= 100:
        raise RequestError(f"load {factor:g} is not above 0 and at most 100", code="bad_value")
    times, rows = [], []
    for copy in range(int(np.ceil(factor))):
        dice = np.random.default_rng([seed, copy, 0x5CA1E])
        kept = np.flatnonzero(dice.random(len(trace)) < factor - copy)
        shift = dice.uniform(-jitter_s, jitter_s, len(trace))[kept] if copy else 0.0
        times.append(_reflected(trace.arrival_s[kept] + shift, trace.length_s))
        rows.append(kept)
    arrival_s, row = np.concatenate(times), np.concatenate(rows)
    order = np.argsort(arrival_s, kind="stable")
    row = row[order]
    return replace(
        trace, arrival_s=arrival_s[order], prompt_tokens=trace.prompt_tokens[row], output_tokens=trace.output_tokens[row]
    )


def _reflected(arrival_s: NDArray[np.float64], length_s: float) -> NDArray[np.float64]:
    """Arrivals that a shift moved out of the trace come back in from its ends: clipped, they would make a burst there."""
    inside = np.abs(arrival_s)
    late = inside > length_s
    inside[late] = np.maximum(0.0, 2 * length_s - inside[late])
    return inside
