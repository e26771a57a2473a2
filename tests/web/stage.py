"""What a person at the dashboard has: a node with powerd on it, `powerctl dashboard`, and a browser.

House rules: the browser is the distribution's Chromium, never a download of playwright's; the hour of history is written by the
store's own writer; whatever a page logs as an error, or raises, is kept.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import pytest

from powerd.config import StoreConfig
from powerd.model import Health, Reading, Snapshot
from powerd.sinks.writer import Writer
from tests.e2e.live import LiveNode, command

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request

WAIT_MS = 15_000
HOUR_S = 3600
SILENT_GPU, SILENT_S = 3, 600  # nobody sampled this GPU for ten minutes of the hour


def chromium() -> str:
    """Where Debian's Chromium is; skips the test without one, with CI=true fails it."""
    found = shutil.which("chromium")
    if found is None:
        reason = "no chromium (apt-get install --no-install-recommends chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium that asks nobody but loopback."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu", *quiet])
        try:
            yield made
        finally:
            made.close()


class Served:
    """`powerctl dashboard` as it runs for one person."""

    def __init__(self, live: LiveNode, *options: str) -> None:
        self.process = subprocess.Popen(
            command("powerctl", "dashboard", "--print-url", *options), env=live.env, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), self.url or self.process.stderr.read()
        self.port = int(self.url.split(":")[2].split("/")[0])

    def close(self) -> int:
        """End it as Ctrl-C does; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(10)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            self.process.communicate()


@contextlib.contextmanager
def served(live: LiveNode, *options: str) -> Iterator[Served]:
    """The dashboard of a node while the block runs."""
    made = Served(live, *options)
    try:
        yield made
    finally:
        made.close()


class Seen:
    """A page and everything that went wrong in it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("console", lambda m: self.errors.append(f"{m.text} ({m.location})") if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(f"pageerror: {error}"))
        page.on("requestfailed", self._failed)

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the page itself went on: it left the entrance, or closed its stream
            self.errors.append(f"{request.url}: {request.failure}")

    def enter(self, url: str) -> Seen:
        """Open the link and wait until live values are there."""
        self.page.set_default_timeout(WAIT_MS)
        self.page.goto(url)
        self.page.wait_for_selector("#link[data-state=live]")
        self.page.wait_for_selector("#gpu-table tbody tr .spark .v:not(.missing)")
        return self


@contextlib.contextmanager
def opened(chrome: Browser, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Seen]:
    """The dashboard in a fresh browser profile."""
    scheme: Literal["dark", "light"] = "dark" if dark else "light"
    context = chrome.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, service_workers="block")
    try:
        yield Seen(context.new_page()).enter(url)
    finally:
        context.close()


def fill_hour(live: LiveNode) -> None:
    """Give the node's store an hour of samples of every GPU at 1 Hz, through the store's own writer."""
    writer = Writer(live.state_dir / "history.sqlite", StoreConfig())
    uuids, end_s = live.uuids, int(time.time()) - 5
    for second in range(end_s - HOUR_S + 60, end_s):
        readings = tuple(
            Reading(
                uuid=uuid, time_ns=second * 10**9, health=Health.UP, epoch=1, energy_mj=second * 1000,
                power_mw=int(260_000 + 15_000 * gpu + 40_000 * math.sin(second / 90 + gpu)),
                sm_clock_mhz=1410 - 105 * (gpu % 4) - 90 * ((second // 120 + gpu) % 3), memory_clock_mhz=1215,
                temperature_c=int(52 + gpu + 5 * math.sin(second / 300)),
                utilization_percent=int(85 + 14 * math.sin(second / 45 + gpu)),
            )
            for gpu, uuid in enumerate(uuids)
            if gpu != SILENT_GPU or not 1200 <= end_s - second < 1200 + SILENT_S
        )  # fmt: skip
        writer.put(Snapshot(second, second * 10**9, second * 10**9, readings))
    writer.flush(60)
    assert writer.counts.dropped == 0, writer.counts
    assert not writer.counts.errors, writer.counts
