"""Hugging Face: a real Trainer.train of a tiny model made here, with evaluations, checkpoints and gradient accumulation."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Any

import torch
from common import OPTIONS, compute, lock_mhz, lowest, tell
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from powerd.client import Client
from powerd_integrations.huggingface import PowerdCallback

fails = "fail" in sys.argv
seen: list[int] = []
while_saving: list[int] = []


class Work(LlamaForCausalLM):
    def forward(self, *arguments: Any, **options: Any) -> Any:
        compute()
        seen.append(lock_mhz())
        if fails and 0 < seen[-1] < 1400:
            raise RuntimeError("a batch that does not fit")
        return super().forward(*arguments, **options)


class SlowDisk(Trainer):
    def _save_checkpoint(self, *arguments: Any, **options: Any) -> Any:
        time.sleep(1.0)  # a disk that takes a while
        while_saving.append(lock_mhz())
        return super()._save_checkpoint(*arguments, **options)


rows = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])} for _ in range(200)]
model = Work(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
callback = PowerdCallback(OPTIONS)
assert isinstance(callback, TrainerCallback)
arguments = TrainingArguments(
    tempfile.mkdtemp(), max_steps=60, per_device_train_batch_size=1, gradient_accumulation_steps=2, eval_strategy="steps",
    eval_steps=25, save_steps=50, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    remove_unused_columns=False,
)  # fmt: skip
trainer = SlowDisk(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=[callback])
try:
    trainer.train()
except RuntimeError:
    if not fails:
        raise
    assert lock_mhz() < 1400
    print('{"raised": true}', flush=True)
    sys.exit(5 if "exit" not in sys.argv else 0)  # as a script that does not catch it: the interpreter ends in order
tell(callback.steps, lowest_mhz=lowest(seen), lock_after_mhz=lock_mhz(), pid=os.getpid(),
     leases=len(Client().leases()), global_step=trainer.state.global_step, while_saving=while_saving)  # fmt: skip
