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
from powerd_integrations.pipeline import Conductor, HostTiming, Options, Place, State, Timing, launch

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

    exchange = TorchExchange()
    groups = exchange.gather((list(pipeline_ranks), list(tensor_ranks)))
    place = place_in(groups, dist.get_rank(), launch(os.environ).local_rank)
    own = client or Client(on_error="log")
    conductor = Conductor(
        place, exchange, own, uuid=gpu or _uuid(device), order=order, options=options, shape=shape,
        timing=_timing(timing, device, own),
    )  # fmt: skip
    return Handle(conductor, own if client is None else None)


class TorchExchange:
    """All ranks of the job over a gloo group of our own, so that our words never mix with training's."""

    def __init__(self) -> None:
        from datetime import timedelta

        import torch.distributed as dist

        self._dist = dist
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
        self._size = dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        said: list[Any] = [None] * self._size
        self._dist.all_gather_object(said, value, group=self._group)
        return said


def place_in(groups: Sequence[tuple[Sequence[int], Sequence[int]]], world_rank: int, local_rank: int = 0) -> Place:
    """The place of a rank, from every rank's (pipeline group, tensor-parallel group) as world ranks.

    Pipelines are numbered by their lowest rank; a pipeline group's tensor-parallel peers are those of its first rank.
    """
    pipelines: dict[tuple[int, ...], dict[int, int]] = {}  # first rank's peers -> first rank -> its peer number
    for members, _ in groups:
        peers = tuple(sorted(groups[members[0]][1]))
        pipelines.setdefault(peers, {})[members[0]] = peers.index(members[0])
    mine = groups[world_rank][0]
    peers = tuple(sorted(groups[mine[0]][1]))
    numbers = {key: n for n, key in enumerate(sorted(pipelines))}
    return Place(
        numbers[peers], list(mine).index(world_rank), pipelines[peers][mine[0]], len(numbers), len(mine), len(peers), local_rank
    )


def _timing(name: str, device: Any, client: Client) -> Timing:
    if name == "cpu" or (name == "auto" and device.type != "cuda"):
        return HostTiming(client.now_ns)
    from powerd_integrations.torch_timing import EventTiming, SyncTiming

    return SyncTiming(client.now_ns, device) if name == "sync" else EventTiming(client.now_ns, device)


def _uuid(device: Any) -> str | None:
    """The UUID of a CUDA device as NVML spells it; None when torch does not tell."""
    if device.type != "cuda":
        return None
    import torch

    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if uuid is None else f"GPU-{uuid}"


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
