"""Perseus for Megatron core's pipeline schedules in one line: ``optimize(config, model)`` before the first iteration.

House rules: Megatron is not patched: ``config.timers`` becomes a proxy that hands everything on to the user's own timers;
whatever fails here, training goes on as if this line were not there; every rank of the job calls ``optimize`` at the same place.

    config = core_transformer_config_from_args(args)      # the one that the model was built with
    optimize(config, model)
    for _ in range(iterations):
        forward_backward_func(forward_step_func=..., num_microbatches=m, ...)
        optimizer.step()

The schedules start and stop timers around every forward and backward (``forward-compute``, ``backward-compute``) and around the
whole (``forward-backward``), whatever the user's log level is. Timers do not say which microbatch it is: both passes take them in
a fixed sequence, so counting tells. A pass without a backward is an evaluation. Schedules that run a forward and a backward at
the same time (combined 1F1B for mixtures of experts) are left alone after one warning.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from powerd_integrations.adapter import Handle, check_timing, connect, quietly
from powerd_integrations.pipeline import Conductor, Options

if TYPE_CHECKING:
    from powerd.client import Client

log = logging.getLogger("powerd.pipeline")
FORWARD, BACKWARD, ITERATION = "forward-compute", "backward-compute", "forward-backward"
_KINDS = {FORWARD: "forward", BACKWARD: "backward"}


def optimize(
    config: Any,
    model: Any = None,
    *,
    client: Client | None = None,
    gpu: str | None = None,
    timing: str = "auto",
    shape: str = "",
    **options: Any,
) -> Handle:
    """Let powerd set the clocks of this pipeline's GPUs; answers a Handle and never raises but for options that make no sense.

    ``config`` is the ModelParallelConfig that the schedules are given (that of ``model``, one module or one per chunk, whose
    parameters say what a kept profile is good for). ``timing``, ``gpu``, ``shape`` and all other options are those of
    ``powerd_integrations.torch_pipeline.optimize``. Call it after ``initialize_model_parallel``.
    """
    chosen = Options(**options)
    check_timing(timing)
    return quietly(lambda: _optimize(config, model, chosen, client, gpu, timing, shape))


def _optimize(
    config: Any, model: Any, options: Options, client: Client | None, gpu: str | None, timing: str, shape: str
) -> Handle:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    stages = parallel_state.get_pipeline_model_parallel_world_size()
    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    modules = [] if model is None else list(model) if isinstance(model, (list, tuple)) else [model]
    first = next((p for module in modules for p in module.parameters()), None)
    if first is not None:
        device = first.device
    else:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    handle = connect(
        dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group()),
        dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group()),
        device=device, order=None, options=options, client=client, gpu=gpu, timing=timing, shape=lambda: _shape(modules, shape),
    )  # fmt: skip
    if handle.conductor is not None:
        group = int(getattr(config, "microbatch_group_size_per_vp_stage", None) or stages)
        counter = Counter(parallel_state.get_pipeline_model_parallel_rank(), stages, chunks, group)
        before = config.timers
        config.timers = Timers(before, _Hook(handle.conductor, counter))
        handle.undo.append(lambda: setattr(config, "timers", before))
    return handle


class Counter:
    """Which (stage, microbatch) the n-th forward or backward of an iteration on this rank is.

    Interleaved: as ``megatron.core.pipeline_parallel.schedules.get_schedule_table``, for groups of microbatches of which the last
    may be smaller (``last`` microbatches, when the iteration's number of microbatches is known not to fill it).
    """

    def __init__(self, rank: int, stages: int, chunks: int, group: int) -> None:
        self._rank, self._stages, self._chunks, self._group = rank, stages, chunks, max(1, group)

    def of(self, kind: str, number: int, microbatches: int | None = None) -> tuple[int, int]:
        """(stage, microbatch) of the n-th instruction of a kind, n from 0."""
        if self._chunks == 1:
            return self._rank, number
        turn, within = divmod(number, self._group * self._chunks)
        size = self._group if microbatches is None else max(1, min(self._group, microbatches - turn * self._group))
        chunk, microbatch = divmod(within, size)
        if kind == "backward":
            chunk = self._chunks - 1 - chunk
        return chunk * self._stages + self._rank, turn * self._group + microbatch


def _microbatches() -> int | None:
    """How many microbatches an iteration has now, where Megatron's own calculator has been set up."""
    try:
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        return int(get_num_microbatches())
    except Exception:
        return None


class _Hook:
    """Timers that start and stop, as begins and ends of instructions."""

    def __init__(self, conductor: Conductor, counter: Counter) -> None:
        self._conductor, self._counter = conductor, counter
        self._number = {"forward": 0, "backward": 0}
        self._open: tuple[int, str, int] | None = None
        self._microbatches: int | None = None
        self._inside = self._off = False

    def start(self, name: str) -> None:
        """A timer starts."""
        if self._off:
            return
        if name == ITERATION:
            if self._inside:  # the last one was left by an exception
                self._conductor.step_abort()
            self._number.update(forward=0, backward=0)
            self._open, self._inside, self._microbatches = None, True, _microbatches()
            self._conductor.step_begin()
        elif self._inside:
            if self._open is not None:
                self._stop_for_good("it runs a forward and a backward at the same time")
                return
            kind = _KINDS[name]
            stage, microbatch = self._counter.of(kind, self._number[kind], self._microbatches)
            self._number[kind] += 1
            self._open = (stage, kind, microbatch)
            self._conductor.begin(*self._open)

    def stop(self, name: str) -> None:
        """A timer stops."""
        if self._off:
            return
        if name == ITERATION:
            if self._inside:
                self._inside = False
                self._conductor.step_end()
        elif self._open is not None and self._open[1] == _KINDS[name]:
            key, self._open = self._open, None
            self._conductor.end(*key)

    def _stop_for_good(self, why: str) -> None:
        self._off = True
        self._conductor.step_abort()
        log.warning("powerd: this schedule is left alone: %s", why)


class Timers:
    """The user's timers, or none, with three of them watched; everything else is theirs."""

    def __init__(self, timers: Any, hook: _Hook) -> None:
        self._timers, self._hook = timers, hook
        self._watched: dict[str, _Timer] = {}

    def __call__(self, name: str, *arguments: Any, **options: Any) -> Any:
        inner = _NOBODY if self._timers is None else self._timers(name, *arguments, **options)
        if name not in _KINDS and name != ITERATION:
            return inner
        watched = self._watched.get(name)
        if watched is None or watched.inner is not inner:
            watched = self._watched[name] = _Timer(name, inner, self._hook)
        return watched

    def __getattr__(self, name: str) -> Any:
        return getattr(self._timers, name)


class _Timer:
    """One watched timer: its own start and stop as ever, the begin after the one and the end before the other."""

    def __init__(self, name: str, inner: Any, hook: _Hook) -> None:
        self._name, self.inner, self._hook = name, inner, hook

    def start(self, *arguments: Any, **options: Any) -> None:
        """Start it."""
        self.inner.start(*arguments, **options)
        self._hook.start(self._name)

    def stop(self, *arguments: Any, **options: Any) -> None:
        """Stop it."""
        self._hook.stop(self._name)
        self.inner.stop(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Nobody:
    """A timer of a user who has none."""

    def start(self, *_: Any, **__: Any) -> None:
        return None

    stop: Callable[..., None] = start


_NOBODY = _Nobody()


def _shape(modules: list[Any], also: str) -> str:
    about = [also, *(f"{tuple(p.shape)}{p.dtype}" for module in modules for p in module.parameters())]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
