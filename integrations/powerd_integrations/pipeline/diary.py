"""What a rank tells its daemon of every step: time, energy, mean clock, plan; ``powerctl jobs`` shows it.

House rules: nothing here makes training wait; energies are asked for in batches, after the fact; a step's time reaches to the
next step's begin, so that the optimizer's share is in it, unless something else than training lay between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from powerd.client import Client, JobLog, Span
from powerd_integrations.pipeline.place import Place
from powerd_integrations.pipeline.worker import Worker

BATCH = 10  # steps whose energy is asked for together
BASELINE, PROFILE = "baseline", "profile"  # plan names that a job's log knows: full clock, and a sweep


@dataclass(frozen=True, slots=True)
class Page:
    """One step of this rank, in nanoseconds of the node's clock."""

    step: int
    begin_ns: int
    end_ns: int
    plan: str
    clock_mhz: float | None


class Diary:
    """Steps of one rank on their way to the daemon."""

    def __init__(
        self, client: Client, job: str, place: Place, worker: Worker, first_step: int, uuid: Callable[[], str | None]
    ) -> None:
        self._client, self._job, self._worker, self._first, self._uuid = client, job, worker, first_step, uuid
        self._rank = (place.pipeline * place.tensors + place.tensor) * place.ranks + place.rank
        self._log: JobLog | None = None
        self._pages: list[Page] = []

    def begin(self, now_ns: int, straight_on: bool) -> None:
        """A step begins; ``straight_on``: nothing but training lies between it and the last one."""
        if self._pages and straight_on:
            self._pages[-1] = replace(self._pages[-1], end_ns=now_ns)
        if len(self._pages) >= BATCH:
            self._hand_in()

    def add(self, page: Page) -> None:
        """A step has ended."""
        self._pages.append(page)

    def close(self, why: str = "") -> None:
        """Training is over."""
        self._hand_in()
        self._worker.submit(lambda: self._end(why))

    def _hand_in(self) -> None:
        pages, self._pages = self._pages, []
        if pages:
            self._worker.submit(lambda: self._send(pages))

    def _send(self, pages: list[Page]) -> None:
        uuid = self._uuid()
        if uuid is None:
            return
        if self._log is None:
            self._log = JobLog(self._client, self._job, rank=self._rank, gpus=(uuid,))
            self._log.start()
            if self._first:
                self._log.restore(self._first)
        spans = [Span(str(page.step), page.begin_ns, page.end_ns) for page in pages if page.end_ns > page.begin_ns]
        energies = {label.label: label.energy_j for label in self._client.spans(uuid, spans).labels}
        for page in pages:
            number = self._first + page.step
            energy_j = energies.get(str(page.step))
            self._log.step(number, page.begin_ns, page.end_ns, energy_j=energy_j, clock_mhz=page.clock_mhz, plan=page.plan)

    def _end(self, why: str) -> None:
        if self._log is not None:
            self._log.end(why)
            self._log.close()
