"""Perseus for ``torch.distributed.pipelining`` in one line: ``handle = optimize(schedule)`` after the schedule is built.

House rules: instances are wrapped, torch is not patched; whatever fails here, training goes on as if this line were not there;
every rank of the job calls ``optimize`` at the same place, because ranks find each other there (a gloo group of its own).

    from powerd_integrations.torch_pipeline import optimize

    schedule = Schedule1F1B(stage, n_microbatches, loss_fn=loss_fn)
    optimize(schedule)
    for x, y in data:
        schedule.step(x, target=y)
        optimizer.step()

GPipe, 1F1B, Interleaved1F1B, ZBVZeroBubble and every other schedule of torch 2.13 whose instructions are forward, backward, or
its two halves. The order is derived from the schedule and compared with a recorded step (torch's own ``_get_pipeline_order`` of
1F1B names instructions on the last rank that it does not run).
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from powerd.client import Client
from powerd_integrations.pipeline import Conductor, HostTiming, Options, Place, State, Timing, launch
from powerd_integrations.pipeline.recorded import RankOrder

log = logging.getLogger("powerd.pipeline")

#: torch's _ComputationType by value -> kind of instruction.
KINDS = {"F": "forward", "B": "backward", "I": "input", "W": "weight"}
METHODS = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")


class Handle:
    """What ``optimize`` did: ``state``, the ``plan`` in force, and ``detach`` to undo it."""

    def __init__(self, conductor: Conductor | None, client: Client | None, schedule: Any, stages: Sequence[Any]) -> None:
        self.conductor, self._client, self._schedule, self._stages = conductor, client, schedule, stages
        self._wrapped: list[tuple[Any, str, Any]] = []  # and what somebody else had put there before
        if conductor is not None:
            self._wrap(conductor)
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
        """Give the schedule and its stages back as they were and the clocks to whoever else has a say; twice is harmless."""
        for instance, name, before in self._wrapped:
            instance.__dict__.pop(name, None)
            if before is not None:
                instance.__dict__[name] = before
        self._wrapped = []
        conductor, self.conductor = self.conductor, None
        if conductor is not None:
            conductor.close()
            atexit.unregister(self.detach)
        if self._client is not None:
            self._client.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _wrap(self, conductor: Conductor) -> None:
        for stage in self._stages:
            for name in METHODS:
                self._put(stage, name, _instruction(conductor, stage, name, getattr(stage, name)))
        self._put(self._schedule, "step", _step(conductor, self._schedule.step))

    def _put(self, instance: Any, name: str, wrapped: Callable[..., Any]) -> None:
        self._wrapped.append((instance, name, instance.__dict__.get(name)))
        instance.__dict__[name] = wrapped


def _instruction(conductor: Conductor, stage: Any, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """One of a stage's three methods with its begin and end told; receives are over before torch calls it."""
    index = int(stage.stage_index)
    begin, end = conductor.begin, conductor.end
    if name == "forward_one_chunk":

        def forward(fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
            begin(index, "forward", fwd_chunk_id)
            result = original(fwd_chunk_id, *args, **kwargs)
            end(index, "forward", fwd_chunk_id)
            return result

        return forward
    if name == "backward_one_chunk":

        def backward(bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, *args: Any, **kwargs: Any) -> Any:
            if not stage.has_backward:  # an evaluation: torch calls it all the same and it returns at once
                return original(bwd_chunk_id, loss, full_backward, *args, **kwargs)
            kind = "backward" if full_backward else "input"
            begin(index, kind, bwd_chunk_id)
            result = original(bwd_chunk_id, loss, full_backward, *args, **kwargs)
            end(index, kind, bwd_chunk_id)
            return result

        return backward

    def weight(bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if not stage.has_backward:
            return original(bwd_chunk_id, *args, **kwargs)
        begin(index, "weight", bwd_chunk_id)
        result = original(bwd_chunk_id, *args, **kwargs)
        end(index, "weight", bwd_chunk_id)
        return result

    return weight


def _step(conductor: Conductor, original: Callable[..., Any]) -> Callable[..., Any]:
    def step(*args: Any, **kwargs: Any) -> Any:
        conductor.step_begin()
        try:
            result = original(*args, **kwargs)
        except BaseException:
            conductor.step_abort()
            raise
        conductor.step_end()
        return result

    return step


def stages_of(schedule: Any) -> tuple[Any, ...]:
    """The stages of this rank, of a schedule with one or with several."""
    stages = getattr(schedule, "_stages", None)
    return tuple(stages) if stages is not None else (schedule._stage,)


def order_of(schedule: Any) -> tuple[RankOrder, ...] | None:
    """What each rank of a torch schedule will run; None when its kind is not known, so that only the recorded order counts."""
    name = {"ScheduleGPipe": "gpipe", "Schedule1F1B": "1f1b"}.get(type(schedule).__name__)
    if name is None:
        planned = getattr(schedule, "pipeline_order", None)
        return None if not planned else tuple(tuple(_flat(planned[rank])) for rank in sorted(planned))
    try:
        from powerd_policies.perseus import schedules
    except ImportError:  # powerd[plan] is not installed here
        return None
    made = schedules.order(name, schedule._num_stages, schedule._n_microbatches)  # torch's own of 1F1B is wrong
    return tuple(tuple((i.stage, str(i.kind), i.microbatch) for i in rank) for rank in made)


def _flat(actions: Sequence[Any]) -> list[tuple[int, str, int]]:
    found: list[tuple[int, str, int]] = []
    for action in actions:
        if action is None:
            continue
        if getattr(action, "sub_actions", None):
            found += _flat(action.sub_actions)
        elif (kind := KINDS.get(action.computation_type.value)) is not None:
            found.append((action.stage_index, kind, action.microbatch_index))
    return found


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


def optimize(
    schedule: Any,
    *,
    client: Client | None = None,
    gpu: str | None = None,
    timing: str = "auto",
    tensor_parallel_group: Any = None,
    shape: str = "",
    **options: Any,
) -> Handle:
    """Let powerd set the clocks of this pipeline's GPUs; answers a Handle and never raises but for options that make no sense.

    ``timing``: ``cpu`` (begin and end are the calls' own), ``event`` (CUDA events), ``sync`` (the CPU waits for the GPU at every
    instruction), ``auto``: ``event`` on CUDA, else ``cpu``; docs/training.md says what each costs. ``shape`` names what a kept
    profile is good for beside the parameters' shapes. ``gpu`` is a UUID; without it the stage's device, else the visible one.
    All other options are those of ``powerd_integrations.pipeline.Options``; they and ``timing`` raise RequestError, ValueError.
    """
    chosen = Options(**options)
    if timing not in ("auto", "cpu", "event", "sync"):
        raise ValueError(f"timing is auto, cpu, event or sync, not {timing!r}")
    try:
        return _optimize(schedule, chosen, client, gpu, timing, tensor_parallel_group, shape)
    except Exception as error:
        log.warning("powerd: training goes on without it: %s: %s", type(error).__name__, error)
        log.debug("optimize failed", exc_info=True)
        return Handle(None, None, schedule, ())


def _optimize(
    schedule: Any, options: Options, client: Client | None, gpu: str | None, timing: str, tensor_group: Any, shape: str
) -> Handle:
    import torch.distributed as dist

    stages = stages_of(schedule)
    exchange = TorchExchange()
    rank = dist.get_rank()
    pipeline_ranks = dist.get_process_group_ranks(stages[0].group or dist.group.WORLD)
    tensor_ranks = [rank] if tensor_group is None else dist.get_process_group_ranks(tensor_group)
    place = place_in(exchange.gather((pipeline_ranks, tensor_ranks)), rank, launch(os.environ).local_rank)
    own = client or Client(on_error="log")
    device = stages[0].device
    conductor = Conductor(
        place,
        exchange,
        own,
        uuid=gpu or _uuid(device),
        order=order_of(schedule),
        options=options,
        shape=lambda: _shape(stages, shape),
        timing=_timing(timing, device, own),
    )
    return Handle(conductor, own if client is None else None, schedule, stages)


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


def _shape(stages: Sequence[Any], also: str) -> str:
    """What a profile of these stages depends on: their parameters' shapes and types, and those of a microbatch."""
    about = [also]
    for stage in stages:
        about.append(f"{stage.stage_index}/{stage.num_stages}")
        about += [f"{tuple(p.shape)}{p.dtype}" for p in stage.submod.parameters()]
        about.append(repr(getattr(stage, "inputs_meta", None)))
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
