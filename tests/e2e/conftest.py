"""Nodes with both units up, and a powerd before a fake powerd-hw, one per test process:
starting one costs seconds, asking it costs milliseconds.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from powerd.client import Lease
from tests.e2e.daemon_rig import Rig, rig
from tests.e2e.live import LiveNode
from tests.e2e.replica_rig import busy
from tests.replicas.engine import Endpoint


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose name leaves room for a socket's."""
    folder = Path(tempfile.mkdtemp(prefix="pd"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def live() -> Iterator[LiveNode]:
    """A simulated node that powerd controls."""
    with LiveNode() as node:
        yield node


@pytest.fixture(scope="session")
def monitor() -> Iterator[LiveNode]:
    """A simulated node as a fresh install leaves it: powerd only monitors."""
    with LiveNode(control=False, gpus=1) as node:
        yield node


@pytest.fixture(scope="module")
def held(live: LiveNode) -> Iterator[Lease]:
    """What must survive every mistake: GPU 1 of the node at 1200 MHz and 400 W."""
    lease = live.client.lease(
        [live.uuids[1]], sm_clock_mhz=1200, power_limit_w=400, reason="must survive", ttl_s=3600, detached=True
    )
    yield lease
    lease.release()


@pytest.fixture(scope="session")
def shared() -> Iterator[Rig]:
    """A powerd before a fake powerd-hw; a test asks for `node`."""
    with rig() as made:
        made.start()
        yield made


@pytest.fixture
def node(shared: Rig) -> Iterator[Rig]:
    """A running powerd that others use too: whatever a test leaves set ends with it."""
    yield shared
    for lease in shared.get("/v1/leases"):
        shared.request("DELETE", f"/v1/leases/{lease['id']}")
    shared.hw.wait(lambda: not shared.hw.desired, "left over settings")


@pytest.fixture
def own() -> Iterator[Rig]:
    """A powerd for this test alone, which starts, stops and configures it."""
    with rig() as made:
        yield made


@pytest.fixture
def engine() -> Iterator[Endpoint]:
    """An engine that decodes two requests, far within its SLO."""
    one = Endpoint(busy())
    yield one
    one.close()
