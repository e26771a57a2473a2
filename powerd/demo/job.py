"""The training job of the demonstration: every GPU runs one pipeline stage of GPT-3 175B.

House rules: it knows nothing of powerd, clocks or energy; it reports how long its microbatches took in the node's time.
"""

from __future__ import annotations

import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait

from powerd.demo.children import say
from powerd.sim.node import SimNode, attach
from powerd.sim.workload import Context

PROFILE = "gpt3-175b"
STAGES = 8
STAGE_WORK = ("forward", "backward")


def stage_of(gpu: int) -> int:
    """The pipeline stage that a GPU runs."""
    return gpu % STAGES


class Job:
    """One context per GPU; microbatches are handed over at once, so that a GPU never idles while Python wakes up."""

    def __init__(self, node: SimNode, gpus: int) -> None:
        self._contexts = [Context(gpu, node=node, name="gpt3-stage") for gpu in range(gpus)]
        self._pool = ThreadPoolExecutor(gpus)

    def _one(self, gpu: int, microbatches: int) -> dict[str, float]:
        kernels = [(f"{PROFILE}/{stage_of(gpu)}/{part}", 1.0) for part in STAGE_WORK] * microbatches
        done = self._contexts[gpu].run(kernels)
        return {"gpu": gpu, "end_ns": done.end_ns, "seconds": done.seconds, "microbatches": microbatches}

    def start(self, microbatches: int) -> list[Future[dict[str, float]]]:
        """All GPUs begin their microbatches."""
        return [self._pool.submit(self._one, gpu, microbatches) for gpu in range(len(self._contexts))]


def main() -> None:
    """Commands on stdin: ``run N`` (all GPUs run N microbatches once), ``loop`` (on and on, until ended)."""
    with attach() as node:
        job = Job(node, int(sys.argv[1]))
        say(ready=True)
        for line in sys.stdin:
            words = line.split()
            if words[:1] == ["loop"]:
                while True:
                    wait(job.start(4))
            running = job.start(int(words[1]))
            say(started=True)
            say(runs=[future.result() for future in running])


if __name__ == "__main__":
    main()
