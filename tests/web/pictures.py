"""`python -m tests.web.pictures [FOLDER]`: the pictures of the dashboard in docs/pictures, from a simulated node.

House rules: everything in them comes from a running powerd; what is simulated says so in the picture itself, and of the engines
behind replicas, whose pages are made up here, the page that shows the picture.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from dataclasses import replace
from pathlib import Path

from PIL import Image

from powerd.client import Client, JobLog
from powerd.model import ClockPlan
from powerd.replicatypes import ReplicaRequest, ReplicaView, SloSpec
from tests.e2e.live import LiveNode, wait_for
from tests.replicas.engine import Endpoint, Engine
from tests.web.stage import browser, fill_hour, opened, served

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "pictures"
#: A pipeline stage's clocks, forward and backward of eight microbatches: slower where it would only wait.
CLOCKS_MHZ = (1410, 1410, 1290, 1215) + (1110, 1305) * 8 + (1215, 1290, 1410, 1410)


def report_job(client: Client, uuids: list[str]) -> None:
    """Steps of a job that measured itself at full clock first and under a plan afterwards."""
    log, now_ns = JobLog(client, "gpt-pipeline", gpus=uuids, interval_s=0.05), client.now_ns()
    log.start()
    for step in range(40):
        begin_ns = now_ns - (40 - step) * 10**9
        plan, energy_j, clock_mhz = ("baseline", 2310.0, 1410.0) if step < 10 else ("p-12", 1990.0 + step % 3, 1200.0)
        log.step(step, begin_ns, begin_ns + 10**9, energy_j=energy_j, clock_mhz=clock_mhz, plan=plan)
    wait_for("the job is known", lambda: any(job.steps == 40 for job in client.jobs()))


class Scripted:
    """An engine that answers requests whenever somebody looks."""

    def __init__(self, running: int, waiting: int, rate: float, ttft_s: float, gap_s: float) -> None:
        engine = Engine(running=running, waiting=waiting, kv=0.02 * running)
        self.endpoint, plain, requests = Endpoint(engine), engine.page, round(rate)

        def page() -> str:
            engine.prompt_tokens += 300 * requests
            engine.output_tokens += 40 * requests
            engine.ttft += [ttft_s * (0.6 + 0.5 * (n % 10) / 10) for n in range(requests)]
            engine.gaps += [gap_s * (0.7 + 0.3 * (n % 8) / 8) for n in range(40 * requests)]
            return plain()

        engine.page = page  # type: ignore[method-assign]


def inference(live: LiveNode, stack: contextlib.ExitStack) -> None:
    """Pool chat: well, idle, behind its SLO, without a page any more; pool code: one replica of four GPUs, at a lower clock."""
    served = {
        "chat-0": Scripted(11, 0, 4, 0.2, 0.04), "chat-1": Scripted(0, 0, 0, 0.2, 0.04), "chat-2": Scripted(48, 9, 7, 1.2, 0.14),
        "chat-3": Scripted(5, 0, 2, 0.2, 0.04), "code-0": Scripted(4, 0, 1, 0.2, 0.04),
    }  # fmt: skip
    for first, (name, one) in enumerate(served.items()):
        stack.callback(one.endpoint.close)
        tp, profile = (4, "llama2-70b_h100") if name == "code-0" else (1, None)
        gpus = tuple(live.uuids[first : first + tp])
        request = ReplicaRequest(name, name[:4], gpus, one.endpoint.url, SloSpec(0.5, 0.1), tp=tp, profile=profile, detached=True)
        live.client.replica_create(replace(request, ttl_s=3600.0))
        if name != "chat-1":
            for gpu in range(first, first + tp):
                stack.enter_context(live.load(gpu, 0.5))

    def seen() -> dict[str, ReplicaView]:
        return {view.name: view for view in live.client.replicas()}

    wait_for("chat-2 is judged", lambda: seen()["chat-2"].within_slo is False, 60)
    wait_for("code-0 is held", lambda: seen()["code-0"].clock_mhz is not None, 60)
    wait_for("chat-3 is followed", lambda: seen()["chat-3"].state == "fresh", 60)
    served["chat-3"].endpoint.close()
    wait_for("chat-3 is stale", lambda: seen()["chat-3"].state == "stale", 60)
    wait_for("chat-1 is parked", lambda: seen()["chat-1"].state == "idle", 60)


def save(png: bytes, path: Path) -> None:
    """Write a screenshot with as few colours as it needs: a third of the bytes."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size, "bytes")


def pools(folder: Path) -> None:
    """Write dashboard-pools.png."""
    with LiveNode(gpus=8, model="h100-sxm") as live, browser() as chrome, contextlib.ExitStack() as stack:
        inference(live, stack)
        with served(live) as page_server, opened(chrome, page_server.url, width=1600, height=900) as seen:
            seen.page.wait_for_selector("#replica-table tbody tr:nth-child(5)")
            seen.page.wait_for_timeout(60_000)  # the lines of a minute
            save(seen.page.locator("#pools").screenshot(animations="disabled"), folder / "dashboard-pools.png")
            assert not seen.errors, seen.errors


def main() -> None:
    """Write dashboard-light.png, dashboard-dark.png, dashboard-small.png and dashboard-pools.png."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    pools(folder)
    with LiveNode(gpus=8, model="a100-sxm-500w") as live, browser() as chrome, contextlib.ExitStack() as stack:
        fill_hour(live)
        for gpu, share in enumerate((0.9, 0.8, 0.6, 0.4)):
            stack.enter_context(live.load(gpu, share))
        uuids, client = live.uuids, live.client
        report_job(client, uuids[:2])
        lease = stack.enter_context(
            client.lease(uuids[:2], sm_clock_mhz=(None, 1410), reason="pipeline stage 0", job="gpt-pipeline")
        )
        beats = stack.enter_context(lease.arm(ClockPlan("p-12", uuids[0], CLOCKS_MHZ, 1410, 60.0)))
        live.powerctl("set", "2", "3", "--sm-clock", "1200MHz", "--for", "1h", "--reason", "below the knee")
        live.powerctl("set", "4", "--power-limit", "300W", "--for", "1h", "--reason", "hot aisle")
        for index in range(9):
            beats.send(3, index)
            time.sleep(0.05)  # a stage at work
        for name, dark, width, height in (("light", False, 1280, 1000), ("dark", True, 1280, 1000), ("small", False, 390, 844)):
            with served(live) as page_server, opened(chrome, page_server.url, width=width, height=height, dark=dark) as seen:
                page = seen.page
                page.check("input[value='1h']")
                page.wait_for_selector("#charts[data-range='1h'] canvas")
                page.wait_for_selector("#why-plans canvas")
                page.wait_for_function("() => document.querySelector('#job-table tbody tr')")
                page.click("#job-table button")
                page.wait_for_selector("#job-timeline canvas")
                page.wait_for_timeout(6000)  # the lines of the last seconds
                page.evaluate("() => { document.activeElement.blur(); scrollTo({ top: 0, behavior: 'instant' }); }")
                save(page.screenshot(full_page=name != "small", animations="disabled"), folder / f"dashboard-{name}.png")
                assert not seen.errors, seen.errors


if __name__ == "__main__":
    main()
