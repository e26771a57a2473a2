"""What CI runs fails when anything in it fails, and ends with the line that says what."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CI = Path(__file__).parents[2] / ".ci"
CLOSING = "==== 1 failed, 2 passed in 0.10s ===="

MAKE = """\
#!/bin/sh
[ "$1" = test ] && echo "{closing}"
[ "$1" != "{broken}" ]
"""


def run(folder: Path, broken: str) -> subprocess.CompletedProcess[str]:
    """The script with a make whose target ``broken`` fails, on a machine that has every package."""
    shutil.copytree(CI, folder / ".ci")
    tools = folder / "tools"
    tools.mkdir()
    for name, text in (
        ("make", MAKE.format(closing=CLOSING, broken=broken)),
        ("dpkg-query", '#!/bin/sh\necho "install ok installed"\n'),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", ".ci/run"], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("broken", ["check", "demo", "test"])
def test_a_step_that_fails_fails_the_run(tmp_path: Path, broken: str) -> None:
    done = run(tmp_path, broken)
    assert done.returncode != 0
    assert ("==> make test" in done.stdout) == (broken == "test"), "nothing runs after what failed"


def test_the_closing_line_comes_last(tmp_path: Path) -> None:
    done = run(tmp_path, "nothing")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, CLOSING)
