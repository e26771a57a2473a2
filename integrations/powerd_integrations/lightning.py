"""PyTorch Lightning: ``Trainer(callbacks=[PowerdCallback()])``.

House rules: nothing raises into training; after an exception Lightning calls no end hook, so that ``on_exception`` gives the
clock back, and the kernel does when even that does not run; Lightning is imported when the callback is first asked for.

One step is one optimizer step, whatever ``accumulate_grad_batches`` is. Validation and checkpoints are kept apart from steps; the
GPU's clock goes down while a checkpoint is written, and while the next batch is waited for.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from powerd_integrations.steps import StepOptions, Steps

if TYPE_CHECKING:
    from powerd.client import Client

__all__ = ["PowerdCallback"]  # noqa: F822 (made when first asked for)


def __getattr__(name: str) -> Any:
    if name == "PowerdCallback":
        return _callback_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _callback_class() -> type:
    base: Any
    if "lightning" not in sys.modules and "pytorch_lightning" in sys.modules:
        base = sys.modules["pytorch_lightning"].Callback  # the same under its older name
    else:
        from lightning.pytorch import Callback

        base = Callback

    class PowerdCallback(base):  # type: ignore[misc, unused-ignore]
        """Energy per step, the energy-optimal clock within ``options.slowdown``, low clocks while nothing is computed.

        ``steps`` holds what was found and measured. Put the same callback on every rank: they share one clock.
        """

        def __init__(self, options: StepOptions | None = None, client: Client | None = None) -> None:
            self._arguments = (client, options)
            self.steps = Steps(client, options)
            self._stepping = False
            self._global_step = 0

        def __getstate__(self) -> dict[str, Any]:
            return {"_arguments": (None, self._arguments[1])}  # a spawned rank makes its own

        def __setstate__(self, state: dict[str, Any]) -> None:
            _, options = state["_arguments"]
            self.__init__(options)  # type: ignore[misc]

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if not self._stepping:
                self._stepping, self._global_step = True, trainer.global_step
                self.steps.begin(trainer.global_step)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step != self._global_step:  # else gradients are still being accumulated
                self._stepping = False
                self.steps.end()

        def on_validation_start(self, *_: Any) -> None:
            self.steps.begin_apart("evaluation", idle=False)

        def on_validation_end(self, *_: Any) -> None:
            self.steps.end_apart()

        def on_save_checkpoint(self, *_: Any) -> None:
            # There is no hook for the end of writing: the next step, or the next validation, is it.
            self.steps.begin_apart("checkpoint", idle=True)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self._stepping = False
            self.steps.failed(exception)

        def on_train_end(self, *_: Any) -> None:
            self._stepping = False
            self.steps.finish()

        def teardown(self, *_: Any, **__: Any) -> None:
            self.steps.finish()

    PowerdCallback.__module__, PowerdCallback.__qualname__ = __name__, "PowerdCallback"
    return PowerdCallback
