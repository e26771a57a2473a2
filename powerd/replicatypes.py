"""Request and response types of inference replicas, shared by server and client.

House rules: as powerd.api, of which these are a part; a replica is a lease with a metrics page: its id is the lease's, and
heartbeat, attach and release are the lease's own.
"""

from __future__ import annotations

from dataclasses import dataclass

from powerd.api import LeaseView
from powerd.model import SloClass

ENGINES = ("auto", "vllm", "sglang")
#: Where a replica stands: no good page yet, controlled, controlled with nothing to do, or without pages that can be believed.
STATES = ("starting", "fresh", "idle", "stale")


@dataclass(frozen=True, slots=True)
class SloSpec:
    """What 99 of 100 are promised: seconds to the first token, and seconds between two tokens; None: nothing is.

    ``classes`` are promised a shorter TTFT, shortest prompts first: ``ttft_s`` is that of all longer ones. The seconds between
    two tokens are those of all, because all requests of an engine share its iterations.
    """

    ttft_s: float | None = None
    tbt_s: float | None = None
    classes: tuple[SloClass, ...] = ()

    @property
    def strictest_ttft_s(self) -> float | None:
        """The least TTFT that any prompt is promised."""
        return self.classes[0].ttft_s if self.classes else self.ttft_s


@dataclass(frozen=True, slots=True)
class ReplicaRequest:
    """``POST /v1/replicas``: hold the lowest clock that keeps this replica's SLO until released, expired or the holder dies."""

    name: str  # of this replica, on this node; the same user's earlier one of this name is replaced
    pool: str  # of alike replicas: one request class or several
    gpus: tuple[str, ...]  # UUIDs; all of them get one clock
    metrics_url: str  # http://127.0.0.1:8000/metrics or unix:/run/engine.sock:/metrics
    slo: SloSpec  # TTFT, by classes of prompts if wanted, or TBT, or both
    tp: int = 1
    engine: str = "auto"  # vllm, sglang, or auto: what the page turns out to be
    profile: str | None = None  # what the engine's speed and power are known by; None: only parks clocks when idle
    ttl_s: float | None = None  # None: the daemon's default
    detached: bool = False  # True: bound to TTL and heartbeat only, not to a connection
    chunk_tokens: int = 512  # prompt tokens of one iteration at most: vLLM's max_num_batched_tokens


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """``GET /v1/replicas``: one replica as it is now; what is not known is None. p99 figures are upper edges of buckets."""

    id: str
    name: str
    pool: str
    tp: int
    gpus: tuple[str, ...]
    state: str  # starting, fresh, idle, stale
    clock_mhz: int | None  # ceiling that its lease wants; None: full clock
    reason: str  # of that
    slo: SloSpec
    within_slo: bool | None = None  # of the requests of the window
    running: int | None = None
    waiting: int | None = None
    kv_used_ratio: float | None = None
    requests_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    output_tokens_per_s: float | None = None
    ttft_p50_s: float | None = None
    ttft_p99_s: float | None = None
    tbt_p50_s: float | None = None
    tbt_p99_s: float | None = None
    preemptions: int | None = None  # within the window
    age_s: float | None = None  # of the newest page that was believed
    power_w: float | None = None  # of all its GPUs
    energy_j: float | None = None  # likewise, over ``energy_window_s``
    energy_window_s: float = 0.0
    window_s: float = 0.0  # over which p99 is
    engine: str = "auto"
    profile: str | None = None
    user: str = ""
    static: bool = False  # from the configuration file
    note: str = ""  # what an operator should know: an SLO between bucket edges, why a page was not believed


@dataclass(frozen=True, slots=True)
class ReplicaGrant:
    """The answer to ``POST /v1/replicas``; ``lease`` carries the token."""

    replica: ReplicaView
    lease: LeaseView
