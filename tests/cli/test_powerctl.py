"""What a person or a script at the shell relies on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from aiohttp import web

from powerd import api
from powerd.client.codec import decode
from powerd.errors import (
    EXIT_CONFLICT,
    EXIT_DENIED,
    EXIT_OVERRIDDEN,
    EXIT_TIMEOUT,
    EXIT_UNAVAILABLE,
    EXIT_USAGE,
)
from powerd.model import Event, Verdict
from tests.cli.conftest import Powerctl
from tests.client.fake_daemon import UUIDS, FakeDaemon, node

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
READS = {
    "status": ["status", "--json"],
    "explain": ["explain", "0", "--json"],
    "history": ["history", "--json"],
    "events": ["events", "--json"],
    "lease_list": ["lease", "list", "--json"],
    "lease_acquire": ["lease", "acquire", "--gpus", "0", "--sm-clock", "1200MHz", "--dry-run", "--json"],
    "energy": ["energy", "--for", "1ms", "--gpus", "0", "--json"],
    "jobs": ["jobs", "--json"],
    "jobs_table": ["jobs"],
    "jobs_page": ["jobs", "4711"],
    "replicas": ["replicas", "--json"],
    "replicas_table": ["replicas"],
    "status_table": ["status"],
    "explain_page": ["explain", "0"],
    "history_table": ["history"],
}


@pytest.mark.parametrize("name", READS)
def test_outputs_that_people_parse_stay_as_they_are(daemon: FakeDaemon, powerctl: Powerctl, name: str) -> None:
    answer = powerctl(*READS[name])
    assert answer.code == 0, answer.err
    text = "\n".join(line.rstrip() for line in answer.out.splitlines()) + "\n"
    file = GOLDEN / f"powerctl_{name}.{'json' if '--json' in READS[name] else 'txt'}"
    if os.environ.get("POWERD_WRITE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), f"POWERD_WRITE_GOLDEN=1 pytest {__file__} writes it anew"


def test_json_is_the_apis_own_types(daemon: FakeDaemon, powerctl: Powerctl) -> None:
    assert decode(api.Explain, json.loads(powerctl("explain", "1", "--json").out)).uuid == UUIDS[1]
    assert decode(tuple[Event, ...], json.loads(powerctl("events", "--json").out))[0].kind == "lease_granted"
    status = json.loads(powerctl("status", "--json").out)
    assert decode(api.NodeView, status["node"]) == node()


def test_set_is_a_detached_lease_with_an_end(daemon: FakeDaemon, powerctl: Powerctl) -> None:
    answer = powerctl("set", "0", "1", "--sm-clock", "1.2GHz", "--power-limit", "300W", "--for", "10m", "--reason", "cold aisle")
    assert answer.code == 0
    assert "lease lease-1: GPU 0, 1: sm_clock 1200 MHz; power_limit <= 300 W for 600 s (simulated" in answer.out
    (view,) = daemon.leases.values()
    assert (view.detached, view.ttl_s, view.reason, view.gpus) == (True, 600, "cold aisle", UUIDS)


@pytest.mark.parametrize(
    "words",
    [
        ["set", "0", "--sm-clock", "1200MHz", "--for", "1m", "--dry-run"],
        ["lease", "acquire", "--gpus", "0", "--sm-clock", "1200MHz", "--dry-run"],
        ["run", "--gpus", "0", "--sm-clock", "1200MHz", "--dry-run", "--", "touch", "never"],
        ["sweep", "--gpus", "0", "--dry-run", "-o", "never.csv", "--", "touch", "never"],
        ["panic", "--dry-run"],
        ["quiesce", "--dry-run"],
        ["resume", "--dry-run"],
    ],
)
def test_a_dry_run_says_what_would_happen_and_changes_nothing(
    daemon: FakeDaemon, powerctl: Powerctl, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = powerctl(*words)
    assert answer.code == 0, answer.err
    assert "nothing was changed" in answer.out + answer.err
    assert "simulated" in answer.out + answer.err
    assert daemon.leases == {}
    assert list(tmp_path.iterdir()) == []
    written = [(m, p) for m, p, body, _ in daemon.requests if m != "GET" and not (body or {}).get("dry_run")]
    assert written == []


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (
            ["set", "0", "--sm-clock", "1200", "--for", "1m"],
            EXIT_USAGE,
            "'1200' has no unit: is it a clock? (write it like 1200MHz)",
        ),
        (["set", "0", "--for", "1m"], EXIT_USAGE, "nothing to set"),
        (["set", "0", "--sm-clock", "1200MHz"], EXIT_USAGE, "Missing option '--for'."),
        (["set", "7", "--sm-clock", "1200MHz", "--for", "1m"], EXIT_USAGE, "no GPU '7' on this node (GPUs here: 0, 1;"),
        (["set", "0", "--sm-clock", "1GHz", "--min-sm-clock", "1GHz", "--for", "1m"], EXIT_USAGE, "locks the clock to one value"),
        (["lease", "release", "gone"], EXIT_CONFLICT, "lease gone has ended"),
        (["nonsense"], EXIT_USAGE, "No such command 'nonsense'."),
        (["energy"], EXIT_USAGE, "measure what?"),
        (["run", "--gpus", "0", "--", "true"], EXIT_USAGE, "nothing to set"),
        (["history", "--plot", "x.bmp"], EXIT_USAGE, "a picture ends in .svg, .png, .pdf"),
        (["sweep", "--gpus", "0", "--clocks", "fast", "--", "true"], EXIT_USAGE, "'fast' names no clocks"),
        (["sweep", "--gpus", "0", "--slowdowns", "five", "--", "true"], EXIT_USAGE, "write percentages such as 0,5,10"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(
    daemon: FakeDaemon, powerctl: Powerctl, words: list[str], code: int, line: str
) -> None:
    answer = powerctl(*words)
    assert answer.code == code
    assert answer.out == ""
    assert answer.err.count("\n") == 1
    assert answer.err.startswith("powerctl: ")
    assert line in answer.err
    assert daemon.leases == {}


def test_exit_codes_tell_what_became_of_a_want(daemon: FakeDaemon, powerctl: Powerctl) -> None:
    words = ["set", "0", "--sm-clock", "1200MHz", "--for", "1m"]
    for verdict, code in ((Verdict.PENDING_LOAD, 0), (Verdict.PENDING, 0), (Verdict.OVERRIDDEN, EXIT_OVERRIDDEN)):
        daemon.verdict = verdict
        assert powerctl(*words).code == code
    daemon.refuse = True
    answer = powerctl(*words)
    assert answer.code == EXIT_CONFLICT
    assert "GPU 0 sm_clock: not served: lease-0 holds less" in answer.err
    daemon.node = node(control=False)
    assert powerctl(*words).code == EXIT_DENIED
    daemon.fault = lambda request: daemon.error(504, "timeout", "hw did not answer")
    assert powerctl("status").code == EXIT_TIMEOUT
    assert powerctl("--socket", "/nowhere/powerd.sock", "status").code == EXIT_UNAVAILABLE


def shell(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "powerd.cli.main", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 9", 9), ("kill -TERM $$", 143), ("kill -KILL $$", 137)])
def test_run_ends_as_its_command_ends_and_tells_the_energy(
    daemon: FakeDaemon, powerctl: Powerctl, script: str, code: int
) -> None:
    answer = powerctl("run", "--gpus", "0", "--sm-clock", "1200MHz", "--", "sh", "-c", f"echo out; {script}")
    assert answer.code == code
    assert answer.out == "out\n"
    assert "1234.5 J (1230.0 J to 1239.0 J) in 4.00 s, 308.6 W on 1 GPU (simulated, time x20)" in answer.err
    assert daemon.leases == {}


def test_a_command_that_does_not_exist_is_127_and_leaves_nothing(daemon: FakeDaemon, powerctl: Powerctl) -> None:
    answer = powerctl("run", "--gpus", "0", "--sm-clock", "1200MHz", "--", "no-such-command-here")
    assert answer.code == 127
    assert "no-such-command-here: command not found" in answer.err
    assert daemon.leases == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_the_command(daemon: FakeDaemon, number: signal.Signals) -> None:
    script = (
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda n, f: sys.exit(40 + n))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    child = shell("run", "--gpus", "0", "--sm-clock", "1200MHz", "--", sys.executable, "-c", script)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    assert len(daemon.leases) == 1
    child.send_signal(number)
    child.communicate(timeout=20)
    assert child.returncode == 40 + number
    assert daemon.wait(lambda: not daemon.leases)


def test_killing_powerctl_ends_its_lease(daemon: FakeDaemon, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = shell("run", "--gpus", "0", "--sm-clock", "1200MHz", "--", "sh", "-c", f"echo $$ > {pid_file}; exec sleep 30")
    try:
        assert daemon.wait(lambda: len(daemon.attached) == 1)
        while not pid_file.exists() or not pid_file.read_text().strip():
            time.sleep(0.01)
        child.kill()
        child.wait()
        assert daemon.wait(lambda: not daemon.leases)
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
        child.communicate(timeout=20)


def test_run_tells_when_the_lease_was_lost_meanwhile(daemon: FakeDaemon, tmp_path: Path) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    child = shell("run", "--gpus", "0", "--sm-clock", "1200MHz", "--", "sh", "-c", f"read x < {go}")
    assert daemon.wait(lambda: len(daemon.attached) == 1)
    (view,) = daemon.leases.values()
    ended = api.ErrorView("lease_lost", "panic ended this lease", "powerctl resume", "request")
    daemon.attached[view.id].sendall(json.dumps({"error": encode(ended)}).encode())
    heard = daemon.wait(lambda: view.id not in daemon.attached, 0.3)
    go.write_text("x\n")
    _, err = child.communicate(timeout=20)
    assert child.returncode == EXIT_CONFLICT, (heard, err)
    assert "the lease was lost while the command ran: panic ended this lease" in err


def test_run_ends_as_its_command_did_when_the_daemon_went_away_meanwhile(daemon: FakeDaemon, tmp_path: Path) -> None:
    async def silence(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/end") and request.transport is not None:
            request.transport.close()
        await daemon._stop.wait()
        return web.Response()

    began = tmp_path / "began"
    script = f"touch {began}; while test -e {began}; do sleep 0.01; done; exit 7"
    child = shell("--timeout", "0.2", "run", "--gpus", "0", "--sm-clock", "1200MHz", "--", "sh", "-c", script)
    while not began.exists():
        time.sleep(0.01)
    daemon.fault = silence
    began.unlink()
    _, err = child.communicate(timeout=30)
    assert child.returncode == 7, err
    assert "energy is not known" in err


def encode(value: object) -> object:
    from powerd.client.codec import encode as to_json

    return to_json(value)


def test_energy_of_a_command_keeps_its_exit_code(daemon: FakeDaemon, powerctl: Powerctl) -> None:
    answer = powerctl("energy", "--gpus", "0", "--", "sh", "-c", "exit 5")
    assert answer.code == 5
    assert "1234.5 J" in answer.err


def test_history_is_drawn(daemon: FakeDaemon, powerctl: Powerctl, tmp_path: Path) -> None:
    file = tmp_path / "h.svg"
    assert powerctl("history", "--plot", str(file)).code == 0
    assert "simulated" in file.read_text(encoding="utf-8") or file.stat().st_size > 5000


def test_top_shows_pictures_and_ends(daemon: FakeDaemon, powerctl: Powerctl) -> None:
    answer = powerctl("top", "-n", "2", "-d", "0.1")
    assert answer.code == 0
    assert "NVIDIA A100-SXM4-80GB" in answer.out
    assert "simulated" in answer.out


def test_light_verbs_do_not_load_heavy_libraries() -> None:
    code = (
        "import sys, powerd.cli.main as m; m.build()\n"
        "print(*sorted({'rich', 'matplotlib', 'numpy', 'msgspec', 'aiohttp', 'asyncio', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
