"""What adapters of pipeline frameworks share: this rank's conductor from its process groups, and a handle that undoes everything.

House rules: only objects of the user's are changed, never a framework's classes or modules; whatever fails while connecting,
training goes on without powerd after one warning.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from powerd.client import Client
from powerd_integrations.pipeline import Conductor, HostTiming, Options, State, Timing, launch

if TYPE_CHECKING:
    from powerd_integrations.pipeline.recorded import RankOrder

log = logging.getLogger("powerd.pipeline")
TIMINGS = ("auto", "cpu", "event", "sync")


class Handle:
    """What ``optimize`` did: ``state``, the ``plan`` in force, and ``detach`` to undo it; also as a context manager."""

    def __init__(self, conductor: Conductor | None = None, client: Client | None = None) -> None:
        self.conductor, self._client = conductor, client
        self.undo: list[Callable[[], object]] = []
        if conductor is not None:
            atexit.register(self.detach)

    @property
    def state(self) -> State:
        """Where the job stands."""
        return State.OFF if self.conductor is None else self.conductor.state

    @property
    def plan(self) -> dict[str, Any] | None:
        """This pipeline's plan: its times, energies and clocks; None before there is one."""
        return None if self.conductor is None else self.conductor.plan

    def detach(self) -> None:
        """Give everything back as it was, and the clocks to whoever else has a say; twice is harmless."""
        while self.undo:
            self.undo.pop()()
        conductor, self.conductor = self.conductor, None
        if conductor is not None:
            conductor.close()
            atexit.unregister(self.detach)
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def connect(
    pipeline_ranks: Sequence[int],
    tensor_ranks: Sequence[int],
    *,
    device: Any,
    order: Sequence[RankOrder] | None,
    options: Options,
    client: Client | None,
    gpu: str | None,
    timing: str,
    shape: Callable[[], str],
) -> Handle:
    """This rank's conductor; collective. The groups are world ranks, the pipeline's in the order of its stages."""
    import torch.distributed as dist

    from powerd_integrations import torch_pipeline

    exchange = torch_pipeline.TorchExchange()
    place = torch_pipeline.place_in(
        exchange.gather((list(pipeline_ranks), list(tensor_ranks))), dist.get_rank(), launch(os.environ).local_rank
    )
    own = client or Client(on_error="log")
    conductor = Conductor(
        place, exchange, own, uuid=gpu or torch_pipeline._uuid(device), order=order, options=options, shape=shape,
        timing=_timing(timing, device, own),
    )  # fmt: skip
    return Handle(conductor, own if client is None else None)


def _timing(name: str, device: Any, client: Client) -> Timing:
    from powerd_integrations import torch_pipeline

    return HostTiming(client.now_ns) if name == "cpu" else torch_pipeline._timing(name, device, client)


def quietly(connecting: Callable[[], Handle]) -> Handle:
    """A handle that does nothing when connecting fails, after one warning."""
    try:
        return connecting()
    except Exception as error:
        log.warning("powerd: training goes on without it: %s: %s", type(error).__name__, error)
        log.debug("optimize failed", exc_info=True)
        return Handle()


def check_timing(timing: str) -> None:
    """ValueError for a way to tell moments that does not exist."""
    if timing not in TIMINGS:
        raise ValueError(f"timing is one of {', '.join(TIMINGS)}, not {timing!r}")
