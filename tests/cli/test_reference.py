"""docs/powerctl.md and docs/client.md say what is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.client.fake_daemon import FakeDaemon

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_of_powerctl_is_current() -> None:
    done = subprocess.run([sys.executable, "-m", "powerd.cli.reference"], capture_output=True, text=True, check=True)
    assert done.stdout == (DOCS / "powerctl.md").read_text(encoding="utf-8"), "python -m powerd.cli.reference > docs/powerctl.md"


def test_the_examples_of_the_client_run(daemon: FakeDaemon) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "client.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", "def train(): pass\n" + block], capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, block + done.stderr
    assert daemon.leases == {}
