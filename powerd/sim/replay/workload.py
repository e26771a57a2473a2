"""A trace under a scenario -> the requests that every policy is given, and what controllers may know before.

House rules: one workload serves all policies of a comparison; a request beyond the context limit is counted and rejected before
any policy sees it, and is a miss for all; histories come from another seed's weeks before the trace, never from the trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from powerd.errors import RequestError
from powerd.sim.cluster import Requests
from powerd.sim.replay.guesses import guess
from powerd.sim.replay.scenario import Scenario
from powerd.sim.replay.trace import Trace
from powerd_policies.dynamollm.classes import NAMES, Classes
from powerd_policies.dynamollm.fleet import ClassLoad

BEYOND: Final = 255
Observed = tuple[float, float, dict[str, ClassLoad]]


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Requests as the cluster takes them, and what was refused before it."""

    trace: Trace
    requests: Requests
    oversize: int  # prompts beyond the context limit
    seed: int

    @property
    def length_s(self) -> float:
        """Seconds in which requests arrive."""
        return self.trace.length_s


def class_of(classes: Classes, prompt_tokens: NDArray[np.int32], output_tokens: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Return each request's class as its place in ``NAMES``; ``BEYOND`` beyond the context limit."""
    prompt = np.searchsorted(classes.prompt_bounds, prompt_tokens, side="right")
    output = np.searchsorted(classes.output_bounds, output_tokens, side="right")
    return np.where(prompt < 3, 3 * prompt + output, BEYOND).astype(np.uint8)


def workload(trace: Trace, scenario: Scenario, past: Trace) -> Workload:
    """Return a trace's requests with their true and predicted classes; RequestError when all prompts are too long."""
    classes = scenario.request_classes()
    true = class_of(classes, trace.prompt_tokens, trace.output_tokens)
    fits = true != BEYOND
    if not fits.any():
        raise RequestError(
            f"{trace.name}: no prompt is within the context limit of {classes.context_limit} tokens", code="bad_value"
        )
    prompt, output, true = trace.prompt_tokens[fits], trace.output_tokens[fits], true[fits]
    arrival_s = trace.arrival_s[fits]
    requests = Requests(arrival_s, prompt, output, true, *guess(scenario, past, arrival_s, prompt, output))
    return Workload(trace, requests, int((~fits).sum()), scenario.run.seed)


def observations(trace: Trace, classes: Classes, window_s: float = 300.0) -> Iterator[Observed]:
    """What a controller would have observed of a past trace: (now_s, window_s, load by class) every ``window_s``."""
    at = class_of(classes, trace.prompt_tokens, trace.output_tokens)
    slots = int(np.ceil(trace.length_s / window_s))
    fits = at != BEYOND
    cell = (trace.arrival_s[fits] // window_s).astype(int) * len(NAMES) + at[fits]
    weights = (None, trace.prompt_tokens[fits], trace.output_tokens[fits])
    counts, prompts, outputs = (np.bincount(cell, w, slots * len(NAMES)).reshape(slots, -1) for w in weights)
    for slot in range(slots):
        rows = {
            name: ClassLoad(int(counts[slot, n]), int(prompts[slot, n]), int(outputs[slot, n]))
            for n, name in enumerate(NAMES)
            if counts[slot, n]
        }
        yield (slot + 1) * window_s, window_s, rows
