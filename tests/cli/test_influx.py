"""powerctl influx: every way in which a configuration can be wrong is told by the step that fails, with what to do."""

from __future__ import annotations

import json
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from powerd.sinks.spool import Dead, Spool
from tests.cli.conftest import Powerctl
from tests.sinks.scripted import Reply, ScriptedServer

Write = Callable[..., Path]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    made = ScriptedServer()
    yield made
    made.close()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    token = tmp_path / "token"
    token.write_text("a-token-for-this-test\n")
    token.chmod(0o600)

    def config(url: str, **keys: object) -> Path:
        section = {"url": url, "org": "lab", "bucket": "powerd", "token_file": str(token), "timeout_s": 2.0, **keys}
        path = tmp_path / "powerd.toml"
        path.write_text(
            f'[daemon]\nstate_dir = "{tmp_path}"\n[influx]\n' + "".join(f"{k} = {json.dumps(v)}\n" for k, v in section.items())
        )
        return path

    return config


def test_a_good_configuration_writes_one_point_step_by_step(server: ScriptedServer, write: Write, powerctl: Powerctl) -> None:
    answer = powerctl("influx", "check", "--config", str(write(server.url)))
    assert answer.code == 0, answer.out + answer.err
    assert [line.split()[1] for line in answer.out.splitlines()] == ["configuration", "client", "resolve", "connect", "write"]
    (point,) = server.taken
    assert point.startswith("powerd_check,host=")
    assert server.tokens == ["Token a-token-for-this-test"]
    assert "a-token-for-this-test" not in answer.out + answer.err


@pytest.mark.parametrize(
    ("status", "code", "word"),
    [
        (401, 77, "token"),
        (403, 77, "permission"),
        (404, 78, "bucket"),
        (429, 75, "try again"),
        (503, 75, "try again"),
        (400, 1, "v2"),
    ],
)
def test_what_the_server_says_is_passed_on_with_a_remedy(
    status: int, code: int, word: str, server: ScriptedServer, write: Write, powerctl: Powerctl
) -> None:
    server.reply = lambda lines: Reply(status, message="the very reason")
    answer = powerctl("influx", "check", "--config", str(write(server.url)), "--json")
    assert answer.code == code
    last = json.loads(answer.out)[-1]
    assert (last["step"], last["ok"]) == ("write", False)
    assert str(status) in last["found"]
    assert "the very reason" in last["found"]
    assert word in last["remedy"]


@pytest.mark.parametrize(
    ("keys", "step", "code", "words"),
    [
        ({"url": ""}, "configuration", 78, "influx.url is empty"),
        ({"url": "influx.example.org"}, "configuration", 78, "not an address"),
        ({"url": "http://192.0.2.1:8086"}, "configuration", 78, "in the clear"),
        ({"url": "http://127.0.0.1:1", "bucket": ""}, "configuration", 78, "influx.bucket"),
        ({"url": "http://127.0.0.1:1", "token_file": "/nowhere"}, "configuration", 78, "influx.token_file"),
        ({"url": "https://127.0.0.1:1", "ca_file": "/nowhere"}, "configuration", 78, "influx.ca_file"),
        ({"url": "http://127.0.0.1:1"}, "connect", 69, "Connection refused"),
        ({"url": "https://no-such-host.invalid"}, "resolve", 69, "no-such-host.invalid"),
    ],
)
def test_the_first_wrong_step_is_the_last_one(
    keys: dict[str, str], step: str, code: int, words: str, write: Write, powerctl: Powerctl
) -> None:
    answer = powerctl("influx", "check", "--config", str(write(**keys)))
    assert answer.code == code
    failed = [line for line in answer.out.splitlines() if line.startswith("FAIL")]
    assert [line.split()[1] for line in failed] == [step]
    assert words in failed[0]
    assert answer.out.splitlines()[-1].startswith("      "), "a remedy follows"


def test_a_token_that_others_can_read_is_refused(
    server: ScriptedServer, write: Write, powerctl: Powerctl, tmp_path: Path
) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.write_text("x\n")
    open_to_all.chmod(0o644)
    answer = powerctl("influx", "check", "--config", str(write(server.url)), "--token-file", str(open_to_all))
    assert answer.code == 78
    assert "others can read it" in answer.out
    assert server.requests == []


def test_a_certificate_of_nobody_known_is_refused_until_its_authority_is_named(
    write: Write, powerctl: Powerctl, tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    server = ScriptedServer(context)
    try:
        refused = powerctl("influx", "check", "--config", str(write(server.url)))
        assert refused.code == 78
        assert "self-signed" in refused.out
        assert server.requests == [], "the token was never shown to it"
        good = powerctl("influx", "check", "--config", str(write(server.url, ca_file=str(certificate))))
        assert good.code == 0, good.out
        assert "TLSv1.3" in good.out
        assert len(server.taken) == 1
    finally:
        server.close()


def test_refused_points_can_be_looked_at(write: Write, powerctl: Powerctl, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.sqlite", 1 << 20, 10**18)
    spool.put(["gpu v=bad 1"], 1)
    taken = spool.take(1)
    assert taken is not None
    spool.done(taken, [Dead(1_800_000_000_000_000_000, "gpu v=bad 1", 400, "invalid number")])
    spool.close()
    config = str(write("http://127.0.0.1:1"))
    answer = powerctl("influx", "dead", "--config", config)
    assert answer.code == 0, answer.err
    assert "invalid number" in answer.out
    assert "gpu v=bad 1" in answer.out
    assert json.loads(powerctl("influx", "dead", "--config", config, "--json").out)[0]["status"] == 400
    (tmp_path / "spool.sqlite").unlink()
    missing = powerctl("influx", "dead", "--config", config)
    assert missing.code == 2
    assert "daemon's user" in missing.err
