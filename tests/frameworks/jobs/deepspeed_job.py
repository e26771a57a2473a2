"""DeepSpeed: a PipelineModule of two stages on gloo, trained by its own engine; evaluations in between; first without powerd."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from pipework import OPTIONS, WIDTH, WORLD, Layer, tell

from powerd_integrations.deepspeed import optimize

MICROBATCHES, STEPS = 4, 36
deepspeed.ops.__compatible_ops__.clear()  # else its CPU communication is compiled first, which is not what is tested
deepspeed.init_distributed("gloo")


def build() -> Any:
    torch.manual_seed(3)
    module = PipelineModule(
        layers=[LayerSpec(Layer) for _ in range(WORLD)], num_stages=WORLD, loss_fn=torch.nn.functional.mse_loss,
        partition_method="uniform",
    )  # fmt: skip
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": MICROBATCHES, "steps_per_print": 10**9,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
    }  # fmt: skip
    return deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=config)[0]


def data() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    while True:
        yield torch.randn(2, WIDTH, generator=generator), torch.randn(2, WIDTH, generator=generator)


def train(engine: Any, steps: int, handle: Any = None) -> tuple[list[str], list[str]]:
    rows = data()
    states: list[str] = []
    losses: list[str] = []
    for step in range(steps):
        if step == 4:
            engine.eval_batch(data_iter=rows)
        losses.append(float(engine.train_batch(data_iter=rows)).hex())
        if handle and (not states or states[-1] != handle.state):
            states.append(str(handle.state))
    return losses, states


without, _ = train(build(), 6)
engine = build()
table = type(engine)._INSTRUCTION_MAP
before = dict(table)
handle = optimize(engine, **OPTIONS)
losses, states = train(engine, STEPS, handle)
assert type(engine)._INSTRUCTION_MAP is table
assert table == before, "the class keeps its table"
tell(handle, states, losses, without=without)
handle.detach()
assert not {"_INSTRUCTION_MAP", "_exec_schedule"} & set(engine.__dict__)
