"""The training job of the demonstration: every GPU runs one pipeline stage of GPT-3 175B, on and on.

House rules: it knows nothing of powerd, clocks or energy.
"""

from __future__ import annotations

import sys
import threading

from powerd.demo.children import say
from powerd.sim.node import attach
from powerd.sim.workload import Context

PROFILE = "gpt3-175b"
STAGES = 8
STAGE_WORK = ("forward", "backward")


def stage_of(gpu: int) -> int:
    """The pipeline stage that a GPU runs."""
    return gpu % STAGES


def microbatches(gpu: int, count: int) -> list[tuple[str, float]]:
    """The kernels of so many microbatches of this GPU's stage."""
    return [(f"{PROFILE}/{stage_of(gpu)}/{part}", 1.0) for part in STAGE_WORK] * count


def _work(context: Context) -> None:
    while True:
        context.run(microbatches(context.gpu, 4))


def main() -> None:
    """``GPUS``: works on the first so many GPUs until it is ended."""
    with attach() as node:
        contexts = [Context(gpu, node=node, name="gpt3-stage") for gpu in range(int(sys.argv[1]))]
        workers = [threading.Thread(target=_work, args=(context,), daemon=True) for context in contexts]
        for worker in workers:
            worker.start()
        say(ready=True)
        for worker in workers:
            worker.join()


if __name__ == "__main__":
    main()
