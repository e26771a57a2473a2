"""One simulated node of two GPUs, in real time, for all framework jobs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.live import LiveNode
from tests.torchenv import torch_python


@pytest.fixture(scope="session")
def live() -> Iterator[LiveNode]:
    """A simulated node that powerd controls."""
    torch_python()
    with LiveNode() as node:
        yield node
