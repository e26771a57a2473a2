"""`python -m tests.web.pictures [FOLDER]`: the pictures of the dashboard in docs/pictures, from a simulated node.

House rules: everything in them comes from a running powerd; what is simulated says so in the picture itself.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from pathlib import Path

from PIL import Image

from powerd.client import Client, JobLog
from powerd.model import ClockPlan
from tests.e2e.live import LiveNode, wait_for
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


def save(png: bytes, path: Path) -> None:
    """Write a screenshot with as few colours as it needs: a third of the bytes."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size, "bytes")


def main() -> None:
    """Write dashboard-light.png, dashboard-dark.png and dashboard-small.png."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
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
