"""The clocks of a fleet's replicas on this node, held by its powerd: as a plan says, or as the daemon finds right by itself.

House rules: whoever asks is never in the way of a request: without powerd the GPUs run at full clock; the daemon's answer is
awaited in a thread; what is held ends with the replica, and with this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from powerd.client import Client, Lease
from powerd.client.replica import Replica
from powerd_integrations.fleet.launcher import Handle
from powerd_policies.dynamollm.classes import PromptSlo, Slo
from powerd_policies.dynamollm.fleet import InstanceWant


class Clocks(Protocol):
    """Whoever holds the clocks of a replica's GPUs, such as the daemon's replica manager or a lease."""

    async def hold(self, handle: Handle, want: InstanceWant) -> None:
        """Take care of a replica from now on, or of another clock."""

    def holds(self, handle: Handle) -> bool:
        """Whether what was held last is still in force, to the best of our knowledge."""

    async def release(self, handle: Handle) -> None:
        """The replica has ended."""


class LeaseClocks:
    """Holds every replica at the clock that the plan says, by a lease with that ceiling."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._leases: dict[str, Lease] = {}

    async def hold(self, handle: Handle, want: InstanceWant) -> None:
        """Set or change the ceiling; PowerdError when that is refused."""
        lease = self._leases.get(handle.id)
        if lease is not None and lease.held:
            await asyncio.to_thread(lease.change, sm_clock_mhz=(None, want.clock_mhz), wait_s=0.0)
        else:
            self._leases[handle.id] = await asyncio.to_thread(
                self._client.lease, list(handle.gpus), sm_clock_mhz=(None, want.clock_mhz), min_dwell_s=0.0, wait_s=0.0,
                reason=f"replica {handle.id}: {want.reason}"[:200],
            )  # fmt: skip

    def holds(self, handle: Handle) -> bool:
        """Whether its lease lives."""
        lease = self._leases.get(handle.id)
        return lease is not None and lease.held

    async def release(self, handle: Handle) -> None:
        """Give the lease back."""
        if (lease := self._leases.pop(handle.id, None)) is not None:
            await asyncio.to_thread(lease.release)


class ReplicaClocks:
    """Registers every replica with the daemon's instance manager, which reads its metrics and holds the lowest safe clock.

    ``slos`` by pool, for all its prompts; those of other pools are promised ``default``, and shorter prompts of them ``classes``.
    ``profile`` is what the daemon knows the engine by; ``chunk_tokens`` are the prompt tokens of one iteration, the launcher's.
    """

    def __init__(
        self, client: Client, profile: str, slos: Mapping[str, Slo], default: Slo, classes: Sequence[PromptSlo] = (),
        chunk_tokens: int = 512,
    ) -> None:  # fmt: skip
        self._client, self._profile, self._slos, self._default = client, profile, slos, default
        self._chunk_tokens = chunk_tokens
        self._classes = {each.max_prompt_tokens: each.ttft_s for each in classes if each.max_prompt_tokens is not None}
        self._replicas: dict[str, tuple[str, Replica]] = {}  # id -> pool as registered

    async def hold(self, handle: Handle, want: InstanceWant) -> None:
        """Register the replica, anew when it serves another pool; the plan's clock is the daemon's to find."""
        had = self._replicas.get(handle.id)
        if had is not None and had[0] == want.pool:
            return
        slo = self._slos.get(want.pool, self._default)
        replica = await asyncio.to_thread(
            self._client.register_replica, handle.id, pool=want.pool, metrics_url=handle.metrics_url, ttft_s=slo.ttft_s,
            tbt_s=slo.tbt_s, classes={} if want.pool in self._slos else self._classes, gpus=list(handle.gpus), tp=want.tp,
            profile=self._profile, chunk_tokens=self._chunk_tokens,
        )  # fmt: skip
        self._replicas[handle.id] = (want.pool, replica)

    def holds(self, handle: Handle) -> bool:
        """Whether it was registered; a registration that is lost renews itself."""
        return handle.id in self._replicas

    async def release(self, handle: Handle) -> None:
        """Release the replica."""
        if (had := self._replicas.pop(handle.id, None)) is not None:
            await asyncio.to_thread(had[1].release)
