"""The harness itself, on a service of its own: what the tests of powerd's units rely on is really there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.real import nspawn

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("systemd")]

STAND_IN = """
[Service]
Type=notify
ExecStart=/bin/sh -c 'systemd-notify --ready; exec sleep infinity'
NotifyAccess=all
ExecStopPost=/bin/sh -c 'echo $SERVICE_RESULT >> /run/after'
Restart=always
RestartSec=0
"""


def mounts_below(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(folder) in line]


def test_a_service_starts_is_killed_and_comes_back(tmp_path: Path) -> None:
    nspawn.require()
    shared = tmp_path / "shared"
    shared.mkdir()
    with nspawn.booted(shared) as container:
        container.write("/etc/systemd/system/stand-in.service", STAND_IN)
        container.run("systemctl daemon-reload && systemctl start stand-in.service")
        assert container.show("stand-in.service", "ActiveState") == "active"
        container.run("systemctl kill --signal=KILL stand-in.service")
        container.wait("test $(systemctl show -P NRestarts stand-in.service) -ge 1 && systemctl is-active stand-in.service")
        assert container.run("cat /run/after").stdout == "signal\n"
        assert container.run("false", check=False).returncode == 1
        assert mounts_below(tmp_path) == []
    assert container.process.returncode == 0, "it did not power off by itself"


HOLDER = """
import sys, time
from pathlib import Path
from tests.real import nspawn
with nspawn.booted(Path(sys.argv[1])) as container:
    print(container.leader, flush=True)
    time.sleep(600)
"""


def test_nothing_is_left_of_a_container_whose_test_is_killed(tmp_path: Path) -> None:
    nspawn.require()
    shared = tmp_path / "shared"
    shared.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(nspawn.__file__).parent)}
    command = [sys.executable, "-c", HOLDER, str(shared)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        leader = int(holder.stdout.readline())
        watch = os.pidfd_open(leader)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    until = time.monotonic() + 20
    while True:
        try:
            signal.pidfd_send_signal(watch, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < until, "the container outlived its test"
        time.sleep(0.05)
    os.close(watch)
    assert mounts_below(tmp_path) == []
