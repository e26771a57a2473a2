"""Engines that nobody reports: found by name, scraped by the planner (vLLM or SGLang behind a Kubernetes service).

House rules: an engine is one address; one that does not answer, or answers garbage, keeps its last report, which ages until the
planner calls it gone; all targets are asked at once, so that one that hangs delays nobody.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from powerd_integrations.fleet import scrape
from powerd_integrations.fleet.published import Group
from powerd_policies.dynamollm.fleet import InstanceState

log = logging.getLogger("powerd.fleet")
WORKERS: Final = 32


class Targets:
    """Scrapes every engine of the groups that name targets."""

    def __init__(
        self,
        targets: Iterable[tuple[Group, tuple[str, ...]]],
        take: Callable[[Iterable[InstanceState]], None],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._targets = [(group, target) for group, names in targets for target in names]
        self._take, self._now_s = take, now_s
        self._before: dict[str, scrape.Page] = {}
        self._complained: set[str] = set()
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="powerd-scrape")

    def __bool__(self) -> bool:
        """Whether there is anything to scrape."""
        return bool(self._targets)

    def scrape(self) -> int:
        """Ask every engine once and hand on what they say; returns how many answered."""
        addresses = [(group, url) for group, target in self._targets for url in self._resolve(target)]
        found = [state for state in self._pool.map(lambda pair: self._one(*pair), addresses) if state is not None]
        self._take(found)
        self._before = {url: page for url, page in self._before.items() if any(url == known for _, known in addresses)}
        return len(found)

    def _resolve(self, target: str) -> list[str]:
        if not target.startswith("dns://"):
            return [target]
        host, _, port = target.removeprefix("dns://").rstrip("/").rpartition(":")
        try:
            rows = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            self._complain(target, error)
            return []
        self._complained.discard(target)
        return sorted({f"http://{f'[{row[4][0]}]' if ':' in str(row[4][0]) else row[4][0]}:{port}/metrics" for row in rows})

    def _one(self, group: Group, url: str) -> InstanceState | None:
        try:
            page = scrape.fetch(url, self._now_s())
            load = scrape.load_of(page, self._before.get(url))
        except (OSError, ValueError) as error:
            self._complain(url, error)
            return None
        self._complained.discard(url)
        self._before[url] = page
        return InstanceState(url.removeprefix("http://").removesuffix("/metrics"), group.pool, group.tp, 0, load=load)

    def _complain(self, who: str, error: Exception) -> None:
        if who not in self._complained:
            log.warning("%s tells nothing: %s", who, error)
            self._complained.add(who)
