"""The GPUs that an engine computes on: their true clock comes in, the power of what it computes goes out.

House rules: a tensor-parallel group is as fast as its slowest GPU; power is declared per iteration at the clock of that
moment, the driver makes sensors, energy counter, heat and caps of it; an engine that does nothing draws what the driver says
an idle context draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from powerd.sim.node import SimNode, attach
from powerd.sim.workload import GIB, Context

WEIGHTS_AND_CACHE = 0.9  # of the GPU's memory, as vLLM's --gpu-memory-utilization


class Hardware(Protocol):
    """What an engine needs of its GPUs."""

    def clock_mhz(self) -> float:
        """The SM clock of the slowest GPU now."""

    def declare(self, power_w: float) -> None:
        """Every GPU draws so much from now on."""

    def rest(self) -> None:
        """Nothing is computed from now on."""

    def close(self) -> None:
        """Give the GPUs back."""


class FixedClock:
    """GPUs that always run at one clock and whose power nobody measures: for tests of what is above them."""

    def __init__(self, clock_mhz: float) -> None:
        self._clock_mhz = clock_mhz

    def clock_mhz(self) -> float:
        return self._clock_mhz

    def declare(self, power_w: float) -> None:
        return None

    def rest(self) -> None:
        return None

    def close(self) -> None:
        return None


class SimulatedGpus:
    """GPUs of a simulated node, by their indices; raises SimError when one is not there."""

    def __init__(self, node: SimNode, gpus: Sequence[int], *, name: str = "powerd-sim-engine", owns_node: bool = False) -> None:
        self.node, self.gpus, self._owns = node, tuple(gpus), owns_node
        memory = int(WEIGHTS_AND_CACHE * 80 * GIB)
        self._contexts: list[Context] = []
        try:
            for gpu in self.gpus:
                self._contexts.append(Context(gpu, node=node, name=name, memory_bytes=memory))
        except Exception:
            self.close()
            raise

    @classmethod
    def open(cls, gpus: Sequence[int]) -> SimulatedGpus:
        """GPUs of the node that ``POWERD_SIM_STATE`` names."""
        return cls(attach(), gpus, owns_node=True)

    def clock_mhz(self) -> float:
        return min(float(self.node.view(gpu).clock_mhz) for gpu in self.gpus)

    def declare(self, power_w: float) -> None:
        for context in self._contexts:
            context.declare(power_w)

    def rest(self) -> None:
        for context in self._contexts:
            context.rest()

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        self._contexts.clear()
        if self._owns:
            self.node.close()

    def __enter__(self) -> SimulatedGpus:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def indices(node: SimNode, names: Sequence[str]) -> tuple[int, ...]:
    """Indices of GPUs that are named by index or UUID (a unique beginning will do); ValueError for anything else."""
    uuids = [node.view(gpu).uuid.decode() for gpu in range(node.gpus)]
    found = []
    for name in names:
        if name.isdecimal() and int(name) < node.gpus:
            found.append(int(name))
            continue
        matches = [index for index, uuid in enumerate(uuids) if name and uuid.startswith(name)]
        if len(matches) != 1:
            raise ValueError(f"no GPU {name!r}: this node has 0..{node.gpus - 1}")
        found.append(matches[0])
    if len(set(found)) != len(found):
        raise ValueError(f"a GPU is named twice in {','.join(names)}")
    return tuple(found)
