"""Four ranks of a torch pipeline as processes, on a simulated node.

House rules: ranks meet on gloo over loopback; whoever is started is ended here; a rank that fails shows what it said.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.e2e.live import LiveNode, free_port
from tests.torchenv import source_path, torch_python

JOB = Path(__file__).parent / "jobs" / "pipeline_job.py"
RANKS = 4
PATIENCE_S = 270


def train(node: LiveNode, *words: str) -> list[dict[str, Any]]:
    """Run the job with four ranks; what each of them said, with its stderr as ``stderr``."""
    base = {
        **node.env, "PYTHONPATH": source_path(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(RANKS),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [str(torch_python()), str(JOB), *words], env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=node.root,
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=PATIENCE_S) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    for process, (out, err) in zip(started, said, strict=True):
        assert process.returncode == 0, f"a rank ended with {process.returncode}\n{out[-2000:]}\n{err[-6000:]}"
    return [{**json.loads(out.splitlines()[-1]), "stderr": err} for out, err in said]


def warnings(rank: dict[str, Any], training: str) -> list[str]:
    """What powerd warned of in one rank's training."""
    _, _, after = rank["stderr"].partition(f"PHASE {training}\n")
    return [line for line in after.partition("PHASE ")[0].splitlines() if line.startswith("WARNING powerd")]
