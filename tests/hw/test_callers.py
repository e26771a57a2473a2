"""Whoever calls powerd-hw: a second one of it, a second powerd, frames that do not parse, other users, systemd."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from powerd.hw import frames
from powerd.hw.frames import Command, Table
from powerd.model import Control
from tests.hw.rig import LIMIT, PATIENCE_S, Powerd, Rig, served

# callers


def test_a_second_powerd_hw_exits_75_with_one_line_and_changes_nothing(rig: Rig) -> None:
    served(rig)
    second = rig.serve()
    _, text = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 75
    assert len(text.splitlines()) == 1
    assert "another one holds" in text


def test_a_second_powerd_is_refused_and_the_first_goes_on(rig: Rig) -> None:
    powerd = served(rig)
    other = Powerd.connect(rig.socket)
    other.until(lambda: other.hello)
    assert other.hello["refused"] == "another powerd is connected"
    seen = powerd.snapshots
    powerd.until(lambda: powerd.snapshots > seen)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\0",
        b"GET / HTTP/1.1\r\n\r\n",
        frames.encode_command(1, 0, Command.PANIC)[:-1],
        frames.encode_desired(1, 0, [])[:-1] + b"xx",
        frames.encode_command(1, 0, Command.PANIC)[:2] + b"\x63" + frames.encode_command(1, 0, Command.PANIC)[3:],
        os.urandom(4000),
    ],
)
def test_a_frame_that_does_not_parse_changes_nothing_and_the_next_connection_serves(rig: Rig, frame: bytes) -> None:
    powerd = served(rig)
    powerd.outcome(powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT)), rig.uuids[0], Control.POWER_LIMIT)
    powerd.link.send(frame or b"\x57")
    powerd.event("frame_refused")
    assert rig.truth(0)["limit_mw"] == 400_000
    powerd.close()
    assert rig.connect().hello["wire"] == frames.WIRE_VERSION


def test_a_wrong_version_in_hello_is_refused_with_what_to_do(rig: Rig) -> None:
    rig.serve()
    powerd = Powerd.connect(rig.socket)
    for frame in frames.encode_table(frames.Kind.HELLO, 0, 0, Table.HELLO, {"wire": 99}):
        powerd.link.send(frame)
    powerd.until(lambda: powerd.hello is not None and "refused" in powerd.hello)
    assert "upgrade" in powerd.hello["refused"]


def test_another_user_is_refused(rig: Rig) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    rig.configure(hw='peer_user = "daemon"')
    rig.serve()
    Powerd.connect(rig.socket).close()
    os.chmod(rig.socket.parent, 0o755)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setuid(65534)
            link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            link.connect(str(rig.socket))
            code = 0 if b"uid 65534 may not connect" in link.recv(frames.MAX_FRAME) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_no_driver_is_one_line_and_69(rig: Rig) -> None:
    child = rig.command("serve", LD_LIBRARY_PATH="", POWERD_SIM_STATE="")
    _, text = child.communicate(timeout=PATIENCE_S)
    assert child.returncode == 69
    assert len(text.splitlines()) == 1
    assert "install the NVIDIA driver" in text


def test_systemd_hears_ready_and_a_watchdog_that_stops_with_the_snapshots(rig: Rig) -> None:
    path = str(rig.socket.parent / "notify")
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(path)
    manager.settimeout(PATIENCE_S)
    serve = rig.command("serve", NOTIFY_SOCKET=path, WATCHDOG_USEC="300000")
    heard = [manager.recv(4096).decode() for _ in range(3)]
    assert any("READY=1" in line for line in heard)
    assert "WATCHDOG=1" in heard
    powerd = rig.connect()
    worker = powerd.until(lambda: powerd.tables.get(Table.STATUS, {}).get("worker_pid"))
    os.kill(worker, signal.SIGSTOP)
    manager.settimeout(1.0)
    silent = False
    for _ in range(20):  # what was under way when the worker stopped, then nothing
        try:
            manager.recv(4096)
        except TimeoutError:
            silent = True
            break
    assert silent
    os.kill(worker, signal.SIGCONT)
    assert manager.recv(4096)
    serve.kill()
    manager.close()
