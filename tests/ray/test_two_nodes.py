"""Two nodes, each with its own GPUs, powerd and Ray node, as far as one machine can be two: leases are the own node's.

House rules: as in test_ray_serve; a fixed fleet of one replica per node, so that nothing but the nodes matters.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.e2e.live import wait_for
from tests.ray.rig import JOBS, LOOPBACK, MODEL, Outcome, Service, node
from tests.rayenv import ray_python, source_path

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.xdist_group("ray")]

FLEET = """\
[planner]
listen = "{listen}"
gpus = 4
engine_model = "{model}"
policy = "static"
tick_s = 0.2
start_timeout_s = 60.0

[policy]
tp = 2
count = 2
clock_mhz = 1980

[[groups]]
pool = "LL"
tp = 2
max_replicas = 2

[engine]
command = {command}
metrics_url = "http://127.0.0.1:{{metrics_port}}/metrics"
profile = "llama2-70b_h100"
num_cpus = 0.0
start_timeout_s = 60.0

[service]
planner = "http://{listen}"
router_cpus = 0.0
"""


class TwoNodes(Service):
    """A Ray cluster of two nodes of two GPUs; no socket of powerd is named, so that each replica finds its own node's."""

    gpus = 2

    def __init__(self) -> None:
        self.other = node(2)
        self._joined: subprocess.Popen[bytes] | None = None
        super().__init__()
        try:
            argv = [str(ray_python()), str(JOBS / "node_job.py"), self.address, "2"]
            pass_on = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.live.root / ".ray" / "auth_token")}
            env = {**self.other.env, **pass_on, "PYTHONPATH": f"{LOOPBACK}{os.pathsep}{source_path()}"}
            with self.log.open("ab") as log:
                self._joined = subprocess.Popen(argv, env=env, cwd=self.live.root, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                stderr=log, start_new_session=True)  # fmt: skip
            assert self._joined.stdout is not None
            assert self._joined.stdout.readline() == b"joined\n", self.log.read_text()[-3000:]
        except BaseException:
            self.close()
            raise

    def _toml(self) -> str:
        return FLEET.format(listen=self._planner_at, model=MODEL, command=self._engine())

    def leave(self) -> None:
        """The second node goes; harmless when it has."""
        if self._joined is not None:
            self._joined.communicate(timeout=20)

    def close(self) -> None:
        self.leave()
        super().close()
        self.other.close()


@pytest.fixture(scope="module")
def service() -> Iterator[TwoNodes]:
    with TwoNodes() as running:
        yield running


def answered(service: TwoNodes, count: int) -> None:
    outcomes: list[Outcome] = [sent.result(60) for sent in [service.send(tokens=20) for _ in range(count)]]
    assert [o for o in outcomes if not (o.status == 200 and o.whole and o.tokens == 20 and not o.error)] == []


def test_each_replica_has_its_lease_at_its_own_node(service: TwoNodes) -> None:
    service.wait_serving({2: 2}, 90)
    held = [live.client.replicas() for live in (service.live, service.other)]
    assert [len(views) for views in held] == [1, 1]
    assert {views[0].name for views in held} == {one.id for one in service.plan().serving}
    assert [views[0].gpus for views in held] == [tuple(live.uuids) for live in (service.live, service.other)]
    answered(service, 12)
    for live in (service.live, service.other):
        wait_for("idle clocks are lowered by each node", lambda live=live: live.locked == 2)  # type: ignore[misc]


def test_a_daemon_that_is_killed_is_its_own_nodes_affair(service: TwoNodes) -> None:
    os.kill(service.other.process.pid, signal.SIGKILL)
    service.other.process.wait()
    wait_for("its clocks are back at baseline", lambda: service.other.locked == 0, 15)
    answered(service, 6)
    wait_for("the other node's are lowered as before", lambda: service.live.locked == 2)
    service.other.start()
    wait_for("the replica is registered again", lambda: len(service.other.client.replicas()) == 1, 40)


def test_a_node_that_leaves_takes_its_replica_and_no_request(service: TwoNodes) -> None:
    service.leave()
    answered(service, 6)
    wait_for("its lease is gone", lambda: service.other.client.replicas() == (), 30)
    wait_for("and no clock is held there", lambda: service.other.locked == 0)
    wait_for("the planner knows", lambda: service.serving() == {2: 1}, 30)
