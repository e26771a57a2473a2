"""An engine does not outlive who started it, however that ends; real processes, no Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.live import wait_for

# Says its own process and a helper's, then waits: SIGTERM ends it, or not.
ENGINE = """
import signal, subprocess, sys, time
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(f"{__import__('os').getpid()} {helper.pid}\\n")
time.sleep(600) if "ends" not in sys.argv else sys.exit(7)
"""
LEASH = "import sys; from powerd_integrations.ray_serve import leash; leash.GRACE_S = 0.3; sys.exit(leash.main(sys.argv[1:]))"


def runs(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except OSError:
        return False


@contextmanager
def held(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """The leash and the processes of its engine."""
    said = folder / "pids"
    command = [sys.executable, "-c", LEASH, sys.executable, "-c", ENGINE, str(said), *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as leash:
        pids: list[int] = []
        try:
            wait_for("the engine runs", lambda: said.exists() and said.read_text().endswith("\n"))
            pids = [int(word) for word in said.read_text().split()]
            yield leash, pids
        finally:
            for pid in pids:
                if runs(pid):
                    os.kill(pid, signal.SIGKILL)
            leash.kill()


def dropped(leash: subprocess.Popen[bytes]) -> None:
    assert leash.stdin is not None
    leash.stdin.close()


def killed(leash: subprocess.Popen[bytes]) -> None:
    """As Ray does when a worker ends by itself: its own children first, by SIGKILL, then the worker."""
    leash.kill()
    leash.wait()
    dropped(leash)


@pytest.mark.parametrize("let_go", [dropped, killed])
@pytest.mark.parametrize("words", [(), ("stubborn",)])
def test_an_engine_and_what_it_started_end_with_their_holder(
    tmp_path: Path, let_go: Callable[[subprocess.Popen[bytes]], None], words: tuple[str, ...]
) -> None:
    with held(tmp_path, *words) as (leash, pids):
        assert len(pids) == 2
        let_go(leash)
        wait_for("nothing of it is left", lambda: not any(runs(pid) for pid in pids), 10)


def test_an_engine_that_ends_by_itself_ends_its_leash_and_leaves_nothing(tmp_path: Path) -> None:
    with held(tmp_path, "ends") as (leash, pids):
        assert leash.wait(10) == 7
        wait_for("nothing of it is left", lambda: not any(runs(pid) for pid in pids), 10)


def test_an_engine_is_told_to_end_as_its_leash_is(tmp_path: Path) -> None:
    with held(tmp_path) as (leash, pids):
        leash.terminate()
        assert leash.wait(10) == 128 + signal.SIGTERM
        wait_for("nothing of it is left", lambda: not any(runs(pid) for pid in pids), 10)
