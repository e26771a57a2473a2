"""One simulated node for all examples."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.live import LiveNode


@pytest.fixture(scope="session")
def live() -> Iterator[LiveNode]:
    """A simulated node that powerd controls."""
    with LiveNode() as node:
        yield node
