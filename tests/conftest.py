"""What holds for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from _pytest.nodeid import coerce_node_id

HERE = Path(__file__).parent
# Folders whose tests start processes and watch them in real time (decision 0011).
LIVE = ("cli", "client", "docs", "e2e", "frameworks", "grafana", "integrations", "ray", "real", "torch", "web")


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    """In CI, on a machine that others use too, a test of live processes has a second chance; the closing line counts it."""
    if os.environ.get("CI") == "true" and item.path.is_relative_to(HERE) and item.path.relative_to(HERE).parts[0] in LIVE:
        item.add_marker(pytest.mark.flaky(reruns=1, reruns_delay=2))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of one xdist_group run on one worker: xdist 3.8 marks them in a field that pytest 9.2 no longer reads."""
    if not getattr(config.option, "loadgroup", False):
        return
    for item in items:
        groups = sorted({str(mark.args[0]) for mark in item.iter_markers("xdist_group")})
        if groups and "@" not in item.nodeid:
            item._id = coerce_node_id(f"{item.nodeid}@{'_'.join(groups)}")
