"""The client: every route of the API as a method, leases and energy windows as context managers.

House rules: standard library only; with ``on_error="log"`` nothing ever raises into a training step: one warning, a neutral
result, and the work goes on; times are seconds, controls are MHz and watts, GPUs leave here as UUIDs.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from powerd.api import (
    LEASE_TOKEN_HEADER,
    Ack,
    Explain,
    HistoryView,
    LeaseChange,
    LeaseRequest,
    LeaseView,
    NodeView,
    PlanRequest,
    PlanView,
    QuiesceRequest,
    SnapshotView,
    WantSpec,
    WindowBegin,
    WindowView,
)
from powerd.client import stream as _stream
from powerd.client.codec import encode, neutral
from powerd.client.jobcalls import JobCalls
from powerd.client.lease import Bounds, Lease, want_specs
from powerd.client.replica import ReplicaCalls
from powerd.client.transport import Transport, default_socket
from powerd.client.window import EnergyWindow
from powerd.errors import PowerdError, RequestError, UnavailableError
from powerd.model import ClockPlan, Event, Gpu, WantClass
from powerd.visible import device_minors, pick, visible

T = TypeVar("T")
Which = Literal["visible", "all"] | str | int | Sequence[str | int]
log = logging.getLogger("powerd.client")
_UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Client(JobCalls, ReplicaCalls):
    """A connection to one node's powerd; safe to share between threads and to carry over a fork.

    ``socket`` is a Unix socket (default: ``$POWERD_SOCKET``, this user's daemon, the system's); ``url`` with ``token_file``
    speaks TCP instead. ``on_error="raise"`` raises ``powerd.errors``; ``"log"`` warns once and answers neutrally.
    ``timeout_s`` bounds each exchange. ``server_uids`` refuses a server on the Unix socket that runs as anybody else.
    """

    def __init__(
        self,
        socket: str | Path | None = None,
        url: str | None = None,
        token_file: str | Path | None = None,
        *,
        on_error: Literal["raise", "log"] = "raise",
        timeout_s: float = 5.0,
        server_uids: Sequence[int] | None = None,
        ca_file: str | Path | None = None,
    ) -> None:
        if on_error not in ("raise", "log"):
            raise ValueError(f"on_error is 'raise' or 'log', not {on_error!r}")
        self.on_error = on_error
        self._lock = threading.Lock()
        self._warned = False
        self._gpus: tuple[Gpu, ...] = ()
        self._scale: float | None = None
        self._transport: Transport | None = None

        def connect() -> Transport:
            if socket is not None and url is not None:
                raise RequestError("give either a socket or a url, not both")
            token = None
            if token_file is not None:
                try:
                    token = Path(token_file).read_text(encoding="ascii").strip()
                except (OSError, ValueError) as error:
                    raise RequestError(f"cannot read the token file {token_file}: {error}") from error
            path = None if url is not None else Path(socket) if socket is not None else default_socket()
            uids = None if server_uids is None else tuple(server_uids)
            authority = None if ca_file is None else str(ca_file)
            return Transport(path, url, token, server_uids=uids, ca_file=authority, timeout_s=timeout_s)

        self._transport = self.guard("connect", connect, lambda: None)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close this thread's connection; leases live on in their own."""
        if self._transport is not None:
            self._transport.close()

    # -- how every call is made ------------------------------------------------------------------------------------------

    @property
    def transport(self) -> Transport:
        """The wire; UnavailableError when the client could not be set up."""
        if self._transport is None:
            raise UnavailableError("this client could not be set up: see its first warning")
        return self._transport

    def guard(self, what: str, action: Callable[[], T], otherwise: Callable[[], T]) -> T:
        """Do it; on failure raise, or with ``on_error="log"`` warn once and answer ``otherwise()``."""
        try:
            result = action()
        except Exception as error:
            if self.on_error == "raise":
                if isinstance(error, (PowerdError, TypeError)):
                    raise
                raise UnavailableError(f"{what}: {error or type(error).__name__}") from error
            self.warn(what, error)
            return otherwise()
        if self._warned and what != "connect":
            self._warned = False
            log.info("powerd answers again")
        return result

    def warn(self, what: str, error: Exception) -> None:
        """One warning when trouble begins; the rest of the same trouble is debug output."""
        with self._lock:
            level, self._warned = (logging.DEBUG if self._warned else logging.WARNING), True
        log.log(level, "powerd: %s failed and the job goes on without it: %s", what, error)

    def _ask(self, kind: type[T], what: str, method: str, path: str, body: object = None, **options: Any) -> T:
        def send() -> T:
            data = None if body is None else json.dumps(encode(body)).encode()
            headers = {"Content-Type": "application/json", **options.pop("headers", {})} if data else options.pop("headers", None)
            return self.transport.json(kind, method, path, body=data, headers=headers, **options)

        return self.guard(what, send, lambda: neutral(kind))

    def _patience(self, wait_s: float) -> float:
        return self.transport.timeout_s + max(0.0, wait_s)

    # -- reads -----------------------------------------------------------------------------------------------------------

    def healthz(self) -> Ack:
        """Whether the daemon is alive and fed with samples."""
        return self._ask(Ack, "healthz", "GET", "/healthz")

    def metrics(self) -> str:
        """The Prometheus page."""
        return self.guard("metrics", lambda: self.transport.text("GET", "/metrics"), str)

    def openapi(self) -> dict[str, Any]:
        """The API as the daemon describes it."""
        return self.guard("openapi", lambda: self.transport.json(dict[str, Any], "GET", "/openapi.json"), dict)

    def node(self) -> NodeView:
        """The node, its GPUs and what can be controlled."""
        return self._ask(NodeView, "node", "GET", "/v1/node")

    def snapshot(self) -> SnapshotView:
        """The newest reading of every GPU that this caller may see."""
        return self._ask(SnapshotView, "snapshot", "GET", "/v1/snapshot")

    def stream(self, *, hz: float | None = None, events_only: bool = False) -> Iterator[SnapshotView | Event]:
        """Snapshots and events as they come, until the caller stops or the daemon goes (UnavailableError; log: the end)."""
        return _stream.read(self, hz, events_only)

    def explain(self, gpu: str | int) -> Explain:
        """Why this GPU (UUID, prefix or index) is set as it is."""
        return self.guard(
            "explain",
            lambda: self.transport.json(Explain, "GET", f"/v1/explain/{self._pick([gpu])[0]}"),
            lambda: neutral(Explain),
        )

    def history(
        self,
        gpus: Which = "all",
        *,
        since: str | float | None = None,
        until: str | float | None = None,
        points: int | None = None,
        columns: Sequence[str] | None = None,
    ) -> HistoryView:
        """Stored samples between two Unix times in seconds (or ages such as ``15m``), at most ``points`` per GPU."""

        def ask() -> HistoryView:
            query = {
                "gpu": None if gpus == "all" else list(self.resolve(gpus)), "since": since, "until": until, "points": points,
                "columns": ",".join(columns) if columns else None,
            }  # fmt: skip
            return self.transport.json(HistoryView, "GET", "/v1/history", query=query)

        return self.guard("history", ask, lambda: neutral(HistoryView))

    def events(self, *, since: int | None = None, limit: int | None = None) -> tuple[Event, ...]:
        """Recent events, oldest first, after a sequence number."""
        query = {"since": since, "limit": limit}
        return self._ask(tuple[Event, ...], "events", "GET", "/v1/events", query=query)

    # -- GPUs ------------------------------------------------------------------------------------------------------------

    def resolve(self, gpus: Which = "visible") -> tuple[str, ...]:
        """UUIDs of: ``"visible"`` (to this process, of its LOCAL_RANK), ``"all"``, or indices, UUIDs and unique prefixes."""
        if gpus == "visible":
            found = visible(self._known(), device_minors=device_minors())
            if not found:
                raise RequestError(
                    "no GPU is visible to this process", hint="see CUDA_VISIBLE_DEVICES, or name the GPUs", code="unknown_gpu"
                )
            return found
        return self._pick([gpus] if isinstance(gpus, (str, int)) else gpus)

    def _pick(self, names: Sequence[str | int]) -> tuple[str, ...]:
        if not names:
            raise RequestError("no GPU named", hint="name at least one by index or UUID")
        if all(isinstance(name, str) and _UUID.fullmatch(name) for name in names):
            return tuple(dict.fromkeys(str(name) for name in names))
        return pick(self._known(), names)

    def _known(self) -> tuple[Gpu, ...]:
        if not self._gpus:  # who the GPUs are holds for the life of a driver load, longer than any training job
            self._gpus = tuple(c.gpu for c in self.transport.json(NodeView, "GET", "/v1/node").gpus)
        return self._gpus

    def time_scale(self) -> float:
        """Simulated seconds per real second of this node: 1 on real hardware, 0 when stepped."""
        if self._scale is None:
            scale = self.transport.json(NodeView, "GET", "/v1/node").time_scale
            self._scale = 1.0 if scale is None else scale
        return self._scale

    # -- leases ----------------------------------------------------------------------------------------------------------

    def lease(
        self,
        gpus: Which = "visible",
        *,
        sm_clock_mhz: Bounds = None,
        power_limit_w: Bounds = None,
        memory_clock_mhz: Bounds = None,
        reason: str = "",
        ttl_s: float | None = None,
        job: str | None = None,
        detached: bool = False,
        min_dwell_s: float | None = None,
        dry_run: bool = False,
        wait_s: float = 2.0,
        want_class: WantClass = WantClass.LEASE,
    ) -> Lease:
        """Acquire a lease and keep it alive until released, or until this process ends.

        Clocks in MHz: one number pins, ``(low, high)`` bounds (``None``: open). ``power_limit_w`` in watts is a ceiling.
        A detached lease outlives this process and ends by its TTL alone unless it is renewed. Of two wants that cannot both be
        served the one of the stronger ``want_class`` is (docs/decisions/0003-reconcile-rule.md).
        """

        def acquire() -> Lease:
            wants = want_specs(sm_clock_mhz, power_limit_w, memory_clock_mhz)
            request = LeaseRequest(
                gpus=self.resolve(gpus), wants=wants, reason=reason or "not stated", ttl_s=ttl_s, job=job,
                detached=detached or self.transport.socket_path is None, min_dwell_s=min_dwell_s, dry_run=dry_run, wait_s=wait_s,
                want_class=want_class,
            )  # fmt: skip
            return Lease.acquire(self, request, keep_alive=not detached)

        return self.guard("lease", acquire, lambda: Lease.inert(self))

    def leases(self) -> tuple[LeaseView, ...]:
        """All leases that this caller may see."""
        return self._ask(tuple[LeaseView, ...], "leases", "GET", "/v1/leases")

    def lease_view(self, lease_id: str) -> LeaseView:
        """One lease."""
        return self._ask(LeaseView, "lease", "GET", f"/v1/leases/{lease_id}")

    def lease_create(self, request: LeaseRequest) -> LeaseView:
        """``POST /v1/leases`` as it is: no attach, no heartbeat; ``lease()`` does these."""
        self.killpoint("client.lease.requested")
        view = self._ask(LeaseView, "lease", "POST", "/v1/leases", request, timeout_s=self._wait(request.wait_s))
        self.killpoint("client.lease.granted")
        return view

    def lease_change(self, lease_id: str, wants: Sequence[WantSpec], token: str | None = None, wait_s: float = 2.0) -> LeaseView:
        """Replace the wants of a live lease; LeaseLostError when it has ended."""
        body = LeaseChange(tuple(wants), wait_s)
        view = self._ask(
            LeaseView,
            "lease change",
            "PATCH",
            f"/v1/leases/{lease_id}",
            body,
            headers=_token(token),
            timeout_s=self._wait(wait_s),
        )
        self.killpoint("client.wants.changed")
        return view

    def lease_renew(self, lease_id: str, token: str | None = None) -> LeaseView:
        """Renew the TTL of a lease; LeaseLostError when it has ended."""
        return self._ask(LeaseView, "heartbeat", "POST", f"/v1/leases/{lease_id}/heartbeat", headers=_token(token))

    def lease_release(self, lease_id: str, token: str | None = None, wait_s: float = 10.0) -> LeaseView:
        """Release a lease; answers when its settings are undone, UnavailableError after the timeout plus ``wait_s``."""
        self.killpoint("client.release.before")
        return self._ask(
            LeaseView, "release", "DELETE", f"/v1/leases/{lease_id}", headers=_token(token), timeout_s=self._wait(wait_s)
        )

    def _wait(self, wait_s: float) -> float | None:
        return None if self._transport is None else self._patience(wait_s)

    def killpoint(self, name: str) -> None:
        """Die here if a test asked for it."""
        if self._transport is not None:
            self._transport.killpoint(name)

    # -- clock plans -----------------------------------------------------------------------------------------------------

    def plans(self, lease_id: str, token: str | None = None) -> tuple[PlanView, ...]:
        """The clock plans that are armed for a lease."""
        return self._ask(tuple[PlanView, ...], "plans", "GET", f"/v1/leases/{lease_id}/plans", headers=_token(token))

    def plan_arm(self, lease_id: str, plan: ClockPlan, token: str | None = None) -> PlanView:
        """``POST /v1/leases/{id}/plans`` as it is; ``Lease.arm`` takes the beat socket as well."""
        path, body = f"/v1/leases/{lease_id}/plans", PlanRequest(plan)
        return self._ask(PlanView, "clock plan", "POST", path, body, headers=_token(token), timeout_s=self._wait(5.0))

    def plan_disarm(self, lease_id: str, plan: str | int, token: str | None = None) -> Ack:
        """Give up the clock plans with this id, or the one with this number; RequestError when there is none."""
        return self._ask(
            Ack, "clock plan", "DELETE", f"/v1/leases/{lease_id}/plans/{quote(str(plan), safe='')}", headers=_token(token)
        )

    # -- energy ----------------------------------------------------------------------------------------------------------

    def energy(self, name: str = "", gpus: Which = "visible", *, job: str | None = None) -> EnergyWindow:
        """``with client.energy("step") as window: ...``; then ``window.energy_j`` with its bounds, measured by the daemon."""
        return EnergyWindow(self, name, gpus, job)

    def window_begin(self, gpus: Which = "visible", name: str = "", job: str | None = None) -> WindowView:
        """Begin an energy window on these GPUs."""
        return self.guard(
            "energy window",
            lambda: self.transport.json(
                WindowView, "POST", "/v1/windows",
                body=json.dumps(encode(WindowBegin(self.resolve(gpus), name, job))).encode(),
                headers={"Content-Type": "application/json"},
            ),
            lambda: neutral(WindowView),
        )  # fmt: skip

    def window_end(self, window_id: str, *, wait: bool = True) -> WindowView:
        """End an energy window: energy with its uncertainty; ``wait=False`` answers at once with a wider interval."""
        query = None if wait else {"wait": "0"}
        return self._ask(
            WindowView, "energy window", "POST", f"/v1/windows/{window_id}/end", query=query, timeout_s=self._wait(10.0)
        )

    # -- node ------------------------------------------------------------------------------------------------------------

    def panic(self) -> Ack:
        """Every GPU to baseline; wants are refused until ``resume``."""
        return self._ask(Ack, "panic", "POST", "/v1/panic", timeout_s=self._wait(20.0))

    def quiesce(self, *, max_s: float = 900.0, reason: str = "") -> Ack:
        """Baseline everywhere and every NVML handle closed for maintenance; ends by itself after ``max_s``."""
        return self._ask(Ack, "quiesce", "POST", "/v1/quiesce", QuiesceRequest(max_s, reason), timeout_s=self._wait(20.0))

    def resume(self) -> Ack:
        """End panic and quiesce."""
        return self._ask(Ack, "resume", "POST", "/v1/resume", timeout_s=self._wait(20.0))


def _token(token: str | None) -> dict[str, str]:
    return {} if token is None else {LEASE_TOKEN_HEADER: token}
