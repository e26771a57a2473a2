"""DeepSpeed: a PipelineModule of two stages on gloo, trained by its own engine; evaluations in between. Word: without."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from pipework import OPTIONS, WIDTH, WORLD, Layer, tell

from powerd_integrations.deepspeed import optimize

MICROBATCHES, STEPS = 4, 45
deepspeed.init_distributed("gloo")
torch.manual_seed(3)
module = PipelineModule(
    layers=[LayerSpec(Layer) for _ in range(WORLD)],
    num_stages=WORLD,
    loss_fn=torch.nn.functional.mse_loss,
    partition_method="uniform",
)
engine, _, _, _ = deepspeed.initialize(
    model=module, model_parameters=list(module.parameters()),
    config={"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": MICROBATCHES,
            "optimizer": {"type": "SGD", "params": {"lr": 0.05}}, "steps_per_print": 10**9},
)  # fmt: skip
table = type(engine)._INSTRUCTION_MAP
before = dict(table)
handle = optimize(engine, **OPTIONS) if "without" not in sys.argv else None
generator = torch.Generator().manual_seed(5)


def data():
    while True:
        yield torch.randn(2, WIDTH, generator=generator), torch.randn(2, WIDTH, generator=generator)


rows, states, losses = data(), [], []
for step in range(STEPS if handle else 6):
    if step == 4:
        engine.eval_batch(data_iter=rows)
    losses.append(float(engine.train_batch(data_iter=rows)).hex())
    if handle and (not states or states[-1] != handle.state):
        states.append(str(handle.state))
if handle is None:
    tell(type("None", (), {"conductor": None, "plan": None}), [], losses)
else:
    order, plan, beats = handle.conductor.agreement.order, handle.plan, handle.conductor.beats_sent
    assert type(engine)._INSTRUCTION_MAP is table and table == before, "the class keeps its table"
    tell(handle, states, losses)
    handle.detach()
    assert "_INSTRUCTION_MAP" not in engine.__dict__ and "_exec_schedule" not in engine.__dict__
