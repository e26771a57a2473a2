"""Whatever a user gets wrong on a command line: one clear line that says what to do, the right exit code, and nothing changed."""

from __future__ import annotations

import pytest

from powerd.client import Lease
from tests.e2e.live import LiveNode
from tests.e2e.mistakes import (
    UNKNOWN,
    Case,
    assert_one_line,
    ctl,
    daemon,
)

pytestmark = pytest.mark.xdist_group("bad_input")
POWERD = [
    daemon("no such configuration file", "run --config {root}/none.toml", 78, "none.toml", "No such file"),
    daemon("check-config refuses as run does", "check-config {root}/none.toml", 78, "none.toml"),
    daemon("socket path too long", f"run --run-dir {{root}}/{'x' * 99} --state-dir {{root}}/s3", 78, "107", "daemon.run_dir"),
    daemon("unknown command", "rum", 2, "rum", "run", "--help"),
    daemon("unknown option", "run --contrl", 2, "--contrl", "powerd --help"),
    daemon("no command", "", 2, "COMMAND", "--help"),
    daemon("second daemon", "run --config {root}/powerd.toml", 75, "another powerd", "stop it"),
    daemon(
        "second daemon elsewhere, same socket",
        "run --config {root}/powerd.toml --state-dir {root}/s2",
        75,
        "another powerd",
        "stop it",
    ),
    daemon(
        "unknown kill point",
        "run --config {root}/powerd.toml",
        78,
        "POWERD_KILL_AT",
        "hw.intnt",
        "hw.intent.before",
        POWERD_KILL_AT="hw.intnt.before",
    ),
    daemon(
        "hw: unknown kill point", "hw serve --socket {root}/h.sock", 78, "POWERD_KILL_AT", "nowhere", POWERD_KILL_AT="nowhere"
    ),
    daemon(
        "kill point without a number",
        "run --config {root}/powerd.toml",
        78,
        "POWERD_KILL_AT",
        "twice",
        POWERD_KILL_AT="hw.verified:twice",
    ),
    daemon("hw: no such configuration file", "hw serve --config {root}/none.toml", 78, "none.toml"),
    daemon("hw: unknown command", "hw start", 2, "start", "serve", "--help"),
    daemon("sim run: unknown model", "sim run --model h100 -- true", 2, "h100", "h100-sxm", "--help"),
    daemon("sim run: bad time", "sim run --time fast -- true", 2, "fast", "'x20'"),
    daemon("sim run: no command", "sim run", 2, "no command", "-- CMD"),
    daemon("sim run: too many GPUs", "sim run --gpus 99 -- true", 2, "99", "1..16"),
    daemon("sim run: no such program", "sim run -- no-such-program", 127, "no-such-program"),
    daemon("sim run: profile that is not there", "sim run --profile a={root}/a.csv -- true", 2, "a.csv"),
    daemon("sim fault: unknown fault", "sim fault explode", 2, "explode", "lost"),
    daemon("sim fault: unknown GPU", "sim fault lost --gpu 9", 2, "9", "2"),
    daemon("sim show: no node", "sim show", 2, "powerd sim run", POWERD_SIM_STATE=""),
]
POWERCTL = [
    ctl("unknown verb", "stauts", 2, "stauts", "--help"),
    ctl("unknown option", "status --jsn", 2, "--jsn", "--help"),
    ctl("unknown GPU by index", "set 7 --for 1m --sm-clock 1200MHz", 2, "7"),
    ctl("unknown GPU by UUID", f"set {UNKNOWN} --for 1m --sm-clock 1200MHz", 2, UNKNOWN[:12]),
    ctl("explain unknown GPU", f"explain {UNKNOWN}", 2, UNKNOWN[:12]),
    ctl("energy on an unknown GPU", "energy --gpus 7 --for 1s", 2, "7"),
    ctl("watts for a clock", "set 0 --for 1m --sm-clock 300W", 2, "300W", "MHz"),
    ctl("megahertz for a limit", "set 0 --for 1m --power-limit 1200MHz", 2, "1200MHz", "300W"),
    ctl("limit without unit", "set 0 --for 1m --power-limit 300", 2, "300", "300W"),
    ctl("time without unit", "set 0 --for 10 --sm-clock 1200MHz", 2, "10", "10m"),
    ctl("limit out of range", "set 0 --for 1m --power-limit 9000W", 2, "100..500 W"),
    ctl("clock out of range", "set 0 --for 1m --sm-clock 5GHz", 2, "210..1410 MHz"),
    ctl("negative limit", "set 0 --for 1m --power-limit=-300W", 2, "above zero", "300W"),
    ctl("TTL beyond the site's", "set 0 --for 30d --sm-clock 1200MHz", 2, "86400"),
    ctl("no time", "set 0 --sm-clock 1200MHz", 2, "--for"),
    ctl("nothing to set", "set 0 --for 1m", 2, "--sm-clock"),
    ctl("lock and bounds", "set 0 --for 1m --sm-clock 1200MHz --max-sm-clock 1300MHz", 2, "--min-sm-clock"),
    ctl("bounds reversed", "set 0 --for 1m --min-sm-clock 1300MHz --max-sm-clock 900MHz", 2, "1300", "900"),
    ctl("control that the GPU lacks", "set 0 --for 1m --memory-clock 1000MHz", 2, "memory_clock", "sm_clock"),
    ctl("run without wants", "run -- true", 2, "--sm-clock", "powerctl energy"),
    ctl("run an unknown program", "run --sm-clock 1200MHz --gpus 0 -- no-such-program", 127, "no-such-program", "not found"),
    ctl("energy of what", "energy --gpus 0", 2, "-- CMD", "--for"),
    ctl("unknown lease", "lease show l0123", 2, "l0123", "powerctl lease list"),
    ctl("release of an unknown lease", "lease release l0123", 2, "l0123", "powerctl lease list"),
    ctl("release with a wrong token", "lease release {id} --token wrong", 77, "token", "{id}"),
    ctl("renew with a wrong token", "lease renew {id} --token wrong", 77, "token", "{id}"),
    ctl("history since nonsense", "history --since yesterday", 2, "yesterday", "15m"),
    ctl("history reversed", "history --since 1h --until 2h", 2, "since", "until"),
    ctl("history of an unknown column", "history --columns wattage", 2, "wattage"),
    ctl("sweep without command", "sweep --gpus 0", 2, "--help"),
    ctl("sweep of an unknown program", "sweep --gpus 0 -o {root}/s.csv -- no-such-program", 127, "no-such-program", "not found"),
    ctl("energy of an unknown program", "energy -- no-such-program", 127, "no-such-program", "not found"),
    ctl("run what may not be executed", "run --sm-clock 1200MHz -- {root}/powerd.toml", 126, "powerd.toml", "executed"),
    ctl("sweep at unknown clocks", "sweep --clocks fast -o {root}/s.csv -- true", 2, "fast"),
    ctl("resume with an argument", "resume now", 2, "now", "--help"),
    ctl("no daemon", "--socket {root}/none.sock status", 69, "none.sock", "powerd run"),
    ctl("no daemon behind set", "--socket {root}/none.sock set 0 --for 1m --sm-clock 1200MHz", 69, "none.sock", "powerd run"),
    ctl("no daemon at the address", "--url http://127.0.0.1:1 status", 69, "127.0.0.1:1"),
    ctl("address that is none", "--url gpu7 status", 2, "gpu7", "http"),
    ctl("token file that is not there", "--url http://127.0.0.1:1 --token-file {root}/none status", 2, "none"),
]  # fmt: skip


@pytest.mark.parametrize("case", [*POWERD, *POWERCTL], ids=lambda case: case.name)
def test_a_mistake_on_the_command_line(case: Case, live: LiveNode, held: Lease) -> None:
    before = live.state()
    answer = case.how(live, held)
    assert_one_line(case, answer, live, held)
    assert live.state() == before


@pytest.mark.parametrize(
    "line", ["set 0 --for 1m --sm-clock 1200MHz", "set 0 --for 1m --power-limit 300W --dry-run", "run --power-limit 300W -- true"]
)
def test_monitor_only_refuses_to_set(line: str, monitor: LiveNode) -> None:
    before = monitor.state()
    answer = monitor.powerctl(*line.split())
    assert (answer.code, len(answer.lines)) == (77, 1), answer.err
    assert "only monitors" in answer.lines[0]
    assert "control = true" in answer.lines[0]
    assert monitor.state() == before
    assert before["gpus"][0]["setter_calls"] == 0


def test_a_driver_that_does_not_permit(live: LiveNode, held: Lease) -> None:
    before = live.state()
    live.node.fault("permission", permission="none")
    try:
        answer = live.powerctl("set", "0", "--for", "1m", "--power-limit", "300W")
    finally:
        live.node.fault("permission", permission="any")
    assert (answer.code, len(answer.lines), answer.out) == (77, 1, ""), answer.err
    assert "ermission" in answer.lines[0]
    after = live.state()
    for row in (*before["gpus"], *after["gpus"]):
        row.pop("setter_calls")  # the attempt is one
    assert after == before


def test_a_second_hw_on_the_same_journal(live: LiveNode, held: Lease) -> None:
    before = live.state()
    answer = live.powerd("hw", "serve", "--config", str(live.run_dir / "hw" / "powerd.toml"), "--socket", f"{live.root}/hw2.sock")
    assert (answer.code, len(answer.lines), answer.out) == (75, 1, ""), answer.err
    assert "another" in answer.lines[0]
    assert "stop it" in answer.lines[0]
    assert live.state() == before
