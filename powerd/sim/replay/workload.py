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
from powerd.sim.replay.scenario import Scenario
from powerd.sim.replay.trace import Trace
from powerd_policies.dynamollm.classes import NAMES, Classes
from powerd_policies.dynamollm.fleet import ClassLoad
from powerd_policies.dynamollm.lengths import TYPICAL_TOKENS, Hints, LengthPredictor, LengthTable, NoisyOracle, Oracle

BEYOND: Final = 255
Tokens = NDArray[np.int32]
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
    classes, seed = scenario.request_classes(), scenario.run.seed
    true = class_of(classes, trace.prompt_tokens, trace.output_tokens)
    fits = true != BEYOND
    if not fits.any():
        raise RequestError(
            f"{trace.name}: no prompt is within the context limit of {classes.context_limit} tokens", code="bad_value"
        )
    prompt, output, true = trace.prompt_tokens[fits], trace.output_tokens[fits], true[fits]
    predictor = _predictor(scenario, past, seed)
    routed, tokens = _routed(classes, predictor, prompt, output), output
    if scenario.forecast.output_length != "oracle":
        tokens = expected_outputs(classes, predictor, past)[routed]
    return Workload(trace, Requests(trace.arrival_s[fits], prompt, output, true, routed, tokens), int((~fits).sum()), seed)


def _predictor(scenario: Scenario, past: Trace, seed: int) -> LengthPredictor:
    classes, forecast = scenario.request_classes(), scenario.forecast
    if forecast.output_length == "oracle":
        return Oracle(classes)
    if forecast.output_length == "noisy":
        return NoisyOracle(forecast.output_accuracy, seed, classes)
    return LengthTable.train(past.prompt_tokens, past.output_tokens, classes)


def _routed(classes: Classes, predictor: LengthPredictor, prompt: Tokens, output: Tokens) -> NDArray[np.uint8]:
    """Return the class that each request is routed by: its prompt is known, the size of its answer is predicted."""
    sizes = predictor.predict(prompt, Hints(output_tokens=output, ids=np.arange(len(prompt))))
    return np.asarray(3 * np.searchsorted(classes.prompt_bounds[:2], prompt, side="right") + sizes, dtype=np.uint8)


def expected_outputs(classes: Classes, predictor: LengthPredictor, past: Trace) -> Tokens:
    """Return for each predicted class the mean answer that requests of a past trace had which were predicted so."""
    at, outputs = _routed(classes, predictor, past.prompt_tokens, past.output_tokens), past.output_tokens.astype(float)
    found = np.array([TYPICAL_TOKENS[n % 3] for n in range(len(NAMES))], dtype=np.float64)
    for n in range(len(NAMES)):
        same_size = at % 3 == n % 3
        here = (at == n) if (at == n).any() else same_size
        if here.any():
            found[n] = outputs[here].mean()
    return np.asarray(np.maximum(found.round(), 1), dtype=np.int32)


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
