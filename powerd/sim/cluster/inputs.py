"""What a run is given: requests and how the engines, their starts and their clocks behave.

House rules: checked whole before anything runs, and the message says which request and what is wrong with it; every default
that is an assumption says so; times are seconds of one clock that begins at ``ClusterConfig.begin_s``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from powerd_policies.dynamollm.classes import NAMES, Classes
from powerd_policies.dynamollm.phases import Links

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Requests:
    """A trace: one element a request, sorted by arrival.

    ``true_class`` and ``routed_class`` are indices in ``classes.NAMES``, the latter by the predicted answer. A prompt beyond the
    context limit may have any of them: it is rejected when it arrives. Without ``predicted_tokens`` what controllers are told of
    the arrivals' answers is the true length.
    """

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    true_class: Bytes
    routed_class: Bytes
    predicted_tokens: Ints | None = None

    def __post_init__(self) -> None:
        fields: list[tuple[str, Any]] = [
            ("arrival_s", np.float64), ("prompt_tokens", np.int32), ("output_tokens", np.int32),
            ("true_class", np.uint8), ("routed_class", np.uint8), ("predicted_tokens", np.int32),
        ]  # fmt: skip
        for name, kind in fields:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.ascontiguousarray(value, dtype=kind))
        self._check()

    def _check(self) -> None:
        count = len(self.arrival_s)
        for name in ("prompt_tokens", "output_tokens", "true_class", "routed_class", "predicted_tokens"):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise ValueError(f"requests: {count} arrivals but {len(value)} of {name}")
        if not np.isfinite(self.arrival_s).all():
            raise ValueError(f"requests: arrival {_first(~np.isfinite(self.arrival_s))} is not a number")
        if count > 1 and (unsorted := np.diff(self.arrival_s) < 0).any():
            at = _first(unsorted) + 1
            later, earlier = self.arrival_s[at - 1], self.arrival_s[at]
            raise ValueError(f"requests: not sorted by arrival: number {at} at {earlier:g} s comes after {later:g} s")
        for name in ("prompt_tokens", "output_tokens", "predicted_tokens"):
            value = getattr(self, name)
            if value is not None and (low := value < 1).any():
                raise ValueError(
                    f"requests: number {_first(low)} has {value[_first(low)]} {name.replace('_', ' ')}, at least 1 is needed"
                )
        if (self.routed_class >= len(NAMES)).any():
            at = _first(self.routed_class >= len(NAMES))
            raise ValueError(f"requests: number {at} is routed by class {self.routed_class[at]}, there are {len(NAMES)}")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @classmethod
    def of(
        cls,
        arrival_s: Sequence[float] | npt.NDArray[np.floating[Any]],
        prompt_tokens: Sequence[int] | npt.NDArray[np.integer[Any]],
        output_tokens: Sequence[int] | npt.NDArray[np.integer[Any]],
        classes: Classes | None = None,
        predicted_tokens: Sequence[int] | npt.NDArray[np.integer[Any]] | None = None,
    ) -> Requests:
        """Classify requests by true and by predicted length; without a prediction the prediction is the truth."""
        classes = classes or Classes()
        arrivals = np.asarray(arrival_s, dtype=np.float64)
        prompts, outputs = np.asarray(prompt_tokens, dtype=np.int32), np.asarray(output_tokens, dtype=np.int32)
        predicted = outputs if predicted_tokens is None else np.asarray(predicted_tokens, dtype=np.int32)
        size = np.searchsorted(np.asarray(classes.prompt_bounds[:2]), prompts, side="right")
        true, routed = (
            (3 * size + np.searchsorted(np.asarray(classes.output_bounds), tokens, side="right")).astype(np.uint8)
            for tokens in (outputs, predicted)
        )
        return cls(arrivals, prompts, outputs, true, routed, predicted)


def _first(where: npt.NDArray[np.bool_]) -> int:
    return int(np.argmax(where))


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """How engines batch and what changes cost. Seconds, tokens, MHz."""

    chunk_tokens: int = 512  # of an iteration: decodes first, the rest to prompts
    max_running: int = 256  # requests admitted to one engine at once
    start_s: float = 33.0  # from a free GPU to the first request: engine set-up 18 s, weights to the GPU 15 s (DynamoLLM, 6.8)
    reshard_s: float = 2.0  # the same where the GPUs hold the weights already: assumed
    clock_set_s: float = 0.0045  # of no progress, once a change: measured for the driver call
    park_after_s: float | None = None  # of having nothing to do; None: never
    park_clock_mhz: int | None = None  # None: the lowest that the model has
    wake_s: float = 0.009  # from parked to working: two clock changes
    drain_limit_s: float | None = None  # then what still runs there is cut off and counted as rejected; None: never
    tick_s: float = 1.0  # of the power series
    recent_s: float = 30.0  # the window of the latencies that controllers see
    horizon_s: float = 120.0  # after the last arrival; what is not finished by then is a miss
    warm_begin: bool = True  # the first plan's instances serve at once
    begin_s: float = 0.0
    chunk_by_tp: Mapping[int, int] = field(default_factory=dict)  # ``chunk_tokens`` of engines of this TP, where it is another
    links: Links = field(default_factory=Links)  # from instances that prefill to instances that decode

    def __post_init__(self) -> None:
        for name in ("start_s", "reshard_s", "clock_set_s", "wake_s", "horizon_s", "park_after_s", "drain_limit_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"cluster: {name} is {value}, it cannot be negative or infinite")
        for name in ("tick_s", "recent_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 1e-3):
                raise ValueError(f"cluster: {name} is {value}, at least 0.001 is needed")
        if self.max_running < 1:
            raise ValueError(f"cluster: max_running is {self.max_running}, at least 1 is needed")
        for chunk_tokens in (self.chunk_tokens, *self.chunk_by_tp.values()):
            if chunk_tokens <= self.max_running:
                raise ValueError(
                    f"cluster: chunk_tokens ({chunk_tokens}) has to be more than max_running ({self.max_running}), "
                    "or prompts could wait for ever"
                )

    def chunk_of(self, tp: int) -> int:
        """Return the tokens of an iteration of an engine of this tensor parallelism."""
        return self.chunk_by_tp.get(tp, self.chunk_tokens)
