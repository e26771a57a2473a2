"""`make` on a machine that lacks something says in one line what, and how to get it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What `make` and the preflight use beside the things that may be missing.
SHELL_TOOLS = ("sh", "make", "dirname", "env")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The PATH of a complete machine; tests take things away from it."""
    for tool in SHELL_TOOLS:
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    (tmp_path / "python3").symlink_to(sys.executable)
    script(tmp_path / "cc", 'exec "$REAL_CC" "$@"')
    return tmp_path


def script(path: Path, body: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def make(path: Path, target: str = "preflight") -> subprocess.CompletedProcess[str]:
    """Run make with only this PATH; the compiler itself needs the real one."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    real_cc = f"PATH={os.environ['PATH']} exec {compiler}"
    if (path / "cc").exists() and "REAL_CC" in (path / "cc").read_text():
        script(path / "cc", f'{real_cc} "$@"')
    command: list[str | Path] = [path / "make", "-C", ROOT, "--no-print-directory", target]
    return subprocess.run(command, env={"PATH": str(path)}, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line before make's own; fails when there are more."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make:")]
    assert len(lines) == 1, done.stderr
    assert done.stdout == ""
    return lines[0]


def test_a_complete_machine_is_told_nothing(machine: Path) -> None:
    done = make(machine)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_python(machine: Path) -> None:
    (machine / "python3").unlink()
    line = complaint(make(machine))
    assert "python3 (Python 3.11 or newer) is missing" in line
    assert "apt-get install python3 python3-venv" in line


def test_an_old_python(machine: Path) -> None:
    script(machine / "python3", 'case "$*" in *version_info*) exit 1;; esac')
    assert "Python 3.11 or newer" in complaint(make(machine))


def test_a_python_without_venv(machine: Path) -> None:
    script(machine / "python3", 'case "$*" in *ensurepip*) exit 1;; esac')
    line = complaint(make(machine))
    assert "venv" in line
    assert "apt-get install python3-venv" in line


def test_no_compiler(machine: Path) -> None:
    (machine / "cc").unlink()
    line = complaint(make(machine))
    assert "C compiler" in line
    assert "apt-get install gcc libc6-dev" in line


def test_a_compiler_without_headers(machine: Path) -> None:
    script(machine / "cc", "exit 1")
    assert "headers" in complaint(make(machine))
