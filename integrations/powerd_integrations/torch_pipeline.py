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

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from powerd_integrations.adapter import Handle, check_timing, connect, quietly
from powerd_integrations.pipeline import Conductor, Options

if TYPE_CHECKING:
    from powerd.client import Client
    from powerd_integrations.pipeline.recorded import RankOrder

#: torch's _ComputationType by value -> kind of instruction.
KINDS = {"F": "forward", "B": "backward", "I": "input", "W": "weight"}
METHODS = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")


def _wrap(handle: Handle, conductor: Conductor, schedule: Any, stages: Sequence[Any]) -> None:
    """Put ours on this schedule and these stages, and into the handle how to take it off again."""
    wrapped = [(stage, n, _instruction(conductor, stage, n, getattr(stage, n))) for stage in stages for n in METHODS]
    for instance, name, ours in (*wrapped, (schedule, "step", _step(conductor, schedule.step))):
        own = instance.__dict__  # in which somebody else may have put something before
        handle.undo.append(partial(own.update, {name: own[name]}) if name in own else partial(own.pop, name, None))
        own[name] = ours


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
    check_timing(timing)
    return quietly(lambda: _optimize(schedule, chosen, client, gpu, timing, tensor_parallel_group, shape))


def _optimize(
    schedule: Any, options: Options, client: Client | None, gpu: str | None, timing: str, tensor_group: Any, shape: str
) -> Handle:
    import torch.distributed as dist

    stages = stages_of(schedule)
    handle = connect(
        dist.get_process_group_ranks(stages[0].group or dist.group.WORLD),
        [dist.get_rank()] if tensor_group is None else dist.get_process_group_ranks(tensor_group),
        device=stages[0].device, order=order_of(schedule), options=options, client=client, gpu=gpu, timing=timing,
        shape=lambda: _shape(stages, shape),
    )  # fmt: skip
    if handle.conductor is not None:
        _wrap(handle, handle.conductor, schedule, stages)
    return handle


def _shape(stages: Sequence[Any], also: str) -> str:
    """What a profile of these stages depends on: their parameters' shapes and types, and those of a microbatch."""
    about = [also]
    for stage in stages:
        about.append(f"{stage.stage_index}/{stage.num_stages}")
        about += [f"{tuple(p.shape)}{p.dtype}" for p in stage.submod.parameters()]
        about.append(repr(getattr(stage, "inputs_meta", None)))
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
