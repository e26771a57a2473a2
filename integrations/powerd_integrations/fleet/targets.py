"""Engines that nobody reports: found by name, scraped by the planner (vLLM or SGLang behind a Kubernetes service).

House rules: an engine is one address; one that does not answer, or answers garbage, keeps its last report, which ages until the
planner calls it gone; all targets are asked at once, so that one that hangs delays nobody.
"""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from powerd_integrations.fleet import scrape
from powerd_integrations.fleet.observed import Arrivals
from powerd_integrations.fleet.published import Group
from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.fleet import ClassLoad, InstanceState

log = logging.getLogger("powerd.fleet")
WORKERS: Final = 32


class Targets:
    """Scrapes every engine of the groups that name targets."""

    def __init__(
        self,
        targets: Iterable[tuple[Group, tuple[str, ...]]],
        take: Callable[[Iterable[InstanceState]], None],
        now_s: Callable[[], float] = time.monotonic,
        count: Callable[[Arrivals], object] | None = None,
    ) -> None:
        self._targets = [(group, target) for group, names in targets for target in names]
        self._take, self._now_s, self._count = take, now_s, count
        self._name, self._sequence = f"engines-{uuid.uuid4().hex[:12]}", 0
        self._before: dict[str, scrape.Page] = {}
        self._newest: dict[str, scrape.Page] = {}
        self._complained: set[str] = set()
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="powerd-scrape")

    def __bool__(self) -> bool:
        """Whether there is anything to scrape."""
        return bool(self._targets)

    def look(self) -> int:
        """Ask every engine once and hand on what they say; returns how many answered.

        With ``count``, what they finished stands for what arrived: late by the length of an answer, and of the pool's class.
        """
        addresses = [(group, url) for group, target in self._targets for url in self._resolve(target)]
        before = self._before
        found = [state for state in self._pool.map(lambda pair: self._one(*pair), addresses) if state is not None]
        self._take(found)
        if self._count is not None:
            self._sequence += 1
            self._count(Arrivals(self._name, self._sequence, self._finished(addresses, before)))
        known = {url for _, url in addresses}
        self._before = {url: page for url, page in self._newest.items() if url in known}
        self._newest = dict(self._before)
        return len(found)

    def _finished(self, addresses: list[tuple[Group, str]], before: dict[str, scrape.Page]) -> dict[str, ClassLoad]:
        """What engines finished since the last look, as load of the class that their pool is named after."""
        classes: dict[str, ClassLoad] = {}
        for group, url in addresses:
            page, old = self._newest.get(url), before.get(url)
            figures = None if page is None or page is old else scrape.finished_since(page, old)
            if figures is not None:
                name = group.pool if group.pool in NAMES else NAMES[-1]
                had = classes.get(name, ClassLoad())
                requests, prompt, output = figures
                classes[name] = ClassLoad(had.requests + requests, had.prompt_tokens + prompt, had.output_tokens + output)
        return classes

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
        self._newest[url] = page
        return InstanceState(url.removeprefix("http://").removesuffix("/metrics"), group.pool, group.tp, 0, load=load)

    def _complain(self, who: str, error: Exception) -> None:
        if who not in self._complained:
            log.warning("%s tells nothing: %s", who, error)
            self._complained.add(who)
