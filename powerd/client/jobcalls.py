"""The client's calls for training jobs: energy spans, what a job reports of itself, and plans made by the daemon.

House rules: as powerd.client.core, of whose Client these are a part.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar
from urllib.parse import quote

from powerd.api import Ack, JobEvent, JobView, Span, SpansRequest, SpansView
from powerd.client.calls import Calls
from powerd.client.codec import encode, neutral
from powerd.client.nodetime import node_now_ns
from powerd.records import HostLoad, JobStepRow, LeaseRow

T = TypeVar("T")


class JobCalls(Calls):
    """What a Client does for jobs."""

    def now_ns(self) -> int:
        """The node's CLOCK_BOOTTIME in nanoseconds, by which spans and steps are stamped; a microsecond, no exchange."""
        return node_now_ns()

    def spans(self, uuid: str, spans: Sequence[Span], *, wait: bool = True) -> SpansView:
        """What each kind of work on one GPU used, after the fact; ``wait`` for the sample that closes the last span."""
        body = SpansRequest(uuid, tuple(spans), wait)
        return self._ask(SpansView, "energy spans", "POST", "/v1/energy/spans", body, timeout_s=self._wait(10.0))

    def job_event(self, job: str, event: JobEvent) -> Ack:
        """Report something of a training job; ``powerd.client.JobLog`` does so without making anybody wait."""
        return self.guard("job event", lambda: self.job_event_strict(job, event), lambda: neutral(Ack))

    def job_event_strict(self, job: str, event: JobEvent, timeout_s: float | None = None) -> Ack:
        """The same, and raises whatever is wrong: for a thread that keeps what was not taken."""
        body, headers = json.dumps(encode(event)).encode(), {"Content-Type": "application/json"}
        path = f"/v1/jobs/{quote(job, safe='')}/events"
        return self.transport.json(Ack, "POST", path, body=body, headers=headers, timeout_s=timeout_s)

    def jobs(self) -> tuple[JobView, ...]:
        """Training jobs that this caller may see, newest first."""
        return self._ask(tuple[JobView, ...], "jobs", "GET", "/v1/jobs")

    def job(self, job: str) -> JobView:
        """One training job: time, energy, goodput and saving."""
        return self._ask(JobView, "job", "GET", f"/v1/jobs/{quote(job, safe='')}")

    def job_steps(self, job: str, *, limit: int = 10_000) -> tuple[JobStepRow, ...]:
        """Its newest kept steps, oldest first."""

        def ask() -> tuple[JobStepRow, ...]:
            path = f"/v1/jobs/{quote(job, safe='')}/steps"
            return self.transport.json(tuple[JobStepRow, ...], "GET", path, query={"limit": limit}, timeout_s=self._wait(30.0))

        return self.guard("job steps", ask, tuple)

    def past_leases(
        self, *, since: str | float = "24h", until: str | float | None = None, limit: int = 1000
    ) -> tuple[LeaseRow, ...]:
        """Leases that changed in this time, newest first, those that have ended too."""

        def ask() -> tuple[LeaseRow, ...]:
            query = {"since": since, "until": until, "limit": limit}
            return self.transport.json(tuple[LeaseRow, ...], "GET", "/v1/history/leases", query=query)

        return self.guard("past leases", ask, tuple)

    def node_history(
        self, *, since: str | float = "15m", until: str | float | None = None, points: int = 500
    ) -> tuple[HostLoad, ...]:
        """The host's stored load and energy, oldest first."""

        def ask() -> tuple[HostLoad, ...]:
            query = {"since": since, "until": until, "points": points}
            return self.transport.json(tuple[HostLoad, ...], "GET", "/v1/history/node", query=query)

        return self.guard("node history", ask, tuple)

    def node_load(self) -> HostLoad:
        """CPU and memory of the host, and whose processes are on the GPUs."""
        return self._ask(HostLoad, "node load", "GET", "/v1/node/load")

    def perseus_plan(self, job: dict[str, Any]) -> dict[str, Any]:
        """The clocks of a pipeline job planned by the daemon, for a training image without solvers; a minute at most.

        ``job`` is a JOB.json (docs/perseus.md) with ``profile_rows`` instead of ``profile``, and ``deadline``.
        """

        def ask() -> dict[str, Any]:
            headers = {"Content-Type": "application/json"}
            return self.transport.json(
                dict[str, Any], "POST", "/v1/perseus/plan", body=json.dumps(encode(job)).encode(), headers=headers,
                timeout_s=self._wait(130.0),
            )  # fmt: skip

        return self.guard("plan", ask, dict)
