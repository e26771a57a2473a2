"""The verbs influx check and influx dead: is the InfluxDB that a configuration names really reachable, and what did it refuse.

House rules: no daemon is needed; every step says what it found before the next begins; the token is never shown; a step that
fails is the last one, names the remedy and decides the exit code.
"""

from __future__ import annotations

import platform
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import SplitResult

import typer

from powerd.cli.context import JsonFlag
from powerd.cli.output import emit_json
from powerd.errors import (
    EXIT_CONFIG,
    EXIT_DENIED,
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_TEMPFAIL,
    EXIT_UNAVAILABLE,
    PowerdError,
    RequestError,
)

if TYPE_CHECKING:
    from powerd.config import InfluxConfig
    from powerd.sinks.delivery import Answer

app = typer.Typer(no_args_is_help=True, help="InfluxDB: test a configuration end to end, and see what the server refused.")

ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Configuration file; default: the one that powerd reads.")
]

#: HTTP status of the test point -> what to do, exit code.
REMEDIES: dict[int, tuple[str, int]] = {
    400: ("the server cannot read line protocol here: is it InfluxDB's v2 write address?", EXIT_FAILURE),
    401: ("the token is wrong: influx.token_file", EXIT_DENIED),
    403: ("the token may not write this bucket: make one with write permission", EXIT_DENIED),
    404: ("no such bucket or organisation, or not a v2 server: influx.bucket, influx.org, influx.url", EXIT_CONFIG),
    413: ("the server takes no request of this size", EXIT_CONFIG),
    422: ("the server refused the point: look at its message", EXIT_FAILURE),
    429: ("the server asks for fewer requests: try again", EXIT_TEMPFAIL),
    503: ("the server is overloaded or starting: try again", EXIT_TEMPFAIL),
}


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of the check found."""

    step: str
    ok: bool
    found: str
    remedy: str = ""
    exit_code: int = EXIT_OK


def _config(config: InfluxConfig) -> tuple[Step, SplitResult | None]:
    from powerd.sinks.influxsetup import check_influx, read_token, token_path

    try:
        parts = check_influx(config)
    except PowerdError as error:
        return Step("configuration", False, error.message, error.hint, EXIT_CONFIG), None
    if parts is None:
        return Step(
            "configuration", False, "influx.url is empty: nothing is sent anywhere", "set url in [influx]", EXIT_CONFIG
        ), None
    token = f"token of {len(read_token(config))} characters from {token_path(config)}" if token_path(config) else "no token"
    return Step("configuration", True, f"{config.url}, org {config.org or '-'}, bucket {config.bucket}, {token}"), parts


def _client() -> Step:
    from importlib import metadata

    from powerd.sinks.influxsetup import need_client

    try:
        need_client()
    except PowerdError as error:
        return Step("client", False, error.message, error.hint, EXIT_UNAVAILABLE)
    return Step("client", True, f"influxdb-client {metadata.version('influxdb-client')}")


def _resolve(host: str, port: int) -> Step:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return Step("resolve", False, f"{host}: {error.strerror or error}", "is the name in influx.url right?", EXIT_UNAVAILABLE)
    return Step("resolve", True, f"{host} is {', '.join(dict.fromkeys(str(row[4][0]) for row in found))}")


def _connect(config: InfluxConfig, host: str, port: int) -> Step:
    begin = time.monotonic()
    try:
        socket.create_connection((host, port), config.timeout_s).close()
    except OSError as error:
        text = f"{host} port {port}: {error.strerror or error}"
        return Step("connect", False, text, "is the server running, the port right, the firewall open?", EXIT_UNAVAILABLE)
    return Step("connect", True, f"{host} port {port} in {(time.monotonic() - begin) * 1000:.1f} ms")


def _tls(config: InfluxConfig, host: str, port: int) -> Step:
    context = ssl.create_default_context(cafile=config.ca_file or None)
    try:
        with (
            socket.create_connection((host, port), config.timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as link,
        ):
            version, certificate = link.version(), link.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        remedy = "name the authority's certificate in influx.ca_file, or the server by the name in its certificate"
        return Step("TLS", False, error.verify_message, remedy, EXIT_CONFIG)
    except OSError as error:
        return Step("TLS", False, str(error.strerror or error), "does this port speak TLS?", EXIT_CONFIG)
    return Step("TLS", True, f"{version}, certificate good until {certificate.get('notAfter', '?')}")


def _write(config: InfluxConfig) -> Step:
    from powerd.sinks.delivery import CHECK_MEASUREMENT, ClientWriter, Kind
    from powerd.sinks.influxsetup import read_token
    from powerd.sinks.lines import line

    point = line(CHECK_MEASUREMENT, {"host": platform.node()}, {"ok": 1}, time.time_ns() // 1_000_000) or ""
    writer = ClientWriter(config, read_token(config))
    begin = time.monotonic()
    try:
        answer = writer.write(point.encode(), config.timeout_s)
    finally:
        writer.close()
    if answer.kind is Kind.TAKEN:
        took = (time.monotonic() - begin) * 1000
        return Step("write", True, f"one point into {CHECK_MEASUREMENT}, accepted in {took:.1f} ms")
    return _refused(answer)


def _refused(answer: Answer) -> Step:
    fallback = ("the server did not answer as InfluxDB does", EXIT_UNAVAILABLE)
    remedy, code = REMEDIES.get(answer.status, fallback)
    if answer.retry_after_s is not None:
        remedy += f" after {answer.retry_after_s:g} s"
    return Step("write", False, f"{answer.label}: {answer.message}", remedy, code)


def check(config: InfluxConfig) -> Iterator[Step]:
    """Every step up to the first that fails."""
    first, parts = _config(config)
    yield first
    if not first.ok or parts is None:
        return
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    steps: list[Callable[[], Step]] = [_client, lambda: _resolve(host, port), lambda: _connect(config, host, port)]
    if parts.scheme == "https":
        steps.append(lambda: _tls(config, host, port))
    steps.append(lambda: _write(config))
    for step in steps:
        found = step()
        yield found
        if not found.ok:
            return


@app.command("check")
def check_verb(
    config: ConfigOption = None,
    token_file: Annotated[
        str | None, typer.Option("--token-file", metavar="FILE", help="In place of influx.token_file or systemd's credential.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Reach the server of [influx] as powerd would, and write one test point into the measurement powerd_check."""
    from powerd import config as configuration

    section = configuration.load(config).influx
    steps: list[Step] = []
    for step in check(section if token_file is None else replace(section, token_file=token_file)):
        steps.append(step)
        if not as_json:
            print(f"{'ok  ' if step.ok else 'FAIL'}  {step.step:<13}  {step.found}", flush=True)
            if step.remedy:
                print(f"      {'':<13}  {step.remedy}", flush=True)
    if as_json:
        emit_json(steps)
    raise typer.Exit(steps[-1].exit_code)


@app.command("dead")
def dead_verb(config: ConfigOption = None, as_json: JsonFlag = False) -> None:
    """The points that the server refused for good, newest first, with its reason (needs the daemon's user or root)."""
    from powerd import config as configuration
    from powerd.sinks.spool import read_dead

    path = configuration.state_dir(configuration.load(config)) / "spool.sqlite"
    try:
        rows = read_dead(path)
    except OSError as error:
        raise RequestError(f"{path}: {error}", hint="run it as the daemon's user, on the daemon's node") from error
    if as_json:
        emit_json(rows)
        return
    for row in rows:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.wall_ns / 1e9))
        print(f"{when}  {row.status}  {row.message}\n    {row.line}")
