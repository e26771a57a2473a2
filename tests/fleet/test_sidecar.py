"""An engine with the sidecar on a simulated node, and the planner as a process: real HTTP, a real powerd, no autoscaler."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from powerd.model import SloClass
from powerd.replicatypes import SloSpec
from powerd_integrations.fleet import scrape
from tests.e2e.live import LiveNode, command, free_port, wait_for
from tests.fleet.test_settings import MODEL

FLEET = """\
[planner]
gpus = 8
listen = "127.0.0.1:{port}"
plan_file = "{folder}/plan.json"
policy = "scaleinst"
engine_model = "{model}"
tick_s = 0.2

[policy]
tp = 4

[[groups]]
pool = "LL"
tp = 4
max_replicas = 2
"""


@pytest.fixture
def node() -> Iterator[LiveNode]:
    with LiveNode(gpus=4, model="h100-sxm", more="[replicas]\npark_after_s = 1\ngood_scrapes = 2\n") as running:
        yield running


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.loads(answer.read())


def test_an_engine_is_registered_reported_drained_and_gone(node: LiveNode, tmp_path: Path) -> None:
    port, engine_port = free_port(), free_port()
    file = tmp_path / "fleet.toml"
    file.write_text(FLEET.format(port=port, folder=tmp_path, model=MODEL))
    planner_url, engine_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{engine_port}"
    with (tmp_path / "log").open("w") as log:
        planner = subprocess.Popen(
            [sys.executable, "-m", "powerd_integrations.fleet", str(file)], stdout=subprocess.PIPE, stderr=log, text=True
        )
        engine = [*command("powerd", "sim", "engine"), "--model", "llama2-70b_h100", "--tp", "4", "--port", str(engine_port),
                  "--shutdown-timeout", "20"]  # fmt: skip
        sidecar = subprocess.Popen(
            [sys.executable, "-m", "powerd_integrations.fleet.sidecar", "--name", "pod/1", "--pool", "LL", "--tp", "4",
             "--engine", engine_url, "--planner", planner_url, "--ttft", "2", "--ttft-up-to", "255=0.25", "--tbt", "0.1",
             "--profile", "llama2-70b_h100", "--settle", "1", "--", *engine],
            env={**node.env, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    try:
        assert planner.stdout is not None
        assert planner.stdout.readline() == f"powerd-fleet: scaleinst on http://127.0.0.1:{port}\n"
        wait_for("the engine serves", lambda: get(f"{planner_url}/v1/plan")["serving"], 30)
        wait_for("the planner has looked around", lambda: get(f"{planner_url}/v1/plan")["desired_replicas"])
        plan = get(f"{planner_url}/v1/plan")
        assert [(row["id"], row["pool"], row["tp"]) for row in plan["serving"]] == [("pod/1", "LL", 4)]
        assert plan["desired_replicas"] == [{"pool": "LL", "tp": 4, "replicas": 2, "clock_mhz": 1980}]
        assert plan["held"] == "no router has reported yet"
        (view,) = node.client.replicas()
        assert view.slo == SloSpec(2.0, 0.1, (SloClass(255, 0.25),))
        wait_for("powerd lowers the idle engine's clocks", lambda: node.locked == 4)
        wait_for("the planner is told the clock", lambda: 0 < get(f"{planner_url}/v1/plan")["serving"][0]["clock_mhz"] < 1980)

        answers: list[int] = []

        def ask() -> None:
            body = json.dumps({"prompt": "tok " * 50, "max_tokens": 100, "stream": True}).encode()
            request = urllib.request.Request(f"{engine_url}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                answers.append(answer.read().count(b'"text":"tok "'))

        asking = [threading.Thread(target=ask) for _ in range(4)]
        for thread in asking:
            thread.start()
        wait_for("requests run", lambda: scrape.load_of(scrape.fetch(f"{engine_url}/metrics", 0.0)).running == 4)
        sidecar.send_signal(signal.SIGTERM)
        wait_for("it is out of the routes while it drains", lambda: get(f"{planner_url}/v1/plan")["serving"] == [])
        for thread in asking:
            thread.join(60)
        assert answers == [100] * 4, "what ran was finished"
        assert sidecar.wait(30) == 0
        assert node.client.replicas() == ()
        assert node.locked == 0
        planner.terminate()
        assert planner.wait(20) == 0
        assert json.loads((tmp_path / "plan.json").read_text())["desired_replicas"] == plan["desired_replicas"], "readers keep it"
    finally:
        for process in (planner, sidecar):
            if process.poll() is None:
                process.kill()
                process.wait()
