"""Tells a planner what a router counted and what an instance does, once a second, from a thread of its own.

House rules: whoever serves requests never waits for the planner; a report that did not arrive is sent again as it was, under the
same number, so that nothing is counted twice or lost; what cannot be sent is said once, not every second.
"""

from __future__ import annotations

import json
import logging
import threading
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Final
from urllib.parse import quote

from powerd_integrations.fleet.observed import Waited, instance_to_json
from powerd_policies.dynamollm.fleet import ClassLoad, InstanceState

log = logging.getLogger("powerd.fleet")
TIMEOUT_S: Final = 2.0


class PlannerLink:
    """The way to a planner; says once when it is away and once when it is back."""

    def __init__(self, url: str, token: str = "") -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"a planner's URL begins with http:// or https://, not {url!r}")
        self._url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._away = False

    def send(self, method: str, path: str, body: Any = None) -> bool:
        """Send one report; whether it arrived."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, self._headers, method=method)  # noqa: S310  (scheme checked above)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
                answer.read()
        except OSError as error:
            if not self._away:
                log.warning("the planner at %s does not take reports (%s); it is told again every second", self._url, error)
            self._away = True
            return False
        if self._away:
            log.warning("the planner at %s takes reports again", self._url)
        self._away = False
        return True


class ArrivalCounter:
    """Counts a router's requests by class and reports them; may be used from any thread."""

    def __init__(self, link: PlannerLink, router: str = "", period_s: float = 1.0) -> None:
        self._link = link
        self._router = router or f"router-{uuid.uuid4().hex[:12]}"
        self._lock = threading.Lock()
        self._counts: dict[str, ClassLoad] = {}
        self._called_back: dict[str, Counter[str]] = {"resteered": Counter(), "rejected": Counter()}
        self._pending: dict[str, Any] | None = None
        #: What waits at each instance now; asked for in the reporter's thread.
        self.waiting: Callable[[], Mapping[str, Waited]] = dict
        self._sequence = 0
        self._loop = Periodic(self.report, period_s, "powerd-arrivals")

    def count(self, request_class: str, prompt_tokens: int, output_tokens: int) -> None:
        """Count a request that arrived now; ``output_tokens`` as predicted."""
        with self._lock:
            had = self._counts.get(request_class, ClassLoad())
            self._counts[request_class] = ClassLoad(
                had.requests + 1, had.prompt_tokens + prompt_tokens, had.output_tokens + output_tokens
            )

    def called_back(self, instance: str, call: str) -> None:
        """Count a waiting request that was called back from an instance: ``resteer`` or ``shed``."""
        with self._lock:
            self._called_back["resteered" if call == "resteer" else "rejected"][instance] += 1

    def report(self) -> bool:
        """Send what was counted, or what did not arrive the last time; also when it is nothing: no load is news too."""
        waiting = {name: asdict(waits) for name, waits in self.waiting().items()}
        with self._lock:
            if self._pending is None:
                self._sequence += 1
                classes = {
                    name: {"requests": n.requests, "prompt_tokens": n.prompt_tokens, "output_tokens": n.output_tokens}
                    for name, n in self._counts.items()
                }
                self._pending = {"router": self._router, "sequence": self._sequence, "classes": classes}
                self._pending |= {what: dict(counts) for what, counts in self._called_back.items()}
                self._counts, self._called_back = {}, {what: Counter() for what in self._called_back}
            body = self._pending = {**self._pending, "waiting": waiting}
        arrived = self._link.send("POST", "/v1/arrivals", body)
        if arrived:
            with self._lock:
                self._pending = None
        return arrived

    def close(self) -> None:
        """Stop reporting, after one last report."""
        self._loop.close()
        self.report()


class InstanceReporter:
    """Reports one instance's state every ``period_s`` until closed; then says goodbye."""

    def __init__(self, link: PlannerLink, state: Callable[[], InstanceState], period_s: float = 1.0) -> None:
        self._link, self._state = link, state
        self._name = state().id
        self._loop = Periodic(self.report, period_s, "powerd-instance")

    def report(self) -> bool:
        """Send the state as it is now."""
        return self._link.send("POST", "/v1/instances", {"instances": [instance_to_json(self._state())]})

    def close(self) -> None:
        """Say goodbye: the planner forgets this instance at once."""
        self._loop.close()
        self._link.send("DELETE", f"/v1/instances/{quote(self._name, safe='')}")


class Periodic:
    """Calls something every so often in a thread of its own; an exception is logged and does not end it."""

    def __init__(self, action: Callable[[], object], period_s: float, name: str) -> None:
        self._action, self._period_s = action, period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                self._action()
            except Exception:
                log.exception("a report failed")
            if self._stop.wait(self._period_s):
                return

    def close(self) -> None:
        """End after the call that runs."""
        self._stop.set()
        self._thread.join(TIMEOUT_S + 1.0)
