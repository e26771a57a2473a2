"""The class that each request is routed by, and the answer that is planned with: what a service would have guessed at the time.

House rules: a guess is made of what had been answered before, never of the request's own answer or of later ones (but by an
oracle, which is named so); what is learned is learned late, after a slot in which it surely was answered.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from powerd.sim.replay.scenario import Scenario
from powerd.sim.replay.trace import Trace
from powerd_policies.dynamollm.classes import NAMES, Classes
from powerd_policies.dynamollm.lengths import TYPICAL_TOKENS, Hints, LengthPredictor, LengthTable, NoisyOracle, Oracle

Tokens = NDArray[np.int32]
Indices = NDArray[np.uint8]
SLOT_S: Final = 300.0
_ENOUGH: Final = 200_000  # requests of the past to learn from
_PRIOR: Final = 20.0  # requests that it takes to believe a class's own mean answer


def guess(
    scenario: Scenario, past: Trace, arrival_s: NDArray[np.float64], prompt: Tokens, output: Tokens
) -> tuple[Indices, Tokens]:
    """Return for each request its predicted class (place in ``NAMES``) and its expected output tokens.

    A trained predictor knows ``past``, and of the requests themselves those that came at least one slot before the slot it is in.
    """
    classes, forecast = scenario.request_classes(), scenario.forecast
    if forecast.output_length == "oracle":
        return _classes_of(classes, Oracle(classes), prompt, output), output
    past = past.thinned(_ENOUGH)
    learns = forecast.output_length == "trained"
    predictor: LengthPredictor = (
        LengthTable.train(past.prompt_tokens, past.output_tokens, classes)
        if learns
        else NoisyOracle(forecast.output_accuracy, scenario.run.seed, classes)
    )
    means = _Means()
    means.add(_classes_of(classes, predictor, past.prompt_tokens, past.output_tokens), past.output_tokens)
    routed, tokens = np.zeros(len(prompt), dtype=np.uint8), np.zeros(len(prompt), dtype=np.int32)
    slots = int(arrival_s[-1] // SLOT_S) + 1 if len(prompt) else 0
    ends = np.searchsorted(arrival_s, SLOT_S * np.arange(slots + 1), side="left")
    for slot in range(slots):
        here = slice(ends[slot], ends[slot + 1])
        routed[here] = _classes_of(classes, predictor, prompt[here], output[here], int(ends[slot]))
        tokens[here] = means.expected()[routed[here]]
        before = slice(ends[max(slot - 1, 0)], ends[slot])
        if before.start < before.stop:  # it is learned now and used from the next slot on
            means.add(routed[before], output[before])
            if learns and isinstance(predictor, LengthTable):
                predictor.learn(prompt[before], output[before])
    return routed, tokens


def _classes_of(classes: Classes, predictor: LengthPredictor, prompt: Tokens, output: Tokens, first: int = 0) -> Indices:
    """The prompt is known, the size of the answer is predicted; ``first`` numbers the requests."""
    if isinstance(predictor, LengthTable):  # it looks at the prompt's length alone: each length is asked once
        sizes = predictor.predict(np.arange(int(prompt.max(initial=0)) + 1))[prompt]
    else:
        sizes = predictor.predict(prompt, Hints(output_tokens=output, ids=np.arange(first, first + len(prompt))))
    return np.asarray(3 * np.searchsorted(classes.prompt_bounds[:2], prompt, side="right") + sizes, dtype=np.uint8)


class _Means:
    """The mean answer of requests that were predicted to be of a class."""

    def __init__(self) -> None:
        typical = np.array([TYPICAL_TOKENS[n % 3] for n in range(len(NAMES))], dtype=np.float64)
        self._sums, self._counts = _PRIOR * typical, np.full(len(NAMES), _PRIOR)

    def add(self, routed: Indices, output: Tokens) -> None:
        """Count requests that were answered."""
        self._sums += np.bincount(routed, output, len(NAMES))
        self._counts += np.bincount(routed, minlength=len(NAMES))

    def expected(self) -> Tokens:
        """Return it for each class, at least one token."""
        return np.asarray(np.maximum((self._sums / self._counts).round(), 1), dtype=np.int32)
