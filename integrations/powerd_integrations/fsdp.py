"""FSDP, DDP and any loop with an optimizer: ``steps = watch(optimizer)``, and every optimizer step ends a training step.

House rules: nothing raises into training; collectives couple all ranks, so that all of them use one clock (decided together, on a
gloo group of its own); only public hooks of the optimizer are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from powerd_integrations.steps import StepOptions, Steps

if TYPE_CHECKING:
    from powerd.client import Client


def watch(optimizer: Any, options: StepOptions | None = None, client: Client | None = None) -> Steps:
    """Steps that end when this optimizer has stepped; call it on every rank. ``steps.close()`` ends it.

    What happens between two optimizer steps is one step, the wait for input included; say ``with steps.idle("checkpoint")``
    around ``torch.distributed.checkpoint.save`` and ``with steps.apart("evaluation")`` around an evaluation.
    """
    steps = Steps(client, options)

    def stepped(*_: Any) -> None:
        steps.begin()

    steps.on_close(optimizer.register_step_post_hook(stepped).remove)
    return steps
