"""What a run did: one row a request, joules, GPU seconds and the power over time.

House rules: modelled, all of it; what did not happen is NaN in an array of seconds, never 0; joules are of GPUs that an instance
has, those of GPUs that are off stand apart, by their seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerd.sim.cluster.inputs import Floats


@dataclass(frozen=True, slots=True)
class Results:
    """One run until ``end_s``. A request that is neither finished nor rejected is unfinished: it has no ``finish_s``."""

    begin_s: float
    end_s: float
    ttft_s: Floats  # NaN: no token came
    tbt_p99_s: Floats  # of the request's own gaps, nearest rank; NaN: unfinished, rejected, or one token has no gaps
    finish_s: Floats  # of a rejected one: when it was rejected; NaN: unfinished
    energy_j: Floats  # its share of the iterations that it was in
    rejected: npt.NDArray[np.bool_]
    instance: npt.NDArray[np.int32]  # index in ``instances`` of the last one that it was sent to; -1: none
    instances: tuple[str, ...]
    total_j: float  # of all GPUs that instances had: requests, idle, start-up
    idle_j: float  # of them with nothing to compute
    gpu_s: float  # GPUs that instances had, times seconds
    off_gpu_s: float  # the others, up to ``Cluster``'s number of GPUs
    off_w: float  # what one of the others would draw by the model
    tick_s: float
    power_w: Floats  # mean of each tick from ``begin_s`` on (the last may be shorter), without GPUs that are off
    gpus_on: Floats  # mean of each tick
    counts: Mapping[str, int]  # arrived, finished, rejected_*, unfinished, starts, reshards, stops, clock_sets, parks, ...

    @property
    def finished(self) -> npt.NDArray[np.bool_]:
        """Which requests were answered to the end."""
        return ~np.isnan(self.finish_s) & ~self.rejected

    @property
    def gpu_hours(self) -> float:
        """GPU hours that instances had, from the begin of their start to their end."""
        return self.gpu_s / 3600.0

    @property
    def off_j(self) -> float:
        """Joules of the GPUs that were off, at ``off_w`` each; not part of ``total_j``."""
        return self.off_gpu_s * self.off_w
