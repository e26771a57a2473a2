"""How powerd starts, refuses to start, talks to its service manager, and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.daemon_rig import Rig, pin


def powerd(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "powerd.main", *words], capture_output=True, text=True, timeout=60)


def test_a_second_powerd_says_so_and_exits_75_whether_it_shares_state_or_sockets(own: Rig) -> None:
    own.start()
    assert own.process is not None
    same = subprocess.run(own.command(), capture_output=True, text=True, timeout=60)
    assert same.returncode == 75
    assert f"another powerd (pid {own.process.pid}) is running" in same.stderr
    elsewhere = subprocess.run(
        [*own.command(), "--state-dir", str(own.folder / "s2")], capture_output=True, text=True, timeout=60
    )
    assert elsewhere.returncode == 75
    assert "it answers at" in elsewhere.stderr
    assert own.get("/v1/node")["hw_connected"] is True, "the first one goes on"


def test_the_socket_of_a_killed_powerd_is_replaced_and_a_clean_end_leaves_none(own: Rig) -> None:
    own.start()
    own.stop(signal.SIGKILL)
    assert own.socket.exists()
    own.start()
    assert own.socket.stat().st_mode & 0o777 == 0o666
    assert own.stop() == 0
    assert not own.socket.exists()
    assert not own.socket.with_name("attach.sock").exists()


def test_a_bad_configuration_is_refused_with_line_and_remedy_and_exit_78(own: Rig) -> None:
    own.config.write_text("[daemon]\ncontrol = true\nreatach_s = 3\n")
    for result in (
        subprocess.run(own.command(), capture_output=True, text=True, timeout=60),
        powerd("check-config", str(own.config)),
    ):
        assert result.returncode == 78
        assert f"{own.config}:3" in result.stderr
        assert "reattach_s" in result.stderr
    own.config.write_text("[daemon]\ncontrol = true\n")
    good = powerd("check-config", str(own.config))
    assert (good.returncode, good.stdout.strip()) == (0, f"{own.config}: good")
    assert powerd("check-config", str(own.folder / "none.toml")).returncode == 78


def test_a_socket_path_that_is_too_long_is_one_clear_line(own: Rig) -> None:
    result = subprocess.run(
        [*own.command(), "--run-dir", str(own.folder / ("x" * 120))], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, "daemon.run_dir" in result.stderr) == (78, True)


def test_without_hw_it_serves_says_why_and_comes_up_when_hw_does(own: Rig) -> None:
    path = own.hw.path
    own.hw.close()
    own.start(wait=False)
    node = own.until(lambda: own.get("/v1/node"), "no answer")
    assert (node["hw_connected"], node["gpus"], node["control"]) == (False, [], False)
    assert str(path) in own.until(lambda: "hw.sock" in (w := own.get("/v1/node")["control_why"]) and w, "no reason")
    assert own.request("GET", "/v1/snapshot")[0] == 503
    assert own.request("GET", "/healthz")[0] == 503
    assert own.acquire(pin(1200))[1]["error"]["code"] == "unavailable"
    from tests.e2e.fake_hw import FakeHw

    own.hw = FakeHw(path)
    own.until(lambda: own.request("GET", "/healthz")[0] == 200, "did not connect")
    assert own.granted(pin(1200), detached=True)["state"] == "active"


@pytest.mark.parametrize(
    ("wire", "refused", "says"), [(99, "", "upgrade powerd and powerd-hw together"), (None, "no such user", "no such user")]
)
def test_hw_of_another_version_or_that_refuses_is_named(own: Rig, wire: int | None, refused: str, says: str) -> None:
    own.hw.wire, own.hw.refused = wire or own.hw.wire, refused
    own.start(wait=False)
    own.until(lambda: says in own.get("/v1/node")["control_why"], "no reason")
    assert own.hw.tables == []


def test_it_tells_its_service_manager_and_feeds_the_watchdog(own: Rig) -> None:
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.settimeout(15)
    with contextlib.closing(manager):
        manager.bind(str(own.folder / "notify"))
        own.start(NOTIFY_SOCKET=str(own.folder / "notify"), WATCHDOG_USEC="600000")
        heard = ""
        while heard.count("WATCHDOG=1") < 3:
            heard += manager.recv(1000).decode() + "\n"
        assert "READY=1" in heard
        assert "STATUS=control" in heard
        assert own.process is not None
        own.process.send_signal(signal.SIGHUP)
        while "RELOADING=1" not in heard:
            heard += manager.recv(1000).decode() + "\n"
        own.process.send_signal(signal.SIGSTOP)
        manager.settimeout(0.7)
        with contextlib.suppress(TimeoutError):
            while "WATCHDOG" in manager.recv(1000).decode():
                heard += "late\n"
        assert heard.count("late") <= 2, "a powerd that stands still fed the watchdog"
        manager.settimeout(15)
        own.process.send_signal(signal.SIGCONT)
        own.stop()
        while "STOPPING=1" not in heard:
            heard += manager.recv(1000).decode() + "\n"


_ACTIVATE = """
import os, socket, sys
made = []
for name, kind in (("powerd.sock", socket.SOCK_STREAM), ("attach.sock", socket.SOCK_SEQPACKET)):
    s = socket.socket(socket.AF_UNIX, kind); s.bind(os.path.join(sys.argv[1], name)); s.listen(8); made.append(s)
for number, s in enumerate(made):
    os.dup2(s.fileno(), 10 + number)
for number in range(2):
    os.dup2(10 + number, 3 + number); os.set_inheritable(3 + number, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="api:attach")
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_sockets_of_the_service_manager_are_used_and_stay(own: Rig) -> None:
    run = own.folder / "run"
    run.mkdir()
    own.process = subprocess.Popen([sys.executable, "-c", _ACTIVATE, str(run), *own.command()], text=True)
    own.until(lambda: own.get("/v1/node")["gpus"], "no answer")
    lease = own.until(lambda: own.acquire(pin(1200))[1].get("token") and own.get("/v1/leases")[0], "no lease")
    assert lease["state"] == "active"
    own.stop()
    assert own.socket.exists(), "it is the manager's: connections wait there for the next powerd"


def test_a_stopped_powerd_leaves_leases_to_the_next_one_and_to_the_grace_of_hw(own: Rig) -> None:
    own.start()
    lease = own.granted(pin(1200), detached=True)
    own.stop()
    assert own.hw.desired, "hw decides by its own grace"
    own.start()
    assert own.lease(lease)["state"] == "active"


def test_log_lines_are_single_lines_of_state_changes(own: Rig) -> None:
    own.start()
    own.granted(pin(1200), detached=True, reason='x" event=forged')
    own.stop()
    lines = own.log().splitlines()
    assert all(line.startswith("event=") for line in lines), lines
    assert [line.split()[0] for line in lines if "lease" in line] == ["event=lease_granted"]
    assert 'detail="x\\" event=forged"' in own.log()
    assert len(lines) < 20, "no line per sample"


def test_hw_and_restore_are_handed_to_the_privileged_side(tmp_path: Path) -> None:
    assert "powerd-hw" in powerd("hw", "--help").stdout
    config = tmp_path / "powerd.toml"
    config.write_text(f'[hw]\njournal_dir = "{tmp_path}/journal"\nrun_dir = "{tmp_path}/run"\n')
    assert powerd("restore", "--config", str(config)).returncode == 0


def test_usage_errors_exit_2() -> None:
    assert powerd("run", "--contrl").returncode == 2
    assert powerd("rnu").returncode == 2
    assert powerd().returncode == 2


@pytest.mark.skipif(os.geteuid() != 0 and not os.environ.get("CI"), reason="giving a folder away needs root")
def test_a_state_directory_of_somebody_else_is_refused(own: Rig) -> None:
    foreign = own.folder / "foreign"
    foreign.mkdir()
    os.chown(foreign, 65534, 65534)
    result = subprocess.run([*own.command(), "--state-dir", str(foreign)], capture_output=True, text=True, timeout=60)
    assert (result.returncode, "belongs to another user" in result.stderr) == (78, True)
