"""Perseus for DeepSpeed's pipeline engine in one line: ``optimize(engine)`` after ``deepspeed.initialize``.

House rules: the engine *instance* gets its own copy of the instruction table, the class keeps its; whatever fails here, training
goes on as if this line were not there; every rank of the job calls ``optimize`` at the same place.

    engine, _, _, _ = deepspeed.initialize(model=PipelineModule(...), ...)
    optimize(engine)
    for _ in range(steps):
        engine.train_batch(data_iter=data)

DeepSpeed's instructions name buffers, not microbatches; both passes take microbatches in order, so counting tells which it is.
Evaluations (``eval_batch``) run through the same table and are left alone. What is recomputed belongs to the backward pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from powerd_integrations.adapter import Handle, check_timing, connect, quietly
from powerd_integrations.pipeline import Conductor, Options

if TYPE_CHECKING:
    from powerd.client import Client
    from powerd_integrations.pipeline.recorded import RankOrder

_TABLE, _RUN = "_INSTRUCTION_MAP", "_exec_schedule"


def optimize(
    engine: Any, *, client: Client | None = None, gpu: str | None = None, timing: str = "auto", shape: str = "", **options: Any
) -> Handle:
    """Let powerd set the clocks of this pipeline's GPUs; answers a Handle and never raises but for options that make no sense.

    ``timing``, ``gpu``, ``shape`` and all other options are those of ``powerd_integrations.torch_pipeline.optimize``.
    """
    chosen = Options(**options)
    check_timing(timing)
    return quietly(lambda: _optimize(engine, chosen, client, gpu, timing, shape))


def _optimize(engine: Any, options: Options, client: Client | None, gpu: str | None, timing: str, shape: str) -> Handle:
    from deepspeed.runtime.pipe import schedule

    grid = engine.grid
    stages, stage = int(grid.pipe_parallel_size), int(grid.stage_id)
    handle = connect(
        grid.pp_group, grid.slice_group, device=engine.device, order=order(int(engine.micro_batches), stages), options=options,
        client=client, gpu=gpu, timing=timing, shape=lambda: _shape(engine, shape),
    )  # fmt: skip
    if handle.conductor is not None:
        _Hook(engine, handle.conductor, stage, schedule).put(handle)
    return handle


def order(microbatches: int, stages: int) -> tuple[RankOrder, ...]:
    """What each stage runs in one ``train_batch``, as DeepSpeed's own schedule says."""
    from deepspeed.runtime.pipe import schedule

    kinds = {schedule.ForwardPass: "forward", schedule.BackwardPass: "backward"}
    made = []
    for stage in range(stages):
        count = dict.fromkeys(kinds.values(), -1)
        rank = []
        for commands in schedule.TrainSchedule(microbatches, stages, stage).steps():
            for kind in (kinds[type(command)] for command in commands if type(command) in kinds):
                count[kind] += 1
                rank.append((stage, kind, count[kind]))
        made.append(tuple(rank))
    return tuple(made)


class _Hook:
    """The engine's instruction table and schedule runner, with begin and end told while it trains."""

    def __init__(self, engine: Any, conductor: Conductor, stage: int, schedule: Any) -> None:
        self._engine, self._conductor, self._stage, self._schedule = engine, conductor, stage, schedule
        self._training = False
        self._count = {"forward": -1, "backward": -1}

    def put(self, handle: Handle) -> None:
        """Put it on the engine, and into the handle how to take it off again."""
        own = self._engine.__dict__
        table = dict(getattr(self._engine, _TABLE))
        for command, kind in ((self._schedule.ForwardPass, "forward"), (self._schedule.BackwardPass, "backward")):
            table[command] = self._told(kind, table[command])
        for name, new in ((_TABLE, table), (_RUN, self._run(getattr(self._engine, _RUN)))):
            handle.undo.append(partial(own.update, {name: own[name]}) if name in own else partial(own.pop, name, None))
            own[name] = new

    def _told(self, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        begin, end, stage, count = self._conductor.begin, self._conductor.end, self._stage, self._count

        def instruction(engine: Any, *arguments: Any, **options: Any) -> Any:
            if not self._training:
                return original(engine, *arguments, **options)
            count[kind] += 1
            microbatch = count[kind]
            begin(stage, kind, microbatch)
            result = original(engine, *arguments, **options)
            end(stage, kind, microbatch)
            return result

        return instruction

    def _run(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        conductor = self._conductor

        def exec_schedule(pipe_schedule: Any) -> Any:
            if not isinstance(pipe_schedule, self._schedule.TrainSchedule):
                return original(pipe_schedule)
            self._training = True
            self._count.update(forward=-1, backward=-1)
            conductor.step_begin()
            try:
                result = original(pipe_schedule)
            except BaseException:
                conductor.step_abort()
                raise
            finally:
                self._training = False
            conductor.step_end()
            return result

        return exec_schedule


def _shape(engine: Any, also: str) -> str:
    about = [also, str(engine.micro_batches), str(engine.train_micro_batch_size_per_gpu())]
    about += [f"{tuple(p.shape)}{p.dtype}" for p in engine.module.parameters()]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
