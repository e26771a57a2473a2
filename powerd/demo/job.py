"""The training job of the demonstration: every GPU runs one pipeline stage of GPT-3 175B, over and over.

House rules: it knows nothing of powerd, clocks or energy; it reports how long its microbatches took in the node's time.
"""

from __future__ import annotations

import sys
import threading

from powerd.demo.children import say
from powerd.sim.node import attach
from powerd.sim.workload import Context

PROFILE = "gpt3-175b"
STAGES = 8
#: Handed to the GPU at once, so that it does not idle while Python wakes up (scaled time makes that gap longer).
MICROBATCHES = 2


def stage_of(gpu: int) -> int:
    """The pipeline stage that a GPU runs."""
    return gpu % STAGES


def main() -> None:
    """Run until told to end (SIGTERM)."""
    gpus = int(sys.argv[1])
    with attach() as node:

        def work(gpu: int) -> None:
            stage = stage_of(gpu)
            kernels = [(f"{PROFILE}/{stage}/forward", 1.0), (f"{PROFILE}/{stage}/backward", 1.0)] * MICROBATCHES
            with Context(gpu, node=node, name="gpt3-stage") as context:
                while True:
                    done = context.run(kernels)
                    with lock:
                        say(gpu=gpu, end_ns=done.end_ns, seconds=done.seconds, microbatches=MICROBATCHES)

        lock = threading.Lock()
        threads = [threading.Thread(target=work, args=(gpu,), daemon=True) for gpu in range(gpus)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
