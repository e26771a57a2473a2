"""With settings made through powerctl, well-known NVML clients and powerd say the same of the same GPU.

House rules: the peers are unmodified and pinned (tests/real/test_nvml_clients.py holds their versions and that they run); a value
that moves is compared within its own noise, a setting exactly.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.live import LiveNode, wait_for

pytestmark = [pytest.mark.peers, pytest.mark.xdist_group("peers")]

LIMIT_W, CLOCK_MHZ = 350, 1200
POWER_NOISE_W = 12.0  # two sensors read at different moments: noise, refresh period and averaging window
REFRESH_S = 0.1  # the energy counter's


@pytest.fixture(scope="module")
def peers() -> Path:
    """The programs of the peers' environment."""
    named = os.environ.get("POWERD_PEERS_VENV")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / ".venv-peers"
    folder = folder.parents[1] if folder.is_file() else folder
    if not (folder / "bin" / "python").exists():
        reason = f"no environment with the peers at {folder} (make test makes it; POWERD_PEERS_VENV names another)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder / "bin"


@pytest.fixture(scope="module")
def live() -> Iterator[LiveNode]:
    """GPU 1 under load, with a power limit and an SM clock that powerctl set."""
    with LiveNode() as node, node.load(gpu=1, share=0.6):
        done = node.powerctl(
            "set", "1", "--for", "10m", "--power-limit", f"{LIMIT_W}W", "--sm-clock", f"{CLOCK_MHZ}MHz", "--reason", "peers agree"
        )
        assert done.code == 0, done.err
        wait_for("the lock shows under load", lambda: reading(node)["sm_clock_mhz"] == CLOCK_MHZ)
        wait_for("the load shows", lambda: (reading(node)["utilization_percent"] or 0) > 50)
        yield node


def reading(live: LiveNode) -> dict[str, Any]:
    """What `powerctl status` says of GPU 1."""
    answer = live.powerctl("status", "--json")
    assert answer.code == 0, answer.err
    (found,) = [r for r in answer.json()["snapshot"]["readings"] if r["uuid"] == live.uuids[1]]
    return dict(found)


def peer(live: LiveNode, peers: Path, *argv: str) -> str:
    answer = live.run([str(peers / argv[0]), *argv[1:]], env={"TERM": "dumb"})
    assert answer.code == 0, answer.err
    return answer.out


def test_gpustat(live: LiveNode, peers: Path) -> None:
    row = json.loads(peer(live, peers, "gpustat", "--json"))["gpus"][1]
    ours = reading(live)
    assert row["uuid"] == ours["uuid"]
    assert row["enforced.power.limit"] * 1000 == ours["power_limit_enforced_mw"] == LIMIT_W * 1000
    assert row["temperature.gpu"] == pytest.approx(ours["temperature_c"], abs=2)
    assert row["power.draw"] == pytest.approx(ours["power_mw"] / 1000, abs=POWER_NOISE_W)
    assert row["utilization.gpu"] == pytest.approx(ours["utilization_percent"], abs=10)


@pytest.mark.parametrize("argv", [("nvitop", "-1", "--ascii"), ("py3smi",)], ids=lambda argv: argv[0])
def test_programs_that_print_a_page(argv: tuple[str, ...], live: LiveNode, peers: Path) -> None:
    out = peer(live, peers, *argv)
    ours = reading(live)
    rows = re.findall(r"(\d+)C.*?(\d+)W / (\d+)W", out)
    assert len(rows) == 2, out
    temperature_c, power_w, limit_w = map(int, rows[1])
    assert limit_w * 1000 == ours["power_limit_enforced_mw"]
    assert temperature_c == pytest.approx(ours["temperature_c"], abs=2)
    assert power_w == pytest.approx(ours["power_mw"] / 1000, abs=POWER_NOISE_W)


def test_nvitop_reads_the_same_clock(live: LiveNode, peers: Path) -> None:
    code = "from nvitop import Device; d = Device(1); print(d.sm_clock(), d.power_limit(), d.uuid())"
    clock, limit, uuid = peer(live, peers, "python", "-c", code).split()
    ours = reading(live)
    assert (int(clock), int(limit), uuid) == (ours["sm_clock_mhz"], ours["power_limit_enforced_mw"], ours["uuid"])
    assert int(clock) == CLOCK_MHZ


_ZEUS = """
import json, sys
from zeus.device import get_gpus
from zeus.monitor import ZeusMonitor
monitor = ZeusMonitor(gpu_indices=[1])
print("ready", flush=True)
for line in sys.stdin:
    if line == "begin\\n":
        monitor.begin_window("w", sync_execution=False)
        print("begun", flush=True)
    else:
        window = monitor.end_window("w", sync_execution=False)
        limit = get_gpus().get_power_management_limit(1)
        print(json.dumps({"joules": window.gpu_energy[1], "seconds": window.time, "limit_mw": limit}), flush=True)
"""


def test_zeus_measures_the_same_energy(live: LiveNode, peers: Path) -> None:
    argv = [str(peers / "python"), "-c", _ZEUS]
    with subprocess.Popen(argv, env=live.env, cwd=live.root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as zeus:
        assert zeus.stdin is not None
        assert zeus.stdout is not None

        def said() -> str:
            assert zeus.stdout is not None
            while not (line := zeus.stdout.readline()).startswith(("ready", "begun", "{")):
                assert line, "zeus ended"
            return line

        def tell(word: str) -> str:
            assert zeus.stdin is not None
            zeus.stdin.write(word + "\n")
            zeus.stdin.flush()
            return said()

        assert said() == "ready\n"
        window = live.client.energy("beside zeus", [1])
        begun = tell("begin")
        window.begin()
        assert begun == "begun\n"
        energy = live.powerctl("energy", "--gpus", "1", "--for", "4s", "--json")
        theirs = json.loads(tell("end"))
        window.end()
        zeus.stdin.close()
    assert theirs["limit_mw"] == LIMIT_W * 1000
    (figure,) = window.figures
    assert None not in (figure.energy_j, figure.low_j, figure.high_j, window.duration_s)
    # Ours and theirs begin and end one after the other, and theirs counts in steps of the counter.
    watts = theirs["joules"] / theirs["seconds"]
    slack_j = watts * (abs(window.duration_s - theirs["seconds"]) + REFRESH_S)
    assert figure.low_j - slack_j <= theirs["joules"] <= figure.high_j + slack_j
    # And `powerctl energy`, for a part of that time, finds the same power.
    (inner,) = energy.json()["figures"]
    spread_w = (inner["high_j"] - inner["low_j"]) / 2 / energy.json()["duration_s"] + watts * REFRESH_S / energy.json()[
        "duration_s"
    ]
    assert inner["average_power_w"] == pytest.approx(watts, abs=spread_w + POWER_NOISE_W / 2)
