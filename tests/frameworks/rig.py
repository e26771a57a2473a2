"""Training jobs in the frameworks' environment, on a simulated node that a real powerd controls.

House rules: a job is a real program of its framework whose steps run measured kernels on the simulated GPU; it prints one JSON
object a line; ranks are real processes that meet on gloo over loopback.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tests.e2e.live import LiveNode, free_port
from tests.torchenv import source_path, torch_python

JOBS = Path(__file__).parent / "jobs"
PATIENCE_S = 150


def run_job(live: LiveNode, name: str, *words: str, ranks: int = 1, env: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Run a job with so many ranks; what each of them said. AssertionError with its output when one fails."""
    base = {
        **live.env, "PYTHONPATH": source_path(), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "0,1",
        "POWERD_JOB": name, **(env or {}),
    }  # fmt: skip
    if ranks > 1:
        base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    started = []
    for rank in range(ranks):
        own = {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {**base, "CUDA_VISIBLE_DEVICES": "0"}
        argv = [str(torch_python()), str(JOBS / f"{name}.py"), *words]
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(argv, env=own, cwd=live.root, text=True, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
        )
    said = _both(started)
    for process, (out, err) in zip(started, said, strict=True):
        assert process.returncode == 0, f"{name} ended with {process.returncode}\n{out[-2000:]}\n{err[-6000:]}"
    return [{**_said(out)[-1], "stderr": err, "before": _said(out)[:-1]} for out, err in said]


def _said(out: str) -> list[dict[str, Any]]:
    lines: Sequence[str] = [line for line in out.splitlines() if line.startswith('{"')]
    assert lines, f"the job said nothing: {out[-2000:]}"
    return [dict(json.loads(line)) for line in lines]


def _both(started: Sequence[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    """What every process said, on both channels; when one fails the others are not waited for long."""
    with ThreadPoolExecutor(len(started)) as pool:
        waiting = [pool.submit(process.communicate) for process in started]
        end_s = time.monotonic() + PATIENCE_S
        while not all(one.done() for one in waiting):
            wait(waiting, timeout=1.0)
            failed = any(one.done() and process.returncode for one, process in zip(waiting, started, strict=True))
            if failed:
                end_s = min(end_s, time.monotonic() + 5)
            if time.monotonic() > end_s:
                for process in started:
                    process.kill()
        return [one.result() for one in waiting]
