"""The routes of the API as data: the server is made from them, and so are OpenAPI and docs/api.md.

House rules: stdlib only; a row per method and path; a row is never taken away within a major version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from powerd.api import (
    MAX_BODY_BYTES,
    Ack,
    Explain,
    HistoryView,
    JobEvent,
    JobView,
    LeaseChange,
    LeaseRequest,
    LeaseView,
    NodeView,
    PlanRequest,
    PlanView,
    QuiesceRequest,
    SnapshotView,
    SpansRequest,
    SpansView,
    WindowBegin,
    WindowView,
)
from powerd.model import Event
from powerd.records import HostLoad, JobStepRow, LeaseRow
from powerd.replicatypes import ReplicaGrant, ReplicaRequest, ReplicaView


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the API."""

    method: str
    path: str
    name: str
    summary: str
    request: type | None = None
    response: type | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    many: bool = False  # the response is a JSON array of ``response``
    media: str = "application/json"
    max_body_bytes: int = MAX_BODY_BYTES


ROUTES: tuple[Route, ...] = (
    Route("GET", "/healthz", "healthz", "Alive and fed with samples; no permission needed", response=Ack),
    Route("GET", "/metrics", "metrics", "Prometheus page", media="text/plain"),
    Route("GET", "/metrics/dcgm", "dcgm", "The same GPUs as dcgm-exporter names them; off unless metrics.dcgm is set",
          media="text/plain"),
    Route("GET", "/openapi.json", "openapi", "This API as OpenAPI 3.1"),
    Route("GET", "/v1/node", "node", "The node, its GPUs and what can be controlled", response=NodeView),
    Route("GET", "/v1/node/load", "node_load", "CPU and memory of the host, whose processes are on the GPUs", response=HostLoad),
    Route("GET", "/v1/snapshot", "snapshot", "The newest reading of every GPU the caller may see", response=SnapshotView),
    Route("GET", "/v1/stream", "stream", "Server-sent events: snapshot, event, heartbeat; id = sequence number",
          query={"hz": "snapshots per second, at most the sampling rate", "events": "only events when 1"},
          media="text/event-stream"),
    Route("GET", "/v1/leases", "leases", "Leases the caller may see", response=LeaseView, many=True),
    Route("POST", "/v1/leases", "lease_create", "Acquire a lease", request=LeaseRequest, response=LeaseView),
    Route("GET", "/v1/leases/{id}", "lease", "One lease", response=LeaseView),
    Route("PATCH", "/v1/leases/{id}", "lease_change", "Replace its wants", request=LeaseChange, response=LeaseView),
    Route("POST", "/v1/leases/{id}/heartbeat", "lease_heartbeat", "Renew its TTL", response=LeaseView),
    Route("DELETE", "/v1/leases/{id}", "lease_release", "Release it; answers when the settings are undone", response=LeaseView),
    Route("GET", "/v1/leases/{id}/plans", "plans", "Its clock plans", response=PlanView, many=True),
    Route("POST", "/v1/leases/{id}/plans", "plan_arm", "Arm a clock plan; its beat socket comes on the attach connection",
          request=PlanRequest, response=PlanView, max_body_bytes=1 << 20),
    Route("DELETE", "/v1/leases/{id}/plans/{plan}", "plan_disarm", "Give it up, by id or number", response=Ack),
    Route("GET", "/v1/explain/{uuid}", "explain", "Why this GPU is set as it is", response=Explain),
    Route("POST", "/v1/windows", "window_begin", "Begin an energy window", request=WindowBegin, response=WindowView),
    Route("POST", "/v1/windows/{id}/end", "window_end", "End it and answer the energy with its uncertainty",
          response=WindowView, query={"wait": "0: answer at once with a wider interval; default: wait for the closing sample"}),
    Route("POST", "/v1/energy/spans", "energy_spans", "What each kind of work on one GPU used, after the fact",
          request=SpansRequest, response=SpansView, max_body_bytes=4 << 20),
    Route("GET", "/v1/jobs", "jobs", "Training jobs the caller may see, newest first", response=JobView, many=True),
    Route("GET", "/v1/jobs/{job}", "job", "One job", response=JobView),
    Route("GET", "/v1/jobs/{job}/steps", "job_steps", "Its kept steps, oldest first; the newest `limit` of them",
          response=JobStepRow, many=True, query={"limit": "at most, 1 to 100000; default 10000"}),
    Route("POST", "/v1/jobs/{job}/events", "job_event", "What a job's rank reports of itself", request=JobEvent, response=Ack,
          max_body_bytes=1 << 20),
    Route("POST", "/v1/perseus/plan", "perseus_plan", "Plan a pipeline's clocks: a job with its profile rows in, a plan out",
          max_body_bytes=8 << 20),
    Route("GET", "/v1/replicas", "replicas", "Inference replicas the caller may see", response=ReplicaView, many=True),
    Route("POST", "/v1/replicas", "replica_create", "Register one; heartbeat, attach and release are those of its lease",
          request=ReplicaRequest, response=ReplicaGrant),
    Route("GET", "/v1/history", "history", "Stored samples", response=HistoryView,
          query={"gpu": "UUID, repeatable", "since": "Unix seconds or 15m/2h/7d ago", "until": "likewise", "points": "at most",
                 "columns": "comma separated"}),
    Route("GET", "/v1/history/node", "history_node", "Stored load and energy of the host", response=HostLoad, many=True,
          query={"since": "Unix seconds or 15m/2h/7d ago", "until": "likewise", "points": "at most, 1 to 10000"}),
    Route("GET", "/v1/history/leases", "history_leases", "Leases that were, newest first", response=LeaseRow, many=True,
          query={"since": "last changed: Unix seconds or 15m/2h/7d ago", "until": "likewise", "limit": "at most, 1 to 10000"}),
    Route("GET", "/v1/events", "events", "Recent events", response=Event, many=True,
          query={"since": "sequence number", "limit": "at most"}),
    Route("POST", "/v1/panic", "panic", "Every GPU to baseline, refuse wants until resume", response=Ack),
    Route("POST", "/v1/quiesce", "quiesce", "Close every NVML handle for maintenance", request=QuiesceRequest, response=Ack),
    Route("POST", "/v1/resume", "resume", "End panic and quiesce", response=Ack),
)  # fmt: skip
