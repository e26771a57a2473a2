"""Hugging Face transformers: ``Trainer(callbacks=[PowerdCallback()])``.

House rules: nothing raises into training; the Trainer tells nobody of an exception, so that the clock goes back when the process
ends, when it is silent for ``StepOptions.silence_s``, or when the lease expires; transformers is imported when first asked for.

One step is one optimizer step, gradient accumulation included. Evaluations and checkpoints are kept apart from steps; the Trainer
announces both at the end of a step, so that the GPU's clock goes down while a checkpoint is written.
"""

from __future__ import annotations

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
    from transformers import TrainerCallback

    class PowerdCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Energy per step, the energy-optimal clock within ``options.slowdown``, low clocks while nothing is computed.

        ``steps`` holds what was found and measured. Put the same callback on every rank: they share one clock.
        """

        def __init__(self, options: StepOptions | None = None, client: Client | None = None) -> None:
            self.steps = Steps(client, options)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.steps.begin(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.steps.end()
            self._announced(control)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._announced(control)

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.steps.end_apart()
            if control.should_save:
                self.steps.begin_apart("checkpoint", idle=True)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.steps.end_apart()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.steps.finish()

        def _announced(self, control: Any) -> None:
            """What the Trainer does now: evaluate, then save."""
            if control.should_evaluate:
                self.steps.begin_apart("evaluation", idle=False)
            elif control.should_save:
                self.steps.begin_apart("checkpoint", idle=True)

    PowerdCallback.__module__, PowerdCallback.__qualname__ = __name__, "PowerdCallback"
    return PowerdCallback
