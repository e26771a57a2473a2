"""A replica's lease on its node: registered with the node's own powerd, which holds the lowest safe clock for it.

House rules: a node without powerd serves at full clocks, and it is said once; the lease ends with the replica's process, however
that ends, and is taken again when powerd comes back; nothing here raises into serving.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from powerd.client import Client
from powerd.errors import PowerdError
from powerd_integrations.fleet.settings import FleetSettings, GroupSection

if TYPE_CHECKING:
    from powerd.client.replica import Replica

log = logging.getLogger("powerd.ray_serve")


class NodeLease:
    """Registers one replica with the powerd of its node while it lives."""

    def __init__(self, settings: FleetSettings, row: GroupSection, name: str, metrics_url: str) -> None:
        self._name = name
        self._client: Client | None = None
        self._replica: Replica | None = None
        if not settings.service.powerd:
            return
        self._client = Client(settings.service.powerd_socket or None, on_error="log")
        slo, classes = settings.slo_of(row)
        try:
            self._replica = self._client.register_replica(
                name, pool=row.pool, metrics_url=metrics_url, ttft_s=slo.ttft_s, tbt_s=slo.tbt_s, classes=classes,
                tp=row.tp, profile=settings.engine.profile or None, chunk_tokens=settings.engine.chunk_tokens,
            )  # fmt: skip
        except PowerdError as error:
            log.warning("this node's powerd holds no clock for %s, it runs at full clock: %s", name, error)

    def clock_mhz(self) -> int:
        """Return the SM clock that powerd holds for the replica; 0: full, or not known."""
        if self._client is None or self._replica is None or not self._replica.held:
            return 0
        found = next((view.clock_mhz for view in self._client.replicas() if view.id == self._replica.id), None)
        return found or 0

    def close(self) -> None:
        """Give the lease back; returns when the clocks are undone."""
        if self._replica is not None:
            try:
                self._replica.release()
            except PowerdError as error:
                log.warning("the lease of %s was not given back: %s", self._name, error)
