"""Examples of the pages that need a framework run as they are shown, on a simulated node with powerd."""

from __future__ import annotations

import subprocess

import pytest

from tests.docs import markdown
from tests.e2e.live import LiveNode
from tests.torchenv import source_path, torch_python

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("frameworks")]


@pytest.mark.parametrize("block", markdown.blocks("python torch"), ids=str)
def test_an_example_runs_as_shown(block: markdown.Block, live: LiveNode) -> None:
    env = {**live.env, "PYTHONPATH": source_path(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(torch_python()), "-c", block.text], env=env, cwd=live.root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "goes on without it" not in done.stderr, done.stderr[-4000:]
