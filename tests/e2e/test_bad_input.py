"""Whatever a user gets wrong: one clear line that says what to do, the right exit code or status, and nothing changed.

House rules: a mistake is a row of a table; the node holds a lease all the while, so that undoing too much shows as well as
setting too much; a driver call is a change.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from powerd.api import API_HEADER, API_VERSION, LEASE_TOKEN_HEADER
from powerd.client import Lease
from powerd.errors import CODES
from tests.e2e.live import Answer, LiveNode, wait_for

pytestmark = pytest.mark.xdist_group("bad_input")
UNKNOWN = "GPU-00000000-0000-0000-0000-000000000000"
MAX_LINE = 400
ALSO_RUN = ("unknown key", "TCP address", "token file that everybody reads")  # starting the daemon takes longer


@pytest.fixture(scope="module")
def held(live: LiveNode) -> Iterator[Lease]:
    """What must survive every mistake: GPU 1 at 1200 MHz and 400 W."""
    lease = live.client.lease(
        [live.uuids[1]], sm_clock_mhz=1200, power_limit_w=400, reason="must survive", ttl_s=3600, detached=True
    )
    yield lease
    lease.release()


@dataclass(frozen=True)
class Case:
    """A mistake (name and how it is made), the code that must come back, and words that the answer must have."""

    name: str
    how: Callable[[LiveNode, Lease], Answer]
    code: int | str  # an exit code, or a name of powerd.errors.CODES for answers of the API
    words: tuple[str, ...]


def ctl(name: str, line: str, code: int, *words: str) -> Case:
    """A mistake on powerctl's command line."""
    return Case(name, lambda live, held: live.powerctl(*_words(line, live, held)), code, words)


def daemon(name: str, line: str, code: int, *words: str, **env: str) -> Case:
    """A mistake on powerd's command line."""
    return Case(name, lambda live, held: live.powerd(*_words(line, live, held), env=env), code, words)


def config(name: str, text: str, *words: str, mode: int = 0o644) -> Case:
    """A configuration file that powerd refuses to start with, whoever asks it."""

    def how(live: LiveNode, held: Lease) -> Answer:
        file = live.root / "bad.toml"
        file.write_bytes(text.format(root=live.root).encode("latin-1"))
        file.chmod(mode)
        answer = live.powerd("check-config", str(file))
        if name in ALSO_RUN:
            assert live.powerd("run", "--config", str(file)) == answer, "what check-config refuses, run refuses in the same words"
        return answer

    return Case(f"config: {name}", how, 78, words)


def api(name: str, method: str, path: str, body: Any, code: str, *words: str, tcp: bool = False, **headers: str) -> Case:
    """A request that is wrong; ``{id}``, ``{gpu}`` and ``{gpu1}`` in path and body stand for what is there."""

    def how(live: LiveNode, held: Lease) -> Answer:
        data = body if isinstance(body, bytes) or body is None else json.loads(_fill(json.dumps(body), live, held))
        return live.http(method, _fill(path, live, held), data, tcp=tcp, **headers)

    return Case(f"api: {name}", how, code, words)


def attach(name: str, message: bytes | dict[str, str], code: str, *words: str) -> Case:
    """A first message on the attach socket that is wrong."""

    def how(live: LiveNode, held: Lease) -> Answer:
        data = message if isinstance(message, bytes) else _fill(json.dumps(message), live, held).encode()
        return live.attach(data)

    return Case(f"attach: {name}", how, code, words)


def stranger(name: str, method: str, path: str, body: Any, code: str, *words: str) -> Case:
    """A request that needs a right, by a user who has none."""

    def how(live: LiveNode, held: Lease) -> Answer:
        data = None if body is None else json.loads(_fill(json.dumps(body), live, held))
        return live.http_as_nobody(method, _fill(path, live, held), data)

    return Case(f"stranger: {name}", how, code, words)


def _fill(text: str, live: LiveNode, held: Lease) -> str:
    places = {
        "{id}": held.id,
        "{token}": held.token or "",
        "{gpu}": live.uuids[0],
        "{gpu1}": live.uuids[1],
        "{root}": str(live.root),
    }
    return re.sub("|".join(map(re.escape, places)), lambda match: places[match[0]], text)


def _words(line: str, live: LiveNode, held: Lease) -> list[str]:
    return _fill(line, live, held).split()


def lease_body(**changes: Any) -> dict[str, Any]:
    """A good request for a lease on GPU 0, with something changed."""
    good = {"gpus": ["{gpu}"], "wants": [{"control": "sm_clock", "high": 1200}], "reason": "test", "detached": True}
    return {**good, **changes}


def clock(**bounds: Any) -> list[dict[str, Any]]:
    """One want for the SM clock."""
    return [{"control": "sm_clock", **bounds}]


CONFIG = [
    config("unknown key", "[daemon]\ncontrl = true\n", "bad.toml:2", "contrl", "did you mean 'control'"),
    config("unknown section", "[deamon]\ncontrol = true\n", "bad.toml:1", "deamon", "did you mean 'daemon'"),
    config("out of range", "[hw]\n\nsample_hz = 5000\n", "bad.toml:3", "hw.sample_hz", "1..100"),
    config("wrong type", '[daemon]\ncontrol = "yes"\n', "bad.toml:2", "daemon.control", "expected bool"),
    config("unknown choice", '[hw]\ndrift = "fight"\n', "bad.toml:2", "fight", "yield, warn, enforce"),
    config("not TOML", "[daemon\ncontrol = true\n", "bad.toml", "line 1"),
    config("bounds reversed", "[limits]\nsm_clock_min_mhz = 1400\nsm_clock_max_mhz = 300\n", "bad.toml", "1400", "300", "above"),
    config("not UTF-8", '[access]\ngroup = "caf\xe9"\n', "bad.toml", "UTF-8"),
    config("writable by others", "[daemon]\ncontrol = true\n", "bad.toml", "others can write", "chmod", mode=0o666),
    config("TCP beyond loopback without TLS", '[tcp]\nlisten = "0.0.0.0:9478"\n', "tcp.certificate"),
    config("TCP address", '[tcp]\nlisten = "localhost"\n', "ADDRESS:PORT"),
    config(
        "token file that everybody reads",
        '[tcp]\nlisten = "127.0.0.1:1"\ntoken_file = "{root}/powerd.toml"\n',
        "token_file",
        "chmod 0600",
    ),
]

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

API = [
    api("malformed JSON", "POST", "/v1/leases", b'{"gpus": [', "bad_request", "JSON"),
    api("not an object", "POST", "/v1/leases", b"[]", "bad_request", "JSON object"),
    api("empty body", "POST", "/v1/leases", b"", "bad_request", "JSON"),
    api("not UTF-8", "POST", "/v1/leases", b'{"reason": "\xff"}', "bad_request", "JSON"),
    api("nested without end", "POST", "/v1/leases", b"[" * 60_000, "bad_request", "JSON"),
    api("unknown field", "POST", "/v1/leases", lease_body(gpu="0"), "bad_request", "gpu", "did you mean 'gpus'"),
    api("unknown field inside", "POST", "/v1/leases", lease_body(wants=clock(hgih=1200)), "bad_request", "hgih", "high"),
    api("missing field", "POST", "/v1/leases", {"gpus": ["{gpu}"]}, "bad_value", "wants"),
    api("wrong type", "POST", "/v1/leases", lease_body(ttl_s="1h"), "bad_value", "ttl_s"),
    api("unknown control", "POST", "/v1/leases", lease_body(wants=[{"control": "fan", "high": 1}]), "bad_value", "fan"),
    api("unknown UUID", "POST", "/v1/leases", lease_body(gpus=[UNKNOWN]), "unknown_gpu", UNKNOWN),
    api("one good and one unknown UUID", "POST", "/v1/leases", lease_body(gpus=["{gpu}", UNKNOWN]), "unknown_gpu", UNKNOWN),
    api("no GPU", "POST", "/v1/leases", lease_body(gpus=[]), "bad_value", "at least one UUID"),
    api("a GPU twice", "POST", "/v1/leases", lease_body(gpus=["{gpu}", "{gpu}"]), "bad_value", "twice"),
    api("no want", "POST", "/v1/leases", lease_body(wants=[]), "bad_value", "at least one control"),
    api("no bound", "POST", "/v1/leases", lease_body(wants=clock()), "bad_value", "low, high", "MHz"),
    api("bound below zero", "POST", "/v1/leases", lease_body(wants=clock(high=-5)), "bad_value", "above 0 MHz"),
    api("bounds reversed", "POST", "/v1/leases", lease_body(wants=clock(low=1300, high=900)), "bad_value", "1300", "900"),
    api("out of range", "POST", "/v1/leases", lease_body(wants=clock(low=9000)), "bad_value", "210..1410 MHz"),
    api("fraction of a megahertz", "POST", "/v1/leases", lease_body(wants=clock(high=1200.5)), "bad_value", "int"),
    api("number beyond 64 bits", "POST", "/v1/leases", lease_body(wants=clock(high=10**30)), "bad_value", "sm_clock"),
    api("no reason", "POST", "/v1/leases", lease_body(reason=" "), "bad_value", "reason"),
    api("reason with control characters", "POST", "/v1/leases", lease_body(reason="a\x1b[2Jb"), "bad_value", "printable"),
    api("negative TTL", "POST", "/v1/leases", lease_body(ttl_s=-1), "bad_value", "ttl_s"),
    api("endless TTL", "POST", "/v1/leases", lease_body(ttl_s=1e12), "bad_value", "86400", "heartbeat"),
    api("endless wait", "POST", "/v1/leases", lease_body(wait_s=1e9), "bad_value", "wait_s"),
    api("oversized body", "POST", "/v1/leases", lease_body(reason="x" * 70_000), "bad_request", "65536"),
    api("bad lease token", "DELETE", "/v1/leases/{id}", None, "denied", "token", **{LEASE_TOKEN_HEADER: "wrong"}),
    api("unknown lease", "GET", "/v1/leases/l0123", None, "not_found", "l0123"),
    api("change to nothing", "PATCH", "/v1/leases/{id}", {"wants": []}, "bad_value", "at least one control"),
    api("change out of range", "PATCH", "/v1/leases/{id}", {"wants": clock(low=9000)}, "bad_value", "210..1410 MHz"),
    api("unknown route", "GET", "/v1/snapshots", None, "not_found", "did you mean '/v1/snapshot'"),
    api("wrong method", "PUT", "/v1/node", None, "not_found", "GET"),
    api("unknown query", "GET", "/v1/events?sicne=3", None, "bad_request", "sicne", "since"),
    api("history of nonsense", "GET", "/v1/history?since=yesterday", None, "bad_value", "yesterday", "15m"),
    api("history reversed", "GET", "/v1/history?since=1h&until=2h", None, "bad_value", "since", "until"),
    api("history without end", "GET", "/v1/history?since=nan", None, "bad_value", "nan"),
    api("history of an unknown GPU", "GET", f"/v1/history?gpu={UNKNOWN}", None, "unknown_gpu", UNKNOWN),
    api("history of an unknown column", "GET", "/v1/history?columns=wattage", None, "bad_value", "wattage", "power"),
    api("explain of an unknown GPU", "GET", f"/v1/explain/{UNKNOWN}", None, "unknown_gpu", UNKNOWN),
    api("window on an unknown GPU", "POST", "/v1/windows", {"gpus": [UNKNOWN]}, "unknown_gpu", UNKNOWN),
    api("window on no GPU", "POST", "/v1/windows", {"gpus": []}, "bad_request", "at least one GPU"),
    api("end of an unknown window", "POST", "/v1/windows/w0123/end", None, "not_found", "w0123"),
    api("stream at no rate", "GET", "/v1/stream?hz=often", None, "bad_value", "hz"),
    api("quiesce for ever", "POST", "/v1/quiesce", {"max_s": 1e9}, "bad_value", "max_s"),
    api("other major version", "GET", "/v1/node", None, "version", "2.0", "1.", **{API_HEADER: f"{API_VERSION[0] + 1}.0"}),
    api("older major version", "GET", "/v1/node", None, "version", "0.9", **{API_HEADER: "0.9"}),
    api("version that is none", "GET", "/v1/node", None, "version", "latest", **{API_HEADER: "latest"}),
    api("other major version sets", "POST", "/v1/leases", lease_body(), "version", "install", **{API_HEADER: "2.0"}),
    api("TCP without token", "GET", "/v1/node", None, "denied", "Bearer", tcp=True),
    api("TCP with a wrong token", "POST", "/v1/leases", lease_body(), "denied", "token", tcp=True, Authorization="Bearer x"),
    attach("malformed JSON", b"{", "bad_request", "JSON"),
    attach("unknown field", {"api": "1.0", "lease": "{id}", "tokn": "x"}, "bad_request", "tokn", "token"),
    attach("unknown lease", {"api": "1.0", "lease": "l0123", "token": "x"}, "lease_lost", "acquire"),
    attach("wrong token", {"api": "1.0", "lease": "{id}", "token": "x"}, "lease_lost", "token"),
    attach("other major version", {"api": "2.0", "lease": "{id}", "token": "{token}"}, "version", "2.0"),
    attach("oversized message", b'{"api": "' + b"1" * 5000 + b'"}', "bad_request", "4096"),
]

# Only root can become somebody else to try.
STRANGER = [
    stranger("sets", "POST", "/v1/leases", lease_body(), "denied", "operator", "group"),
    stranger("releases what is not theirs to see", "DELETE", "/v1/leases/{id}", None, "not_found", "{id}"),
    stranger("panics", "POST", "/v1/panic", None, "denied", "operator"),
    stranger("measures another's GPU", "POST", "/v1/windows", {"gpus": ["{gpu}"]}, "denied", "lease"),
    stranger("explains another's GPU", "GET", "/v1/explain/{gpu}", None, "denied", "not yours", "lease"),
    stranger("reads history", "GET", "/v1/history", None, "denied", "open_reads"),
    stranger("reads metrics", "GET", "/metrics", None, "denied", "open_reads"),
]


def assert_one_line(case: Case, answer: Answer, live: LiveNode, held: Lease) -> None:
    """Exactly one line, short enough to be read, with the words that say what is wrong and what to do."""
    assert answer.code == case.code, (answer.out, answer.err)
    assert answer.out == "", "a refusal is no result"
    assert len(answer.lines) == 1, answer.err
    line = answer.lines[0]
    assert re.match(r"(powerctl|powerd-hw|powerd)( [a-z-]+){0,2}: ", line), line
    assert len(line) <= MAX_LINE, line
    assert [word for word in case.words if _fill(word, live, held) not in line] == [], line


def assert_one_error(case: Case, answer: Answer, live: LiveNode, held: Lease) -> None:
    """Exactly one ErrorView, complete and of the right code."""
    code = CODES[str(case.code)]
    content = answer.json()
    assert list(content) == ["error"], content
    error = content["error"]
    assert error["code"] == code.name, error
    assert error["fault"] == code.fault.value
    text = f"{error['message']} ({error['hint']})"
    assert "\n" not in text
    assert len(text) <= MAX_LINE, text
    assert [word for word in case.words if _fill(word, live, held) not in text] == [], text


@pytest.mark.parametrize("case", [*CONFIG, *POWERD, *POWERCTL], ids=lambda case: case.name)
def test_a_mistake_on_the_command_line(case: Case, live: LiveNode, held: Lease) -> None:
    before = live.state()
    answer = case.how(live, held)
    assert_one_line(case, answer, live, held)
    assert live.state() == before


@pytest.mark.parametrize("case", [*API, *(STRANGER if os.geteuid() == 0 else [])], ids=lambda case: case.name)
def test_a_mistake_in_a_request(case: Case, live: LiveNode, held: Lease) -> None:
    before = live.state()
    answer = case.how(live, held)
    if not case.name.startswith("attach"):
        assert answer.code == CODES[str(case.code)].http_status, answer.out
    assert_one_error(case, answer, live, held)
    assert live.state() == before


def test_a_stranger_sees_no_gpu_of_others(live: LiveNode, held: Lease) -> None:
    if os.geteuid() == 0:
        assert live.http_as_nobody("GET", "/v1/snapshot").json()["readings"] == []
        assert live.http_as_nobody("GET", "/v1/leases").json() == []
    assert {r["uuid"] for r in live.http("GET", "/v1/snapshot").json()["readings"]} == set(live.uuids)


@pytest.mark.parametrize("minor", range(API_VERSION[1] + 1))
def test_an_older_client_of_the_same_major_version_works(minor: int, live: LiveNode, held: Lease) -> None:
    stated = f"{API_VERSION[0]}.{minor}"
    answer = live.http("GET", "/v1/node", **{API_HEADER: stated})
    assert (answer.code, answer.json()["api_version"]) == (200, f"{API_VERSION[0]}.{API_VERSION[1]}")
    dry = live.http(
        "POST", "/v1/leases", json.loads(_fill(json.dumps(lease_body(dry_run=True)), live, held)), **{API_HEADER: stated}
    )
    assert dry.code == 200, dry.out


# --- a daemon that only monitors ---


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


# --- permission, a second powerd-hw ---


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


# --- SIGHUP ---


def test_a_bad_file_at_reload_keeps_the_last_good_one_and_says_so(live: LiveNode, held: Lease) -> None:
    before = live.state()
    try:
        live.write_config(live.config_text + "[leases]\nmax_tll_s = 5\n")
        live.reload()
        node = live.client.node()
        assert not node.config_reload_ok
        assert "max_tll_s" in node.config_error
        assert "did you mean 'max_ttl_s'" in node.config_error
        status = live.powerctl("status")
        assert status.code == 0
        assert "max_tll_s" in status.out + status.err, "status says that the file was refused"
        assert live.powerctl("set", "0", "--for", "10m", "--sm-clock", "1200MHz", "--dry-run").code == 0, (
            "the old bound is in force"
        )
        live.write_config(live.config_text + "[leases]\nmax_ttl_s = 5\n", mode=0o666)
        live.reload()
        assert "others can write" in live.client.node().config_error
    finally:
        live.write_config(live.config_text)
        live.reload()
    assert live.client.node().config_reload_ok
    assert live.state() == before


def test_a_good_file_at_reload_takes_effect(live: LiveNode, held: Lease) -> None:
    before = live.state()
    wish = ("set", "0", "--for", "10m", "--sm-clock", "1200MHz", "--dry-run")
    assert live.powerctl(*wish).code == 0
    try:
        live.write_config(live.config_text + "[leases]\nmax_ttl_s = 5\n")
        live.reload()
        refused = live.powerctl(*wish)
        assert refused.code == 2
        assert "0..5" in refused.lines[0]
    finally:
        live.write_config(live.config_text)
        live.reload()
    assert live.powerctl(*wish).code == 0
    assert live.state() == before


def test_a_key_that_waits_for_a_restart_is_named_by_the_reload(live: LiveNode) -> None:
    before, said = live.state(), "takes effect at the next start: influx.url, influx.bucket"
    seen = max(e.seq for e in live.client.events())
    details = lambda: [e.detail for e in live.client.events(since=seen) if e.kind == "config_reloaded"]  # noqa: E731
    try:
        influx = '[influx]\nurl = "http://127.0.0.1:9"\nbucket = "new"\n[leases]\nmax_ttl_s = 50\n'
        live.write_config(live.config_text + influx)
        live.reload()
        assert said in details()
        seen = max(e.seq for e in live.client.events())
    finally:
        live.write_config(live.config_text)
        live.reload()
    assert details(), "it was reloaded"
    assert said not in details(), "it is as powerd was started with"
    assert live.state() == before


def test_another_sampling_rate_at_reload_is_the_node_s_and_energy_s_too() -> None:
    with LiveNode(gpus=1) as live:
        live.write_config(live.config_text.replace("[hw]\n", "[hw]\nsample_hz = 20\n"))
        live.reload()
        assert live.client.node().sample_hz == 20
        first = live.client.snapshot()
        wait_for("twenty samples", lambda: live.client.snapshot().seq >= first.seq + 20)
        last = live.client.snapshot()
        assert (last.time_ns - first.time_ns) / 1e9 / (last.seq - first.seq) < 0.09, "sampled more often than ten times a second"
        with live.client.energy("after", live.uuids) as window:
            wait_for("samples", lambda: live.client.snapshot().seq >= last.seq + 20)
        assert window.energy_j is not None


def test_control_taken_away_at_reload_undoes_every_setting() -> None:
    with LiveNode(gpus=1) as live:
        live.client.lease(live.uuids, power_limit_w=300, reason="until control goes", ttl_s=600, detached=True)
        assert live.node.view(0).limit_mw == 300_000
        live.write_config(live.config_text.replace("control = true", "control = false"))
        live.reload()
        wait_for("the limit is undone", lambda: live.node.view(0).limit_mw == 500_000)
        assert live.client.leases() == ()
        assert not live.client.node().control


# --- what reads nothing of ours ---


def test_bytes_that_are_no_http_do_no_harm(live: LiveNode, held: Lease) -> None:
    before = live.state()
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(20)
        link.connect(str(live.socket))
        link.sendall(b"\x00\xff" * 500 + b"\r\n\r\n")
        assert b" 400 " in link.recv(65536)
    assert live.state() == before
