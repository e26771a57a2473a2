"""powerd against a real vLLM on CPU: profile it beside its own histograms, follow it as a replica, kill it.

    python -m tests.replicas.against_vllm --vllm VENV/bin/vllm

House rules: the engine is real, its model made up (`record`), the GPUs simulated: latencies are this CPU's, energies mean
nothing; loopback only; what is printed is what was seen.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from powerd.client import Client
from powerd.demo.stage import Stage, stage
from powerd.enginepage import EnginePage, Histogram, parse
from powerd_policies.dynamollm import profile_file
from tests.replicas.record import PORT, get, serving, wait_for

OPTIONS = (
    "--load-format=dummy", "--served-model-name=tiny", "--dtype=bfloat16", "--max-model-len=2048", "--max-num-seqs=16",
    "--host=127.0.0.1", "--shutdown-timeout=20",
)  # fmt: skip
CLASSES = ("SS", "MM", "LS")
# Without warm-up: vLLM counts every request.
CELL = ("--clocks", "1980", "--rates", "1", "--seconds", "20", "--warmup", "0", "--ttft", "5", "--tbt", "1")


def page() -> EnginePage:
    """What vLLM says of itself now."""
    return parse(get("/metrics")[1], "vllm")


def bucket_of_p99(before: Histogram | None, after: Histogram | None) -> str:
    """The edges between which the 99th percentile of what came in between lies."""
    assert after is not None
    counts = [b - (before.counts[at] if before else 0.0) for at, b in enumerate(after.counts)]
    for (below, _), (edge, count) in pairwise([(0.0, 0.0), *zip(after.edges, counts, strict=True)]):
        if count >= math.ceil(0.99 * counts[-1]):
            return f"{below:g} to {edge:g} s"
    raise AssertionError("a histogram ends at infinity")


def compare(here: Stage) -> None:
    """Profile one cell of each class and print it beside vLLM's own figures."""
    rows = []
    for name in CLASSES:
        out, before = here.folder / f"{name}.csv", page()
        words = [sys.executable, "-m", "powerd.cli.main", "dynamollm", "profile", "--endpoint", f"http://127.0.0.1:{PORT}"]
        words += ["--gpus", "0,1", "--classes", name, *CELL, "-o", str(out)]
        subprocess.run(words, env=here.env, check=True, timeout=300, stdout=subprocess.DEVNULL)  # its table, with joules
        (point,), after = profile_file.load(out).points, page()
        ttft, gap = bucket_of_p99(before.ttft, after.ttft), bucket_of_p99(before.gap, after.gap)
        rows.append(f"| {name} | {point.ttft_p99_s:.3f} s | {ttft} | {point.tbt_p99_s:.3f} s | {gap} |")
    print("| class | TTFT p99, measured | vLLM's bucket | TBT p99, measured | vLLM's bucket |\n| --- | --- | --- | --- | --- |")
    print("\n".join(rows), flush=True)


def follow(here: Stage, server: int) -> None:
    """Follow it as a replica until its clock is lowered, kill it under load, and print how the clock went back."""
    with Client(here.env["POWERD_SOCKET"]) as client, client.register_replica(
        "tiny-0", pool="tiny", metrics_url=f"http://127.0.0.1:{PORT}/metrics", ttft_s=5.0, tbt_s=0.2, gpus=[0, 1],
        profile="llama2-70b_h100", chunk_tokens=256,
    ):  # fmt: skip
        load = here.start("load", "-m", "tests.replicas.against_vllm", "--load")
        try:
            _see(client, here, lambda state, clock: state == "fresh" and 0 < clock < 1980, "controlled")
            os.kill(server, signal.SIGKILL)
            _see(client, here, lambda state, clock: state == "stale" and clock == 0, "killed")
        finally:
            load.stop()
    _see(client, here, lambda state, clock: clock == 0, "released")


def _see(client: Client, here: Stage, is_there: Callable[[str, int], bool], what: str) -> None:
    began = time.monotonic()
    while time.monotonic() - began < 90:
        views, locked_mhz = client.replicas(), here.node.view(0).lock_max_mhz
        view = views[0] if views else None
        if is_there(view.state if view else "", locked_mhz):
            said = f"{view.running} running, {view.state}: {view.reason}" if view else "no replica"
            ceiling = f"at most {locked_mhz} MHz" if locked_mhz else "any clock"
            print(f"{what}: after {time.monotonic() - began:.1f} s {ceiling}; {said}", flush=True)
            return
        time.sleep(0.2)
    sys.exit(f"{what}: the clock did not follow within 90 s")


def load() -> None:
    """Long answers, a few at a time, until killed."""
    import asyncio

    import aiohttp

    from powerd.cli.endpointload import Load, connector

    async def main() -> None:
        async with aiohttp.ClientSession(**connector()) as session:
            url = f"http://127.0.0.1:{PORT}"
            async with Load(session, url, "tiny", range(32, 127), [(300, 1500)], 0.8, 1) as requests:
                requests.begin(120.0)
                await requests.end(60.0)

    asyncio.run(main())


def main() -> None:
    """Serve, compare, follow, kill."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vllm", help="the program")
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load()
        return
    with serving(str(Path(args.vllm).absolute()), OPTIONS) as server, stage(2, "real", fit_on=None, model="h100-sxm") as here:
        wait_for(lambda _: True, 300)
        compare(here)
        follow(here, server.pid)


if __name__ == "__main__":
    main()
