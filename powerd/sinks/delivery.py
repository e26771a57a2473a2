"""From the spool to the server: what is sent, what an answer means, and when it is tried again.

House rules: what an answer means is one table; a refused line is found by halving, and only after the server took another one;
every wait has an end and can be cut short; real time only, because the server is outside of any simulation.
"""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Protocol

from powerd.clock import NS, Clock
from powerd.config import InfluxConfig
from powerd.errors import ConfigError
from powerd.sinks.lines import line
from powerd.sinks.spool import Dead, Spool, Taken

CHECK_MEASUREMENT = "powerd_check"
HOLD_S = 60.0  # between two tries while the operator has to do something
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_LONGEST_RETRY_AFTER_S = 3600.0
_DOWN_AFTER = 3  # failures in a row before it is told
_MESSAGE = 500


class Kind(Enum):
    """What an answer means for the lines that were sent."""

    TAKEN = "taken"
    SPLIT = "split"  # some line is bad, perhaps all but one were written
    HALVE = "halve"  # too much at once
    HOLD = "hold"  # the configuration is wrong: keep, tell, try slowly
    RETRY = "retry"  # the server's trouble: keep, back off


#: HTTP status -> what it means; what is not here is HOLD from 400 to 499 and RETRY otherwise.
MEANING: dict[int, Kind] = {
    200: Kind.TAKEN, 204: Kind.TAKEN, 400: Kind.SPLIT, 422: Kind.SPLIT, 413: Kind.HALVE, 401: Kind.HOLD, 403: Kind.HOLD,
    404: Kind.HOLD, 408: Kind.RETRY, 425: Kind.RETRY, 429: Kind.RETRY, 503: Kind.RETRY,
}  # fmt: skip


def meaning(status: int) -> Kind:
    """What an HTTP status means."""
    return MEANING.get(status, Kind.HOLD if 400 <= status < 500 else Kind.RETRY)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request; status 0: there was no answer."""

    status: int
    message: str = ""
    retry_after_s: float | None = None
    cause: str = ""  # network or timeout when there was no answer

    @property
    def kind(self) -> Kind:
        """What it means."""
        return meaning(self.status) if self.status else Kind.RETRY

    @property
    def label(self) -> str:
        """How it is counted."""
        return str(self.status) if self.status else self.cause


class _InterruptedError(Exception):
    """A batch cannot be finished now."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.message)
        self.answer = answer


def retry_after_s(header: str | None, now_s: float) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None without one that makes sense."""
    if not header:
        return None
    try:
        value = float(header)
    except ValueError:
        try:
            value = parsedate_to_datetime(header).timestamp() - now_s
        except ValueError:
            return None
    return min(max(0.0, value), _LONGEST_RETRY_AFTER_S) if value == value else None


class Writer(Protocol):
    """Sends lines in one request."""

    def write(self, body: bytes, timeout_s: float) -> Answer:
        """What the server says to these lines; never raises for what the server or the network does."""

    def close(self) -> None:
        """Let go of connections."""


class ClientWriter:
    """influxdb-client's synchronous writer, fed raw lines. UnavailableError when it is not installed."""

    def __init__(self, config: InfluxConfig, token: str) -> None:
        from influxdb_client import InfluxDBClient
        from influxdb_client.client.write_api import SYNCHRONOUS

        self._config = config
        self._client = InfluxDBClient(
            url=config.url, token=token, org=config.org, timeout=round(config.timeout_s * 1000),
            verify_ssl=True, ssl_ca_cert=config.ca_file or None,
        )  # fmt: skip
        self._api = self._client.write_api(write_options=SYNCHRONOUS)

    def write(self, body: bytes, timeout_s: float) -> Answer:
        from influxdb_client import WritePrecision
        from influxdb_client.rest import ApiException
        from urllib3.exceptions import HTTPError, NewConnectionError, TimeoutError  # what influxdb-client lets through

        self._client.api_client.configuration.timeout = max(1, round(timeout_s * 1000))
        try:
            self._api.write(bucket=self._config.bucket, org=self._config.org, record=body, write_precision=WritePrecision.MS)
        except ApiException as error:
            if not error.status:
                return Answer(0, _short(error), cause="network")
            header = error.headers.get("Retry-After") if error.headers else None
            return Answer(int(error.status), _said(error), retry_after_s(header, time.time()))
        except NewConnectionError as error:  # refused; urllib3 counts it among the time-outs
            return Answer(0, _short(error), cause="network")
        except TimeoutError as error:
            return Answer(0, _short(error), cause="timeout")
        except (HTTPError, OSError, ValueError) as error:
            return Answer(0, _short(error), cause="network")
        return Answer(204)

    def close(self) -> None:
        self._client.close()


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:_MESSAGE]


def _said(error: object) -> str:
    """The server's own words out of an ApiException."""
    text = getattr(error, "message", None) or getattr(error, "body", None) or getattr(error, "reason", "")
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    return " ".join(str(text).split())[:_MESSAGE]


class Delivery:
    """The sending thread: takes the oldest lines of the spool until it is empty, and again when there are new ones."""

    def __init__(
        self, config: InfluxConfig, spool: Spool, clock: Clock, token: Callable[[], str], tell: Callable[[str, str], None],
        writer: Callable[[InfluxConfig, str], Writer] = ClientWriter, jitter: Callable[[], float] = random.random,
    ) -> None:  # fmt: skip
        self.up = True
        self.lines = 0
        self.dead_letters = 0
        self.errors: dict[str, int] = {}
        self.problem = ""
        self._config, self._spool, self._clock, self._token, self._tell = config, spool, clock, token, tell
        self._make_writer, self._jitter = writer, jitter
        self._writer: Writer | None = None
        self._limit = config.batch_lines
        self._failures = 0
        self._told = ""  # the alarm that is on
        self._wake = threading.Event()
        self._until_ns: int | None = None  # after the last call: no request beyond this moment
        self._done = False  # nothing comes into the spool any more
        self._thread = threading.Thread(target=self._run, name="influx-send", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def wake(self) -> None:
        """There are new lines; a wait after a failure is not cut short by this."""
        self._wake.set()

    def last_call(self, timeout_s: float) -> int:
        """From now on wait for nothing, and end when so much time is over or the spool is empty."""
        self._until_ns = time.monotonic_ns() + round(timeout_s * NS)
        return self._until_ns

    def finish(self, until_ns: int) -> None:
        """Everything is in the spool: send what there is, and return in time whatever happens."""
        self._done = True
        self._wake.set()
        self._thread.join(max(0.0, (until_ns - time.monotonic_ns()) / NS))

    # ---- the thread

    def _run(self) -> None:
        self._wake.set()
        while True:
            self._wake.wait()
            self._wake.clear()
            last = self._done
            try:
                pause_s = self._send_all()
            except Exception as error:  # the thread must outlive whatever a library does
                self._spool.release()
                pause_s = self._failed(Answer(0, repr(error), cause="internal"))
                self.errors["internal"] = self.errors.get("internal", 0) + 1
            if last or self._over():
                break
            if pause_s > 0:
                self._pause(pause_s)
                self._wake.set()
        if self._writer is not None:
            self._writer.close()

    def _pause(self, seconds: float) -> None:
        """Wait; only the end cuts it short."""
        until = time.monotonic() + seconds
        while not self._done and (left := until - time.monotonic()) > 0:
            if self._wake.wait(min(left, 1.0)):
                self._wake.clear()

    def _over(self) -> bool:
        return self._until_ns is not None and time.monotonic_ns() >= self._until_ns

    def _send_all(self) -> float:
        """Send until the spool is empty (0) or something is wrong (seconds until the next try)."""
        while not self._over():
            try:
                taken = self._spool.take(self._limit)
                if taken is None:
                    self._fine()
                    return 0.0
                dead = self._deliver(taken)
                self._spool.done(taken, dead)
            except _InterruptedError as error:
                self._spool.release()
                return self._failed(error.answer)
            except ConfigError as error:
                self._spool.release()
                return self._failed(Answer(401, str(error)))
            except (sqlite3.Error, OSError) as error:
                self._spool.release()
                self.problem = f"spool: {error}"
                return _LONGEST_WAIT_S / 6
            self.lines += len(taken.lines) - len(dead)
            self._fine()
            if dead:
                self.dead_letters += len(dead)
                self._tell("influx_dead_letter", f"{len(dead)} refused: {dead[0].message}: {dead[0].line[:200]}")
        return 0.0

    def _fine(self) -> None:
        self._failures, self.problem, self.up = 0, "", True
        if self._limit < self._config.batch_lines:
            self._limit = min(self._config.batch_lines, self._limit * 2)
        if self._told:
            self._told = ""
            self._tell("influx_up", "the server takes points again")

    def _failed(self, answer: Answer) -> float:
        """Note a failure, tell once, and say when to try again."""
        self.up, self.problem = False, f"{answer.label}: {answer.message}"
        self._failures += 1
        hold = answer.kind in (Kind.HOLD, Kind.SPLIT)
        if hold:
            self._drop_writer()  # the next try reads the token anew
        alarm = "influx_refused" if hold else "influx_down"
        if alarm != self._told and (hold or self._failures >= _DOWN_AFTER):
            self._told = alarm
            self._tell(alarm, self.problem)
        if hold:
            return HOLD_S
        if answer.retry_after_s is not None:
            return answer.retry_after_s
        ceiling = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * float(1 << min(self._failures - 1, 10)))
        return max(_FIRST_WAIT_S, ceiling * (0.5 + 0.5 * self._jitter()))

    def _drop_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # ---- one batch

    def _request(self, lines: Sequence[bytes]) -> Answer:
        if self._writer is None:
            self._writer = self._make_writer(self._config, self._token())
        timeout_s = self._config.timeout_s
        if self._until_ns is not None:
            timeout_s = min(timeout_s, (self._until_ns - time.monotonic_ns()) / NS)
            if timeout_s <= 0:
                raise _InterruptedError(Answer(0, "powerd stops", cause="stopped"))
        answer = self._writer.write(b"\n".join(lines), timeout_s)
        if answer.kind is not Kind.TAKEN:
            self.errors[answer.label] = self.errors.get(answer.label, 0) + 1
        return answer

    def _deliver(self, taken: Taken) -> list[Dead]:
        """Send a batch, in halves if need be; the lines that the server refuses for good. _InterruptedError: later, all of it."""
        dead: list[Dead] = []
        alive = False  # whether the server has taken anything since it refused the first line
        parts: list[Sequence[bytes]] = [taken.lines[at : at + self._limit] for at in range(0, len(taken.lines), self._limit)]
        parts.reverse()
        while parts:
            part = parts.pop()
            answer = self._request(part)
            if answer.kind is Kind.TAKEN:
                alive = True
            elif answer.kind in (Kind.SPLIT, Kind.HALVE):
                if answer.kind is Kind.HALVE:
                    self._limit = max(1, min(self._limit, len(part) // 2))
                if len(part) > 1:
                    middle = len(part) // 2
                    parts += [part[middle:], part[:middle]]  # the older half is next
                    continue
                if not alive:  # does it refuse this line, or everything?
                    probe = self._request([self._probe()])
                    if probe.kind is not Kind.TAKEN:
                        raise _InterruptedError(probe)
                    alive = True
                text = part[0].decode("utf-8", "replace")
                dead.append(Dead(self._clock.wall_ns(), text, answer.status, answer.message))
            else:
                raise _InterruptedError(answer)
        return dead

    def _probe(self) -> bytes:
        text = line(CHECK_MEASUREMENT, {"host": "powerd"}, {"ok": 1}, self._clock.wall_ns() // 1_000_000)
        return (text or "").encode()
