"""Nodes with both units up, one per test process: starting one costs seconds, asking it costs milliseconds."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.live import LiveNode


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
