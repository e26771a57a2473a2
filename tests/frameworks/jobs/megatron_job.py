"""Megatron core: its pipeline schedule with two stages on gloo, with or without (word: interleaved) two chunks per rank.

Megatron core 0.16 names CUDA in its schedules and its communication even where nothing needs it; three names are pointed at the
CPU here, nothing else of it is changed.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from megatron.core.timers import Timers
from megatron.core.transformer import TransformerConfig
from pipework import OPTIONS, RANK, WIDTH, WORLD, Layer, tell

from powerd_integrations.megatron import optimize


def _zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
    return torch.zeros(*size, **options)


torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.synchronize = lambda *_: None
_on_cpu = types.ModuleType("torch_on_cpu")
_on_cpu.__dict__.update(torch.__dict__)
_on_cpu.__dict__["zeros"] = _zeros
schedules.torch = _on_cpu

MICROBATCHES, STEPS = 4, 36
chunks = 2 if "interleaved" in sys.argv else 1
dist.init_process_group("gloo")
parallel_state.initialize_model_parallel(
    pipeline_model_parallel_size=WORLD,
    virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
    create_gloo_process_groups=False,
)


class Chunk(torch.nn.Module):
    """One stage: what Megatron's schedules ask of a model."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: TransformerConfig, vp_stage: int | None) -> None:
        super().__init__()
        self.config, self.layer, self.received, self.vp_stage = config, Layer(), None, vp_stage

    def set_input_tensor(self, tensors: list[torch.Tensor]) -> None:
        self.received = tensors[0]

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.layer(value if self.received is None else self.received)


config = TransformerConfig(
    num_layers=WORLD * chunks, hidden_size=WIDTH, num_attention_heads=1,
    pipeline_model_parallel_size=WORLD, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
    pipeline_dtype=torch.float32, batch_p2p_comm=False, overlap_p2p_comm=False, timers=Timers(2, "max"),
)  # fmt: skip


def rows() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    while True:
        yield torch.randn(1, 2, WIDTH, generator=generator)


def forward_step(iterator: Iterator[torch.Tensor], model: Chunk) -> tuple[torch.Tensor, Any]:
    output = model(next(iterator))
    return output, lambda out: (out.pow(2).mean(), {"loss": out.detach().pow(2).mean()})


def iterate(models: list[Chunk], data: list[Iterator[torch.Tensor]], forward_only: bool = False) -> list[str]:
    done = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=data if chunks > 1 else data[0], model=models if chunks > 1 else models[0],
        num_microbatches=MICROBATCHES, seq_length=1, micro_batch_size=2, forward_only=forward_only,
    )  # fmt: skip
    return [float(row["loss"]).hex() for row in done]


def train(steps: int, with_powerd: bool) -> tuple[list[str], list[str], Any]:
    torch.manual_seed(3 + RANK)
    models = [Chunk(config, n if chunks > 1 else None) for n in range(chunks)]
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], 0.05)
    handle = optimize(config, models, **OPTIONS) if with_powerd else None
    data = [rows() for _ in models]
    states: list[str] = []
    losses: list[str] = []
    for step in range(steps):
        if step == 4:
            with torch.no_grad():
                iterate(models, data, forward_only=True)
        losses += iterate(models, data)
        optimizer.step()
        optimizer.zero_grad()
        if handle and (not states or states[-1] != handle.state):
            states.append(str(handle.state))
    return losses, states, handle


own_timers = config.timers
without, _, _ = train(6, False)
losses, states, handle = train(STEPS, True)
assert config.timers("interval-time", log_level=0) is own_timers("interval-time", log_level=0), "other timers are the user's"
elapsed = own_timers("forward-compute", log_level=2).elapsed(reset=False)
tell(handle, states, losses, without=without, timers_elapsed=elapsed)
handle.detach()
assert config.timers is own_timers
dist.barrier()
