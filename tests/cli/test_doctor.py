"""powerctl doctor: what it recognises and what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from powerd.cli import checks
from powerd.cli.checks import Level
from powerd.errors import EXIT_UNAVAILABLE
from powerd.hw.journal import Journal
from powerd.model import Control, Interval, Support
from tests.cli.conftest import Powerctl
from tests.client.fake_daemon import FakeDaemon, capability, node


def process(proc: Path, pid: int, name: str, *arguments: str) -> None:
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "comm").write_text(name[:15] + "\n")
    (proc / str(pid) / "cmdline").write_bytes("\0".join((name, *arguments)).encode() + b"\0")


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("nvidia-powerd", (), "nvidia-powerd runs here (pid 77)"),
        ("nv-hostengine", ("-n",), "DCGM runs here (pid 77)"),
        ("zeusd", ("serve",), "zeusd runs here (pid 77)"),
        ("geopmd", (), "GEOPM runs here (pid 77)"),
        ("python3", ("/app/power_agent.py",), "NVIDIA Dynamo power agent runs here (pid 77)"),
        ("slurmd", ("-D",), "slurmd runs here"),
    ],
)
def test_other_managers_are_seen_and_have_a_remedy(tmp_path: Path, name: str, arguments: tuple[str, ...], expected: str) -> None:
    process(tmp_path, 77, name, *arguments)
    process(tmp_path, 78, "bash")
    (found,) = checks.managers(tmp_path, {})
    assert found.text == expected
    assert found.level is Level.NOTE
    assert found.remedy


def test_a_slurm_step_with_its_own_clocks_is_a_problem(tmp_path: Path) -> None:
    (found,) = checks.managers(tmp_path, {"SLURM_GPU_FREQ": "high"})
    assert found.level is Level.PROBLEM
    assert "--gpu-freq=high" in found.text


def test_a_quiet_node_has_no_other_manager(tmp_path: Path) -> None:
    process(tmp_path, 5, "sshd")
    assert [f.level for f in checks.managers(tmp_path, {})] == [Level.OK]


def test_a_missing_driver_is_a_problem_with_a_remedy(tmp_path: Path) -> None:
    (found,) = checks.driver(tmp_path, tmp_path, lambda: None)
    assert found.level is Level.PROBLEM
    assert "no NVIDIA kernel driver" in found.text
    assert found.remedy


def test_what_the_node_says_becomes_findings() -> None:
    sick = replace(
        capability(0), persistence=False, energy_counter=False, mig=True,
        controls={c: Support(False, "lacks CAP_SYS_ADMIN") for c in Control},
    )  # fmt: skip
    view = node(
        gpus=(sick, replace(sick, gpu=capability(1).gpu)), hw_connected=False, control=False, control_why="control = false",
        config_reload_ok=False, config_error="powerd.toml:3: unknown key",
    )  # fmt: skip
    found = checks.node(view)
    texts = " / ".join(f.text for f in found)
    for words in (
        "powerd-hw is not connected", "control = false", "powerd.toml:3: unknown key", "no energy counter",
        "MIG is on", "persistence mode is off", "GPU 0, 1: sm_clock cannot be set: lacks CAP_SYS_ADMIN",
    ):  # fmt: skip
        assert words in texts
    assert {f.check for f in found if f.level is Level.PROBLEM} == {"daemon", "hw unit"}


def test_without_a_daemon_the_rest_is_still_checked(powerctl: Powerctl) -> None:
    answer = powerctl("--socket", "/nowhere/powerd.sock", "doctor", "--json")
    assert answer.code == EXIT_UNAVAILABLE
    found = {f["check"] for f in json.loads(answer.out)}
    assert {"driver", "daemon", "other managers"} <= found


def test_a_good_node_is_told_to_be_good(daemon: FakeDaemon, powerctl: Powerctl) -> None:
    answer = powerctl("doctor", "--json")
    levels = {f["check"]: f["level"] for f in json.loads(answer.out)}
    assert (levels["daemon"], levels["hw unit"], levels["control"]) == ("ok", "ok", "ok")


UUID = "GPU-11111111-1111-4111-8111-111111111111"


def test_after_a_stop_a_setting_that_is_not_undone_is_found(tmp_path: Path) -> None:
    proc, run, state = tmp_path / "proc", tmp_path / "run", tmp_path / "state"
    for folder in (proc, run, state):
        folder.mkdir()
    assert {f.level for f in checks.after_stop(run, state, proc)} == {Level.OK}
    journal = Journal(state, b"\1" * 16, 1, {(UUID, control): None for control in Control})
    journal.intend(UUID, Control.SM_CLOCK, None, Interval(1200, 1200))
    problems = [f.text for f in checks.after_stop(run, state, proc) if f.level is Level.PROBLEM]
    assert problems == [f"not undone: {UUID} sm_clock"]
    journal.done(UUID, Control.SM_CLOCK, Interval(1200, 1200))
    journal.restored(UUID, Control.SM_CLOCK)
    journal.close()
    assert {f.level for f in checks.after_stop(run, state, proc)} == {Level.OK}


def test_after_a_stop_processes_and_sockets_that_stayed_are_found(tmp_path: Path) -> None:
    process(tmp_path / "proc", 9, "python3", "-I", "-m", "powerd.hw", "serve")
    process(tmp_path / "proc", 10, "vim", "powerd.toml")
    (tmp_path / "powerd.sock").touch()
    found = checks.after_stop(tmp_path, tmp_path, tmp_path / "proc")
    assert [f.text for f in found if f.level is Level.PROBLEM] == ["still running: pid 9: python3 -I -m powerd.hw serve"]
    assert any("powerd.sock is still there" in f.text for f in found)
