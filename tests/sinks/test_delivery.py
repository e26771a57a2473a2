"""What powerd does about every answer of an InfluxDB server, with influxdb-client in between as users have it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from powerd.clock import RealClock
from powerd.config import InfluxConfig
from powerd.errors import ConfigError
from powerd.sinks import delivery
from powerd.sinks.delivery import Delivery, Kind, meaning, retry_after_s
from powerd.sinks.spool import Spool, read_dead
from tests.sinks.scripted import Reply, ScriptedServer

LINES = [f"m,t=a v={n}i {n}" for n in range(40)]


class Rig:
    """A spool, its delivery, and a server to send to."""

    def __init__(self, folder: Path, url: str, **keys: Any) -> None:
        config = InfluxConfig(url=url, org="o", bucket="b", **{"timeout_s": 0.5, **keys})
        self.spool = Spool(folder / "spool.sqlite", 64 << 20, 10**18)
        self.told: list[tuple[str, str]] = []
        self.token = "first"
        self.delivery = Delivery(config, self.spool, RealClock(), lambda: self.token, lambda *words: self.told.append(words))
        self.delivery.start()

    def send(self, lines: list[str] = LINES) -> None:
        self.spool.put(lines, 1)
        self.delivery.wake()

    def until(self, what: str, test: Callable[[], object], timeout_s: float = 20.0) -> None:
        """For what has no event: the spool after the server's answer."""
        end = time.monotonic() + timeout_s
        while not test():
            assert time.monotonic() < end, f"{what}: {self.delivery.problem}, {self.spool.stats()}"
            threading.Event().wait(0.01)

    def emptied(self) -> None:
        self.until("the spool is empty", lambda: self.spool.stats().points == 0)

    def close(self) -> None:
        self.delivery.finish(self.delivery.last_call(2.0))
        self.spool.close()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    made = ScriptedServer()
    yield made
    made.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def rig(url: str, **keys: Any) -> Rig:
        made.append(Rig(tmp_path, url, **keys))
        return made[-1]

    yield rig
    for one in made:
        one.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of the same shape, and shorter."""
    monkeypatch.setattr(delivery, "_FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(delivery, "_LONGEST_WAIT_S", 0.2)
    monkeypatch.setattr(delivery, "HOLD_S", 0.2)


def test_what_was_taken_leaves_the_spool_and_is_sent_once(server: ScriptedServer, make: Callable[..., Rig]) -> None:
    rig = make(server.url, batch_lines=15)
    for at in range(0, 40, 10):
        rig.spool.put(LINES[at : at + 10], at)
    rig.delivery.wake()
    rig.emptied()
    assert server.taken == dict.fromkeys(LINES, 1)
    assert max(map(len, server.requests)) <= 15
    assert [text for request in server.requests for text in request] == LINES
    assert rig.delivery.lines == 40
    assert set(server.tokens) == {"Token first"}


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_the_servers_trouble_is_waited_out(status: int, server: ScriptedServer, make: Callable[..., Rig]) -> None:
    replies = iter([Reply(status)] * 4)
    server.reply = lambda lines: next(replies, Reply())
    rig = make(server.url)
    rig.send()
    rig.emptied()
    assert server.taken == dict.fromkeys(LINES, 1)
    assert rig.delivery.errors == {str(status): 4}
    rig.until("it tells that all is well", lambda: [kind for kind, _ in rig.told] == ["influx_down", "influx_up"])
    assert rig.delivery.up


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(status: int, server: ScriptedServer, make: Callable[..., Rig]) -> None:
    times: list[float] = []

    def reply(lines: list[str]) -> Reply:
        times.append(time.monotonic())
        return Reply(status, {"Retry-After": "1"}) if len(times) == 1 else Reply()

    server.reply = reply
    rig = make(server.url)
    rig.send()
    rig.emptied()
    assert len(times) == 2
    assert times[1] - times[0] >= 1.0


def test_retry_after_may_be_a_date_and_nonsense_is_none() -> None:
    now = 1_800_000_000.0
    assert retry_after_s("2.5", now) == 2.5
    assert retry_after_s(formatdate(now + 30, usegmt=True), now) == 30.0
    assert retry_after_s(formatdate(now - 30, usegmt=True), now) == 0.0
    assert retry_after_s("86400000", now) == 3600.0
    assert [retry_after_s(text, now) for text in (None, "", "soon", "nan")] == [None] * 4


def test_waits_grow_to_the_longest_and_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(delivery, "_FIRST_WAIT_S", 1.0)
    monkeypatch.setattr(delivery, "_LONGEST_WAIT_S", 60.0)

    def waits(jitter: float) -> list[float]:
        config = InfluxConfig(url="http://127.0.0.1:1", bucket="b")
        one = Delivery(config, Spool(tmp_path / "s", 1, 1), RealClock(), str, lambda *_: None, jitter=lambda: jitter)
        return [one._failed(delivery.Answer(500)) for _ in range(10)]

    assert waits(1.0) == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert waits(0.0) == [1, 1, 2, 4, 8, 16, 30, 30, 30, 30]


@pytest.mark.parametrize(("status", "partial"), [(400, False), (400, True), (422, True)])
def test_one_bad_line_is_put_aside_and_the_others_arrive(
    status: int, partial: bool, server: ScriptedServer, make: Callable[..., Rig]
) -> None:
    def reply(lines: list[str]) -> Reply:
        bad = [text for text in lines if "poison" in text]
        if not bad:
            return Reply()
        if partial:
            for text in set(lines) - set(bad):
                server.taken[text] = server.taken.get(text, 0) + 1
        return Reply(status, message="unable to parse: invalid number")

    server.reply = reply
    rig = make(server.url)
    rig.send([*LINES[:23], "poison v=1x 1", *LINES[23:]])
    rig.emptied()
    assert sorted(server.points()) == sorted(LINES)
    (dead,) = read_dead(rig.spool.path)
    assert (dead.line, dead.status) == ("poison v=1x 1", status)
    assert "invalid number" in dead.message
    assert (rig.delivery.lines, rig.delivery.dead_letters) == (40, 1)
    assert [kind for kind, _ in rig.told] == ["influx_dead_letter"]


def test_a_server_that_calls_everything_bad_costs_no_line(server: ScriptedServer, make: Callable[..., Rig]) -> None:
    """A proxy may say 400 to a wrong token: nothing may be thrown away for that."""
    server.reply = lambda lines: Reply(400, message="no such user")
    rig = make(server.url)
    rig.send()
    rig.until("it alarms", lambda: rig.told)
    assert rig.told[0][0] == "influx_refused"
    assert rig.spool.stats().points == 40
    assert read_dead(rig.spool.path) == []
    server.reply = lambda lines: Reply()
    rig.emptied()
    assert sorted(server.points()) == sorted(LINES)


def test_413_sends_less_at_once_and_buries_only_what_is_too_large_alone(server: ScriptedServer, make: Callable[..., Rig]) -> None:
    server.reply = lambda lines: Reply(413) if len(lines) > 6 or any("huge" in text for text in lines) else Reply()
    rig = make(server.url)
    rig.send([*LINES, "huge v=1i 1"])
    rig.emptied()
    assert sorted(server.points()) == sorted(LINES)
    assert [dead.status for dead in read_dead(rig.spool.path)] == [413]


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_a_wrong_configuration_keeps_everything_and_alarms_once(
    status: int, server: ScriptedServer, make: Callable[..., Rig]
) -> None:
    server.reply = lambda lines: Reply(status, message="unauthorized access")
    rig = make(server.url)
    rig.send()
    server.wait("three tries", lambda: len(server.requests) >= 3)
    assert rig.spool.stats().points == 40
    assert not rig.delivery.up
    assert "unauthorized access" in rig.delivery.problem
    assert [kind for kind, _ in rig.told] == ["influx_refused"]
    rig.token = "second"
    server.reply = lambda lines: Reply()
    rig.emptied()
    assert server.tokens[-1] == "Token second", "the token file is read again"
    assert server.taken == dict.fromkeys(LINES, 1)


def test_a_token_file_that_is_gone_keeps_everything(server: ScriptedServer, make: Callable[..., Rig]) -> None:
    rig = make(server.url)

    def gone() -> str:
        raise ConfigError("influx.token_file: gone")

    rig.delivery._token, before = gone, rig.delivery._token
    rig.send()
    rig.until("it alarms", lambda: rig.told)
    assert "gone" in rig.told[0][1]
    rig.delivery._token = before
    rig.emptied()


def test_a_slow_server_may_have_written_and_is_asked_again(server: ScriptedServer, make: Callable[..., Rig]) -> None:
    replies = iter([Reply(204, delay_s=1.0), Reply(503)])
    server.reply = lambda lines: next(replies, Reply())
    rig = make(server.url)
    rig.send()
    rig.emptied()
    assert rig.delivery.errors == {"timeout": 1, "503": 1}
    assert server.taken == dict.fromkeys(LINES, 2), "the same lines with the same times: one point each at the server"


def test_nobody_there_is_waited_out(make: Callable[..., Rig], server: ScriptedServer) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rig = make(f"http://127.0.0.1:{probe.getsockname()[1]}")
        rig.send()
        rig.until("it has tried", lambda: rig.delivery.errors.get("network", 0) >= 3)
    assert rig.spool.stats().points == 40
    assert not rig.delivery.up


def test_at_the_end_it_sends_for_so_long_and_leaves_the_rest(server: ScriptedServer, tmp_path: Path) -> None:
    server.reply = lambda lines: Reply(delay_s=0.3)
    rig = Rig(tmp_path, server.url, batch_lines=1, timeout_s=10)
    rig.send()
    server.wait("it sends", lambda: server.requests)
    begin = time.monotonic()
    rig.delivery.finish(rig.delivery.last_call(1.0))
    assert time.monotonic() - begin < 3.0
    rig.spool.close()
    server.reply = lambda lines: Reply()
    again = Rig(tmp_path, server.url)
    again.spool.open()
    again.delivery.wake()
    again.emptied()
    assert sorted(server.points()) == sorted(LINES)
    again.close()


def test_every_status_means_something_and_only_success_lets_go() -> None:
    assert {status for status in range(100, 600) if meaning(status) is Kind.TAKEN} == {200, 204}
    assert meaning(418) is Kind.HOLD
    assert meaning(599) is Kind.RETRY
