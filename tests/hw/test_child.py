"""powerd-hw as the child of a development ``powerd run``: the parent's command line and reloads reach it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator

import pytest

from tests.e2e.test_daemon_on_simulated_node import SimRig


@pytest.fixture
def monitor() -> Iterator[SimRig]:
    """Up with ``--control`` on the command line while the file says nothing of it."""
    made = SimRig()
    made.write("[hw]\nmin_dwell_s = 0.2\n")
    made.up()
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.terminate()
        made.process.wait(30)
    made.node.close()
    shutil.rmtree(made.folder, ignore_errors=True)


def test_control_on_the_command_line_and_a_reload_reach_the_child(monitor: SimRig) -> None:
    child_file = monitor.folder / "run" / "hw" / "powerd.toml"
    assert "daemon.control = true" in child_file.read_text()
    assert monitor.get("/v1/node")["control"] is True
    monitor.write("[hw]\nmin_dwell_s = 0.2\ngrace_s = 7\n")
    assert monitor.process is not None
    monitor.process.send_signal(signal.SIGHUP)
    monitor.until(lambda: [e for e in monitor.events("config_reloaded") if e["subject"] == "powerd-hw"], "hw did not reload")
    assert "hw.grace_s = 7.0" in child_file.read_text()
    assert monitor.get("/v1/node")["control"] is True


def test_the_panic_file_reaches_the_child(monitor: SimRig) -> None:
    (monitor.folder / "panic").touch()
    monitor.until(lambda: [e for e in monitor.events("panic") if e["subject"] == "powerd-hw"], "hw did not see the file")
    assert monitor.get("/v1/node")["panic"] is True
