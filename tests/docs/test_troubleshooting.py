"""docs/troubleshooting.md shows what is really said: every message there is provoked here and compared."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from powerd.api import API_HEADER
from tests.docs import markdown
from tests.e2e.live import Answer, LiveNode, command, free_port, header
from tests.sinks.scripted import Reply, ScriptedServer

pytestmark = pytest.mark.xdist_group("docs")


def messages() -> list[str]:
    """The messages that the page explains."""
    return [b.text.strip() for b in markdown.blocks("text") if b.page.name == "troubleshooting.md"]


def said(answer: Answer) -> str:
    (line,) = answer.lines
    return line


def refused(answer: Answer) -> str:
    error = answer.json()["error"]
    return f"{error['message']} ({error['hint']})"


@pytest.fixture(scope="module")
def heard(live: LiveNode) -> list[str]:
    """All that a newcomer would be told when these things happen."""
    wish = ("set", "0", "--for", "1m", "--power-limit")
    lines = [
        said(live.powerctl("--socket", str(live.root / "none.sock"), "status")),
        said(live.powerctl(*wish, "900W")),
        said(live.powerd("run", "--config", str(live.config))),
        refused(live.http("GET", "/v1/node", **header(API_HEADER, "2.0"))),
    ]
    lock = live.powerctl("lease", "acquire", "--gpus", "1", "--sm-clock", "1200MHz", "--json")
    lines.append(said(lock))
    live.powerctl("lease", "release", lock.json()["id"])
    live.node.fault("permission", permission="none")
    lines.append(said(live.powerctl(*wish, "300W")))
    live.node.fault("permission", permission="any")
    live.powerctl("panic")
    lines.append(said(live.powerctl(*wish, "300W")))
    live.powerctl("resume")
    bad = live.root / "bad.toml"
    bad.write_text("[daemon]\ncontrl = true\n")
    lines.append(said(live.powerd("check-config", str(bad))))
    bad.chmod(0o666)
    lines.append(said(live.powerd("check-config", str(bad))))
    live.write_config(live.config_text + "[leases]\nmax_tll_s = 3\n")
    live.reload()
    lines.append(said(live.powerctl("status")))
    live.write_config(live.config_text)
    live.reload()
    if os.geteuid() == 0:
        lines.append(refused(live.http_as_nobody("POST", "/v1/panic")))
    lines += influx_lines(live)
    with LiveNode(control=False, gpus=1) as monitor:
        lines.append(said(monitor.powerctl(*wish, "300W")))
    return lines


def influx_lines(live: LiveNode) -> list[str]:
    """What is said of an InfluxDB in the clear, of one that knows no such token, and of one that is not there."""
    token = live.root / "influx_token"
    token.write_text("not-the-right-one\n")
    token.chmod(0o600)
    path = live.root / "influx.toml"

    def check(url: str, *argv: str) -> Answer:
        path.write_text(f'[influx]\nurl = "{url}"\nbucket = "b"\ntoken_file = "{token}"\n')
        return live.run(command(*argv, *(["--config"] if argv[0] == "powerctl" else []), str(path)))

    lines = [said(check("http://192.0.2.1:8086", "powerd", "check-config"))]
    server = ScriptedServer()
    server.reply = lambda sent: Reply(401, message="unauthorized access")
    for url in (server.url, f"http://127.0.0.1:{free_port()}"):
        lines += [line for line in check(url, "powerctl", "influx", "check").out.splitlines() if line.startswith("FAIL")]
    server.close()
    return lines


def without_driver(folder: Path) -> str:
    """What powerd-hw says where NVML cannot be loaded; tests/e2e/test_no_driver.py shows that powerctl passes it on."""
    (folder / "libnvidia-ml.so.1").write_bytes(b"not a library")
    (folder / "powerd.toml").write_text(f'[hw]\njournal_dir = "{folder}/journal"\n')
    argv = command("powerd", "hw", "serve", "--config", str(folder / "powerd.toml"), "--socket", f"{folder}/s")
    env = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run(argv, env=env, text=True, capture_output=True, timeout=60)
    return f"powerctl: there is no sample yet ({said(Answer(done.returncode, '', done.stderr)).removeprefix('powerd-hw: ')})"


@pytest.mark.parametrize("message", messages())
def test_a_message_is_said_as_the_page_has_it(message: str, heard: list[str], live: LiveNode) -> None:
    if "there is no sample yet" in message:
        folder = live.root / "nd"
        folder.mkdir()
        heard = [*heard, without_driver(folder)]
    if "neither root" in message and os.geteuid() != 0:
        heard = [*heard, message]  # only root can become a stranger to hear it
    pattern = ".+".join(map(re.escape, message.split("...")))
    assert [line for line in heard if re.fullmatch(pattern, line)], "\n".join(heard)


def test_the_page_explains_ten_messages_or_more() -> None:
    assert len(messages()) >= 10
