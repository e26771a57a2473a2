"""Energy spans through the whole daemon in stepped time: a rank runs its kernels and asks what each kind used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from powerd.demo.stage import stage

ROOT = Path(__file__).parents[2]

#: A training rank: three kinds of work with bubbles, one request, the truth from its own kernels.
RANK = """
import json, random, sys
from powerd.api import Span
from powerd.client import Client
from powerd.clock import NS, from_environment
from powerd.sim.node import attach
from powerd.sim.workload import Context

client, clock, rng = Client(timeout_s=60), from_environment(), random.Random(7)
waiter = clock.waiter("rank")
uuid = client.node().gpus[0].gpu.uuid
print("ready", flush=True)
spans, truth = [], {}
with attach() as node, Context(0, node=node) as context:
    waiter.wait_until(clock.now_ns() + 2 * NS)
    begin_mj = node.true_energy_mj(0)
    for step in range(24):
        for kind in ("forward", "backward"):
            begin = client.now_ns()
            done = context.run([(f"gpt3-175b/{stage}/{kind}", rng.uniform(0.5, 2)) for stage in (0, 5)])
            spans.append(Span(kind, begin, client.now_ns()))
            truth[kind] = truth.get(kind, 0) + done.energy_mj / 1000
        if step % 3 == 0:
            context.blocked(rng.uniform(0.05, 0.3))
    truth["total"] = (node.true_energy_mj(0) - begin_mj) / 1000
    asked = clock.now_ns()
    view = client.spans(uuid, spans)
    waited_s = (clock.now_ns() - asked) / NS
    whole = client.spans(uuid, [Span("all", spans[0].begin_ns, spans[-1].end_ns)])
from powerd.client.codec import encode
print(json.dumps({"view": encode(view), "whole": encode(whole), "truth": truth, "waited_s": waited_s}), flush=True)
waiter.close()
"""


def test_a_rank_learns_what_each_kind_of_work_used(tmp_path: Path) -> None:
    with stage(1, "stepped") as here, (tmp_path / "log").open("w") as log:
        env = {**here.env, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        rank = subprocess.Popen([sys.executable, "-c", RANK], env=env, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "ready\n", (tmp_path / "log").read_text()
            here.go()
            answer = rank.stdout.readline()
            assert answer, (tmp_path / "log").read_text()
        finally:
            rank.kill()
            rank.wait()
    found = json.loads(answer)
    view, truth = found["view"], found["truth"]
    labels = {row["label"]: row for row in view["labels"]}
    assert list(labels) == ["forward", "backward", ""]
    assert view["method"] == "counter"
    for kind in ("forward", "backward"):
        row = labels[kind]
        assert row["spans"] == 24
        assert abs(row["energy_j"] / truth[kind] - 1) < 0.015
        assert row["low_j"] <= truth[kind] <= row["high_j"]
        assert row["sm_clock_mhz"] == 1410
    # What was counted is given to somebody, all of it.
    assert abs(sum(row["energy_j"] for row in labels.values()) / truth["total"] - 1) < 0.005
    assert 60 < labels[""]["energy_j"] / labels[""]["time_s"] < 110, "the power of a GPU that waits"
    (whole,) = [row for row in found["whole"]["labels"] if row["label"] == "all"]
    assert abs(whole["energy_j"] / truth["total"] - 1) < 0.01, "one span over all of it is the counter's own difference"
    assert found["waited_s"] <= 0.3, "the fit takes no simulated time, only the closing sample does"
