"""`powerd sim`: a command on a simulated node, its faults and its truth; and how the library is built."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from powerd.sim import build, cli
from powerd.sim import node as nodes

SIM = [sys.executable, "-m", "powerd.sim"]


def sim(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SIM, *args], capture_output=True, text=True, check=False, timeout=60, **more)


def test_run_gives_the_command_a_node_and_takes_it_away() -> None:
    code = (
        "import os, pynvml as p; p.nvmlInit(); print(p.nvmlDeviceGetCount(), os.environ['POWERD_SIM_STATE'],"
        " p.nvmlDeviceGetName(p.nvmlDeviceGetHandleByIndex(0)))"
    )
    done = sim("run", "--gpus", "3", "--model", "a40", "--", sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    count, state, *name = done.stdout.split()
    assert (count, " ".join(name)) == ("3", "NVIDIA A40")
    assert not Path(state).exists()
    assert "3 x NVIDIA A40 (simulated)" in done.stderr


@pytest.mark.parametrize(("code", "expected"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_run_passes_the_exit_code_on(code: str, expected: int) -> None:
    assert sim("run", "--", sys.executable, "-c", code).returncode == expected


def test_run_passes_signals_on_and_cleans_up() -> None:
    code = (
        "import os, signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print(os.environ['POWERD_SIM_STATE'], flush=True)\nsignal.pause()"
    )
    child = subprocess.Popen([*SIM, "run", "--", sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    state = child.stdout.readline().strip()
    assert Path(state).exists()
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 5
    assert not Path(state).exists()
    child.stdout.close()


def test_fault_and_show_work_from_inside_the_run(tmp_path: Path) -> None:
    script = tmp_path / "inside.sh"
    python = sys.executable
    script.write_text(
        f"{python} -m powerd.sim fault oob-cap --gpu 1 --value 250000\n"
        f"{python} -m powerd.sim fault rule --function 'nvmlDeviceSet*' --code 999\n"
        f"{python} -m powerd.sim show --json\n"
    )
    done = sim("run", "--gpus", "2", "--", "sh", str(script))
    lines = done.stdout.splitlines()
    assert lines[0] == "fault oob-cap on GPU 1 (simulated)"
    truth = json.loads(lines[-1])
    assert truth["simulated"] is True
    assert [row["enforced_mw"] for row in truth["gpus"]] == [700_000, 250_000]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run"], "no command"),
        (["run", "--time", "fast", "--", "true"], "time is 'real'"),
        (["run", "--gpus", "99", "--", "true"], "gpus must be 1..16"),
        (["run", "--profile", "x", "--", "true"], "--profile is NAME=CSV"),
        (["show", "--state", "/nonexistent"], "not the state of a simulated node"),
        (["show", "--state", "/etc/hostname"], "not the state of a simulated node"),
    ],
)
def test_mistakes_get_one_clear_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("powerd sim: ")
    assert message in error
    assert error.count("\n") == 1


def test_show_without_a_node_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("POWERD_SIM_STATE", raising=False)
    assert cli.main(["show"]) == 2
    assert "run under `powerd sim run`" in capsys.readouterr().err


def test_a_missing_command_is_127(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--quiet", "--", "/nonexistent/command"]) == 127
    assert "cannot run /nonexistent/command" in capsys.readouterr().err


def test_faults_are_listed_and_show_is_readable(
    make_node: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["faults"]) == 0
    assert "hang-node" in capsys.readouterr().out
    node = make_node("h200-sxm")
    monkeypatch.setenv("POWERD_SIM_STATE", str(node.path))
    assert cli.main(["show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("NVIDIA H200 (simulated), time stepped")
    assert len(lines) == 3


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    children = [subprocess.Popen([*SIM, "build"], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {child.communicate(timeout=120)[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0]
    (path,) = paths
    assert sorted(file.name for file in Path(path).parent.iterdir()) == [build.LIBRARY]


def test_without_a_compiler_there_is_one_line_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["build"]) == 2
    assert "install gcc or clang" in capsys.readouterr().err


def test_a_compiler_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match="no luck"):
        build.build()


def test_a_node_file_is_readable_by_all_and_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "node"
    with nodes.create(gpus=1, path=path, latency=0) as node:
        assert path.stat().st_mode & 0o777 == 0o666
        with pytest.raises(nodes.SimError, match="cannot make"):
            nodes.create(gpus=1, path=path)
        with nodes.attach(path) as other:
            assert other.gpus == node.gpus
        assert node.view(0).limit_mw > 0
    assert not path.exists()
