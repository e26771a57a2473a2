"""Starts one process per rank and ends with them: all of them when one fails.

House rules: a rank dies with its launcher even if that is killed; who does not end when asked is killed; only children are ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
PATIENCE_S = 5.0


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def launch(world: int, arguments: Sequence[str]) -> int:
    """Run all ranks to their end; the first exit code that is not 0. Rank 0 has this process's stdin."""
    folder = Path(tempfile.mkdtemp(prefix="pd-mail-"))
    ranks: dict[int, subprocess.Popen[bytes]] = {}
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        for rank in range(world):
            command = [sys.executable, "-m", "powerd_integrations.simulated_pipeline", *arguments]
            process = subprocess.Popen(
                [*command, "--rank", str(rank), "--mail", str(folder)],
                stdin=None if rank == 0 else subprocess.DEVNULL,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 (one system call, no lock, no allocation)
            )
            ranks[process.pid] = process
        return _wait(dict(ranks))
    finally:
        for process in ranks.values():
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
        for process in ranks.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_S)
            if process.poll() is None:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(running: dict[int, subprocess.Popen[bytes]]) -> int:
    while running:
        pid, status = os.wait()
        ended = running.pop(pid, None)
        if ended is None:
            continue
        ended.returncode = os.waitstatus_to_exitcode(status)
        if ended.returncode:
            return ended.returncode if ended.returncode > 0 else 1
    return 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
