"""Lightning: a real Trainer.fit with validation, checkpoints, and one that ends in an exception while a clock is set."""

from __future__ import annotations

import pickle
import tempfile
from dataclasses import replace
from typing import Any

import torch
from common import OPTIONS, compute, lock_mhz, lowest, tell
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from powerd.client import Client
from powerd_integrations.lightning import PowerdCallback

seen: list[int] = []
while_saving: list[int] = []


class Tiny(LightningModule):
    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.layer, self.fails = torch.nn.Linear(4, 1), fails

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        compute()
        seen.append(lock_mhz())
        if self.fails and 0 < seen[-1] < 1400:
            raise RuntimeError("a batch that does not fit")
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        compute()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SlowDisk(Callback):
    """Makes the first checkpoint take a while."""

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not while_saving:
            import time

            time.sleep(1.0)
            while_saving.append(lock_mhz())


def loader(rows: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(rows, 4)), batch_size=2)


def fit(job: str, fails: bool, **said: Any) -> None:
    seen.clear()
    callback, folder = PowerdCallback(replace(OPTIONS, job=job)), tempfile.mkdtemp()
    trainer = Trainer(
        max_steps=70, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, accumulate_grad_batches=2, val_check_interval=40, limit_val_batches=2,
        callbacks=[callback, SlowDisk(), ModelCheckpoint(folder, every_n_train_steps=60)],
    )  # fmt: skip
    raised = ""
    try:
        trainer.fit(Tiny(fails), loader(400), loader(8))
    except RuntimeError as error:
        raised = str(error)
    after = {"lock_after_mhz": lock_mhz(), "leases": len(Client().leases())}
    callback.steps.close()  # else it would say its last word only after ours
    tell(callback.steps, raised=raised, lowest_mhz=lowest(seen), global_step=trainer.global_step, **after, **said)


assert isinstance(pickle.loads(pickle.dumps(PowerdCallback(OPTIONS))), PowerdCallback), "a spawned rank gets its own"
fit("a fit that fails", fails=True)
fit("lightning_job", fails=False, while_saving=while_saving)
