"""`powerctl dashboard` as a command: what it prints, what it opens, what it leaves behind."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from powerd.errors import EXIT_UNAVAILABLE, EXIT_USAGE
from tests.cli.conftest import Powerctl
from tests.client.fake_daemon import FakeDaemon
from tests.e2e.live import wait_for

# A browser: notes its command line, keeps what the file says, and who may read it.
_BROWSER = """#!/bin/sh
printf '%s\\n' "$0 $*" > {folder}/argv
file="${{1#file://}}"
stat -c %a "$file" "${{file%/*}}" > {folder}/modes
cp "$file" {folder}/opened.html
"""


@pytest.fixture
def started(daemon: FakeDaemon, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command with a browser that only takes notes."""
    browser = tmp_path / "browser"
    browser.write_text(_BROWSER.format(folder=tmp_path))
    browser.chmod(browser.stat().st_mode | stat.S_IXUSR)
    env = {**os.environ, "BROWSER": str(browser), "TMPDIR": str(tmp_path)}
    argv = [sys.executable, "-m", "powerd.cli.main", "dashboard"]
    process = subprocess.Popen(argv, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_browser_is_opened_by_a_file_that_goes_when_the_link_is_used(
    started: subprocess.Popen[str], tmp_path: Path, ending: signal.Signals
) -> None:
    assert started.stdout is not None
    line = started.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)(/\?token=([\w-]{40,}))", line)
    assert found, line
    wait_for("the browser was started", lambda: (tmp_path / "opened.html").exists() and (tmp_path / "opened.html").read_text())
    assert found[3] in (tmp_path / "opened.html").read_text()
    assert found[3] not in (tmp_path / "argv").read_text(), "everybody sees command lines"
    assert (tmp_path / "modes").read_text().split() == ["600", "700"]
    assert list(tmp_path.glob("powerd-*"))
    link = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=10)
    link.request("GET", found[2])
    assert link.getresponse().status == 200
    link.close()
    wait_for("the file is gone", lambda: not list(tmp_path.glob("powerd-*")))
    started.send_signal(ending)
    assert started.wait(10) == 0


def test_a_link_nobody_used_leaves_no_file_either(started: subprocess.Popen[str], tmp_path: Path) -> None:
    wait_for("the browser was started", (tmp_path / "opened.html").exists)
    started.send_signal(signal.SIGINT)
    assert started.wait(10) == 0
    assert list(tmp_path.glob("powerd-*")) == []


def test_a_port_that_is_taken_is_a_line(daemon: FakeDaemon, powerctl: Powerctl) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        answer = powerctl("dashboard", "--no-open", "--port", str(taken.getsockname()[1]))
    assert (answer.code, answer.out) == (EXIT_USAGE, "")
    assert "--port" in answer.err


def test_without_a_daemon_there_is_no_link(daemon: FakeDaemon, powerctl: Powerctl, tmp_path: Path) -> None:
    answer = powerctl("--socket", str(tmp_path / "none"), "dashboard", "--no-open")
    assert (answer.code, answer.out) == (EXIT_UNAVAILABLE, "")
