"""A machine without an NVIDIA driver: every part says so in one line, and says what to do."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.live import Answer, clean_environment, command, wait_for


class Machine:
    """A place for powerd's files and a library path on which NVML cannot be loaded, whatever this machine has."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "libnvidia-ml.so.1").write_bytes(b"not a library")
        self.config = root / "powerd.toml"
        self.config.write_text(
            f'[daemon]\nrun_dir = "{root}/run"\nstate_dir = "{root}/state"\n[hw]\njournal_dir = "{root}/journal"\n'
        )
        self.env = {**clean_environment(), "LD_LIBRARY_PATH": str(root), "POWERD_SOCKET": str(root / "run" / "powerd.sock")}

    def run(self, program: str, *arguments: str) -> Answer:
        done = subprocess.run(
            command(program, *arguments), env=self.env, text=True, capture_output=True, timeout=60, cwd=self.root
        )
        return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def machine(short_folder: Path) -> Machine:
    return Machine(short_folder)


@pytest.fixture
def daemon(machine: Machine) -> Iterator[subprocess.Popen[bytes]]:
    """powerd as a newcomer starts it there."""
    argv = command("powerd", "run", "--config", str(machine.config))
    with (machine.root / "log").open("wb") as log:
        process = subprocess.Popen(argv, env=machine.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        yield process
        process.terminate()
        assert process.wait(30) == 0, "powerd lives without GPUs and ends when it is told to"


def test_hw_says_it_and_ends(machine: Machine) -> None:
    answer = machine.run("powerd", "hw", "serve", "--config", str(machine.config), "--socket", str(machine.root / "hw.sock"))
    assert (answer.code, len(answer.lines), answer.out) == (69, 1, ""), answer.err
    assert "NVML" in answer.lines[0]
    assert "install the NVIDIA driver or use powerd sim run" in answer.lines[0]


def test_a_daemon_passes_the_reason_on_to_whoever_asks(machine: Machine, daemon: subprocess.Popen[bytes]) -> None:
    answers: list[Answer] = []

    def told() -> bool:
        answers.append(machine.run("powerctl", "status"))
        return "install the NVIDIA driver" in answers[-1].err

    wait_for("status gives the reason", told)
    assert (answers[-1].code, len(answers[-1].lines), answers[-1].out) == (75, 1, "")
    doctor = machine.run("powerctl", "doctor", "--json")
    assert doctor.code == 1
    found = {row["check"]: row["level"] for row in doctor.json()}
    assert (found["driver"], found["hw unit"], found["daemon"]) == ("problem", "problem", "ok") or os.path.exists(
        "/dev/nvidiactl"
    )
    refused = machine.run("powerctl", "set", "0", "--for", "1m", "--power-limit", "300W")
    assert (refused.code, len(refused.lines)) == (2, 1)
    assert "GPUs here: none" in refused.lines[0]


def test_a_daemon_that_must_have_gpus_does_not_start(machine: Machine) -> None:
    answer = machine.run("powerd", "run", "--config", str(machine.config), "--require-gpu")
    assert answer.code == 69, answer.err
    assert "no GPU can be read" in answer.lines[-1]
    assert "powerctl doctor" in answer.lines[-1]
    assert "Traceback" not in answer.err
