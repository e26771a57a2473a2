"""docs/energy.md: its examples run, against a daemon in real time where they need one."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.daemon import running

PAGE = (Path(__file__).parents[2] / "docs" / "energy.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_estimator_example_says_what_the_arithmetic_says() -> None:
    assert len(BLOCKS) == 2
    assert run(BLOCKS[1]).startswith("1992 J, ")


def test_windows_over_the_api_in_real_time_cover_the_truth_and_the_example_runs() -> None:
    with running("a100-sxm-500w", gpus=2) as daemon:
        client = daemon.client()

        def truth() -> list[float]:
            return [daemon.node.true_energy_mj(g) / 1000 for g in range(2)]

        # The request lies between two looks at the truth, however busy this machine is.
        before = truth()
        window = client.call("POST", "/v1/windows", {"gpus": daemon.uuids, "name": "smoke"})
        begun = truth()
        seen = client.call("GET", "/v1/snapshot")["seq"]
        while client.call("GET", "/v1/snapshot")["seq"] < seen + 30:
            time.sleep(0.02)
        ending = truth()
        ended = client.call("POST", f"/v1/windows/{window['id']}/end")
        after = truth()
        assert len(ended["figures"]) == 2
        for figure in ended["figures"]:
            gpu = daemon.uuids.index(figure["uuid"])
            assert figure["low_j"] <= after[gpu] - before[gpu]
            assert figure["high_j"] >= ending[gpu] - begun[gpu]
            assert figure["energy_j"] > 0.8 * (ending[gpu] - begun[gpu])
            assert figure["method"].startswith("counter")
        lines = run(BLOCKS[0], POWERD_SOCKET=str(daemon.socket)).splitlines()
        assert [line.split(":")[0] for line in lines] == list(daemon.uuids)
        assert all(re.search(r": \d+\.\d J \(\d+\.\d to \d+\.\d\), counter", line) for line in lines)
