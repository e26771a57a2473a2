"""An inference replica as its launcher sees it: registered, kept alive, registered again after a loss, released.

House rules: as powerd.client.lease, whose threads keep it alive; losing the registration costs watts, never requests: the daemon
gives the GPUs their full clock back.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from powerd.client.background import start
from powerd.client.calls import Calls
from powerd.client.codec import neutral
from powerd.client.lease import Lease
from powerd.model import LeaseEnd, SloClass
from powerd.replicatypes import ReplicaGrant, ReplicaRequest, ReplicaView, SloSpec

if TYPE_CHECKING:
    from powerd.client.core import Client

T = TypeVar("T")
_LOOK_S = 1.0
_AGAIN_S = (1.0, 30.0)  # between two tries to register again


class Replica:
    """A registered replica; ``with`` releases it. Lost to a restart or a panic, it is registered again by itself."""

    def __init__(self, client: Client, request: Callable[[], ReplicaRequest]) -> None:
        self._client, self._request = client, request
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._lease, self.view = Lease.inert(client), neutral(ReplicaView)
        self._register()
        start(self._watch, "powerd-replica")

    def _register(self) -> None:
        def ask() -> None:
            grant = self._client.replica_create(self._request())
            if grant.lease.id:  # else a logging client's neutral answer: it has warned already
                self.view = grant.replica
                self._lease = Lease.keep(self._client, grant.lease, keep_alive=True)

        self._client.guard("replica", ask, lambda: None)

    @property
    def id(self) -> str:
        """The id of the replica and of its lease; empty when it was never registered, another one after a loss."""
        return self._lease.id

    @property
    def lease(self) -> Lease:
        """The lease that keeps it."""
        return self._lease

    @property
    def held(self) -> bool:
        """Whether it is, to the best of our knowledge, registered."""
        return self._lease.held

    def release(self) -> None:
        """Give it back and return when its clocks are undone."""
        self._stop.set()
        with self._lock:
            lease = self._lease
        lease.release()

    def __enter__(self) -> Replica:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        self._stop.set()
        with self._lock:
            lease = self._lease
        return lease.__exit__(kind, error, trace)

    def _watch(self) -> None:
        pause_s = _AGAIN_S[0]
        while not self._stop.wait(_LOOK_S):
            if self._lease.held:
                pause_s = _AGAIN_S[0]
                continue
            if self._lease.lost_reason.endswith(LeaseEnd.DRIFT):
                return  # somebody else sets these clocks and the operator lets them: no contest
            try:
                with self._lock:
                    if not self._stop.is_set():
                        self._register()
            except Exception as error:
                self._client.warn("replica", error)
            if not self._lease.held and self._stop.wait(pause_s):
                return
            pause_s = min(_AGAIN_S[1], pause_s * 2)


class ReplicaCalls(Calls):
    """What a Client does for inference replicas."""

    @abstractmethod
    def resolve(self, gpus: Any = "visible") -> tuple[str, ...]: ...

    def replicas(self) -> tuple[ReplicaView, ...]:
        """Inference replicas that this caller may see."""
        return self._ask(tuple[ReplicaView, ...], "replicas", "GET", "/v1/replicas")

    def replica_create(self, request: ReplicaRequest) -> ReplicaGrant:
        """``POST /v1/replicas`` as it is: no attach, no heartbeat; ``register_replica`` does these."""
        return self._ask(ReplicaGrant, "replica", "POST", "/v1/replicas", request)

    def register_replica(
        self,
        name: str,
        *,
        pool: str,
        metrics_url: str,
        ttft_s: float | None = None,
        tbt_s: float | None = None,
        classes: Mapping[int, float] | None = None,
        gpus: str | int | Sequence[str | int] = "visible",
        tp: int | None = None,
        engine: str = "auto",
        profile: str | None = None,
        chunk_tokens: int = 512,
        ttl_s: float | None = None,
    ) -> Replica:
        """Have the daemon hold the lowest clock at which this replica keeps its SLO, until released or this process ends.

        ``ttft_s`` seconds are promised to the first token and ``tbt_s`` between two; at least one of them, so that an engine that
        only prefills or only decodes is held to what it does. ``classes`` are shorter prompts that are promised a shorter TTFT:
        prompt tokens, at most -> seconds.
        ``tp`` is the number of GPUs unless said otherwise, ``chunk_tokens`` what one iteration computes of prompts at most.
        Raises RequestError for what is wrong with it, UnavailableError without a daemon; with ``on_error="log"`` it warns, and
        the replica runs at full clock until a daemon is there.
        """

        def request() -> ReplicaRequest:
            uuids = self.resolve(gpus)
            slo = SloSpec(ttft_s, tbt_s, tuple(SloClass(tokens, each_s) for tokens, each_s in sorted((classes or {}).items())))
            return ReplicaRequest(
                name, pool, uuids, metrics_url, slo, tp or len(uuids), engine, profile, ttl_s,
                detached=self.transport.socket_path is None, chunk_tokens=chunk_tokens,
            )  # fmt: skip

        return Replica(cast("Client", self), request)
