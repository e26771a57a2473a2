"""One replica: starts an engine, waits until it is healthy, passes requests to it, reports it, drains it, ends it.

House rules: an engine never outlives its replica (`leash`); a request that an engine broke off is an error that the router can
retry, never a short answer; the node's powerd and the planner may be away: serving goes on and it is said once; a replica ends
with its engine, so that Serve replaces it and sends it nothing: one that went on refusing at once would draw all requests.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any, Final

from powerd_integrations.fleet import scrape
from powerd_integrations.fleet.reporter import InstanceReporter, PlannerLink
from powerd_integrations.fleet.settings import FleetSettings, GroupSection
from powerd_integrations.fleet.steering import AT, AVOID
from powerd_integrations.ray_serve.node import NodeLease
from powerd_policies.dynamollm.fleet import InstanceLoad, InstanceState, Phase

log = logging.getLogger("powerd.ray_serve")
POLL_S: Final = 0.1
ENDS_S: Final = 5.0  # an engine that is not well for so long, and does not end, is told of
PATHS: Final = ("/v1/completions", "/v1/chat/completions")


class EngineError(RuntimeError):
    """The engine did not start, is gone, or broke an answer off; the message says which."""


class EngineReplica:
    """Serves one engine; what Serve calls is ``generate``, ``record_autoscaling_stats`` and ``check_health``."""

    def __init__(self, settings: FleetSettings, row: GroupSection, token: str = "") -> None:
        self._settings, self._pool, self._tp = settings, row.pool, row.tp
        self.id = f"{row.group}-{uuid.uuid4().hex[:8]}"
        self._phase: Phase = "starting"
        self._load = InstanceLoad()
        self._page: scrape.Page | None = None
        self._read_s = time.monotonic()
        self._child: subprocess.Popen[bytes] | None = None
        self._session: Any = None  # aiohttp.ClientSession, made in Serve's loop
        self._metrics_url = ""
        self._url = self._start()
        self._metrics_url = self._metrics_url or f"{self._url}/metrics"
        self._wait_until_healthy()
        self._phase = "serving"
        self._node = NodeLease(settings, row, self.id, self._metrics_url)
        if self._child is not None:
            threading.Thread(target=self._end_with, args=(self._child,), name="powerd-engine", daemon=True).start()
        self._reporter = InstanceReporter(PlannerLink(settings.service.planner, token), self.state)

    # --- what Serve calls -----------------------------------------------------------------------------------------------------

    async def generate(self, path: str, body: dict[str, Any], headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """Yield who answers, then the answer as it comes; EngineError when it breaks off, so that somebody else is asked."""
        import aiohttp

        yield AT + self.id.encode()
        if self.id in headers.get(AVOID, "").split():
            return
        if path not in PATHS:
            raise EngineError(f"no {path}; there are {', '.join(PATHS)}")
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=self._settings.engine.request_timeout_s)
            # vLLM closes a connection that was idle for 5 s; a request that is sent at that moment would be taken for a failure.
            self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True))
        passed = {name: value for name, value in headers.items() if name != AVOID}
        try:
            async with self._session.post(self._url + path, json=body, headers=passed) as answer:
                if answer.status >= 500:
                    raise await self._broken(f"{self.id} answered {answer.status}: {(await answer.text())[:200]}")
                yield b"%d" % answer.status
                async for chunk in answer.content.iter_any():
                    yield chunk
        except (aiohttp.ClientError, TimeoutError) as error:
            raise await self._broken(f"{self.id} broke off: {type(error).__name__} {error}") from None

    async def _broken(self, what: str) -> EngineError:
        """Return the error to raise, at once where the engine is well.

        One that is not well is about to take this process with it. Who would refuse until then, at once and again, would use up
        every attempt of a request.
        """
        end_s = time.monotonic() + ENDS_S
        while self._phase == "serving" and time.monotonic() < end_s and not await asyncio.to_thread(self._well):
            await asyncio.sleep(POLL_S)
        return EngineError(what)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what Serve's autoscaler sees of this replica (``ctx.aggregated_metrics``)."""
        known = {
            "running": float(self._load.running),
            "queued": float(self._load.queued),
            "kv_used_ratio": self._load.kv_used_ratio,
            "output_tokens_per_s": self._load.output_tokens_per_s,
        }
        return {name: value for name, value in known.items() if value is not None}

    def check_health(self) -> None:
        """Raise EngineError when the engine is gone."""
        if self._child is not None and self._child.poll() is not None:
            raise EngineError(f"the engine of {self.id} ended with {self._child.returncode}")

    async def __del__(self) -> None:
        """Serve calls this when nothing runs here any more, before it ends the process."""
        self._phase = "draining"
        self._reporter.close()
        self._node.close()
        if self._session is not None:
            await self._session.close()
        self._stop()

    # --- the engine -----------------------------------------------------------------------------------------------------------

    def state(self) -> InstanceState:
        """Return what the planner is told; reads the engine's metrics."""
        now_s = time.monotonic()
        try:
            page = scrape.fetch(self._metrics_url, now_s)
            self._load, self._page, self._read_s = scrape.load_of(page, self._page), page, now_s
        except (OSError, ValueError) as error:
            log.debug("%s: its metrics cannot be read: %s", self.id, error)
        load = replace(self._load, age_s=time.monotonic() - self._read_s)
        return InstanceState(self.id, self._pool, self._tp, self._node.clock_mhz(), self._phase, load=load)

    def _start(self) -> str:
        engine = self._settings.engine
        port, metrics_port = _free_ports(2)
        if engine.metrics_url:
            self._metrics_url = engine.metrics_url.replace("{metrics_port}", str(metrics_port))
        if engine.url:
            return engine.url.rstrip("/")
        if not engine.command:
            raise EngineError("[engine] has neither a command nor a url")
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        fill = {"port": str(port), "metrics_port": str(metrics_port), "tp": str(self._tp), "pool": self._pool, "gpus": gpus,
                "id": self.id, "chunk_tokens": str(engine.chunk_tokens)}  # fmt: skip
        command = [_filled(word, fill) for word in engine.command]
        argv = [sys.executable, "-m", "powerd_integrations.ray_serve.leash", *command]
        self._child = subprocess.Popen(argv, stdin=subprocess.PIPE, env={**os.environ, **engine.env})
        return f"http://127.0.0.1:{port}"

    def _wait_until_healthy(self) -> None:
        end_s = time.monotonic() + self._settings.engine.start_timeout_s
        while not self._well():
            self.check_health()
            if time.monotonic() > end_s:
                self._stop()
                waited = f"{self._settings.engine.start_timeout_s:g} s"
                raise EngineError(f"the engine of {self.id} is not healthy after {waited}")
            time.sleep(POLL_S)

    def _well(self) -> bool:
        try:
            with urllib.request.urlopen(self._url + self._settings.engine.health, timeout=2.0):  # noqa: S310  (our engine)
                return True
        except OSError:
            return False

    def _end_with(self, child: subprocess.Popen[bytes]) -> None:
        code = child.wait()
        if self._phase == "serving":
            log.error("the engine of %s ended with %d: so does its replica, and Serve starts another", self.id, code)
            os._exit(1)  # Serve learns of it at once; what a health check finds comes some periods later

    def _stop(self) -> None:
        if self._child is None:
            return
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(10.0)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def _free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody uses now; all are held until all are found, so that they differ."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _filled(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace("{" + name + "}", value)
    return word
