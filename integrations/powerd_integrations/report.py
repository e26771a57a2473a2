"""What a training process tells powerd of its job: steps with time, energy and clock, checkpoints, restarts, its end.

House rules: built on the client's JobLog, which neither waits nor raises; what is told before the log is open is kept until then;
a step's energy is its share of its block's, since a step may be shorter than a sensor's period.
"""

from __future__ import annotations

import atexit
import os
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from powerd.client import Client, JobLog
from powerd_integrations.tuner import Block

_KEPT = 64  # notes from before the log is open


def job_name() -> str:
    """What the launcher calls this job, else a name that all ranks which one launcher started here share."""
    for name in ("POWERD_JOB", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        if os.environ.get(name, "none") != "none":
            return os.environ[name]
    return f"training-{os.getppid() if 'RANK' in os.environ else os.getpid()}"


def world_rank() -> int:
    """This process's rank in its job; 0 when nobody launched it as one of several."""
    found = next((os.environ[n] for n in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK") if n in os.environ), "0")
    return int(found) if found.isdecimal() else 0


class Report:
    """One rank's reports; ``open`` is called by a thread that may wait, all else by whoever has something to tell."""

    def __init__(self, client: Client, job: str) -> None:
        self._client, self._job = client, job
        self._log: JobLog | None = None
        self._early: deque[Callable[[JobLog], None]] = deque(maxlen=_KEPT)

    def open(self, uuids: Sequence[str]) -> None:
        """Begin to tell, of these GPUs."""
        if self._log is None:
            log = JobLog(self._client, self._job, rank=world_rank(), gpus=uuids)
            atexit.unregister(log.close)  # whoever has this report closes it, after its last word
            log.start()
            while self._early:
                self._early.popleft()(log)
            self._log = log

    def _tell(self, what: Callable[[JobLog], None]) -> None:
        if self._log is not None:
            what(self._log)
        else:
            self._early.append(what)

    def restore(self, step: int) -> None:
        """Training goes on after this step; -1: from nothing."""
        self._tell(lambda log: log.restore(step))

    def checkpoint(self, begins: bool) -> None:
        """A checkpoint begins or ends."""
        self._tell(lambda log: log.checkpoint_begin() if begins else log.checkpoint_end())

    def exception(self, error: BaseException | None) -> None:
        """A step has failed."""
        detail = "" if error is None else f"{type(error).__name__}: {error}"
        self._tell(lambda log: log.exception(detail))

    def steps(
        self, block: Block, apart: Sequence[tuple[int, int]], measured: tuple[float, float, int] | None, clock_mhz: int | None,
        plan: str | None,
    ) -> None:  # fmt: skip
        """The steps of a block that has ended; energy for those that were measured, ``apart`` no part of any."""
        ends = [*block.begins_ns[1:], block.end_ns]
        time_s, energy_j, count = measured or (0.0, 0.0, 0)
        for number, (step, begin_ns, next_ns) in enumerate(zip(block.steps_told, block.begins_ns, ends, strict=True)):
            end_ns = min([next_ns, *(start for start, _ in apart if start >= begin_ns)])
            known = energy_j if number >= block.steps - count and time_s > 0 else None
            self._tell(partial(_step, (step, begin_ns, end_ns), known, clock_mhz, plan))

    def close(self) -> None:
        """The job is over."""
        log, self._log = self._log, None
        if log is not None:
            log.end()
            log.close()


def _step(times: tuple[int, int, int], energy_j: float | None, clock_mhz: int | None, plan: str | None, log: JobLog) -> None:
    log.step(*times, energy_j=energy_j, clock_mhz=clock_mhz, plan=plan)
