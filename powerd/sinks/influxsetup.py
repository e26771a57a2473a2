"""What has to be right before anything is sent to InfluxDB: the address, the names and the token.

House rules: refused before anything runs; the token comes from a file or a systemd credential and is never shown; it is
not sent in the clear beyond this machine unless the operator says so by name.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from powerd.config import InfluxConfig
from powerd.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from powerd.clock import Clock
    from powerd.sinks.influx import InfluxSink

CREDENTIAL = "influx_token"


def is_loopback(host: str) -> bool:
    """Whether a URL's host is this machine for certain."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_influx(config: InfluxConfig) -> SplitResult | None:
    """The address, taken apart; None when there is no InfluxDB. ConfigError when the section makes no sense."""
    if not config.url:
        return None
    try:
        parts = urlsplit(config.url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(f"influx.url {config.url!r}: not an address", hint='for example "https://influx.example.org:8086"')
    if not config.bucket:
        raise ConfigError("influx.bucket is missing", hint="name the bucket that the token may write")
    if parts.scheme == "http" and not is_loopback(parts.hostname or "") and not config.insecure_http:
        raise ConfigError(
            f"influx.url {config.url!r}: the token would travel in the clear", hint="use https, or set insecure_http = true"
        )
    if config.ca_file and not os.access(config.ca_file, os.R_OK):
        raise ConfigError(f"influx.ca_file {config.ca_file}: cannot be read", hint="a PEM file that the daemon's user can read")
    read_token(config)
    return parts


def token_path(config: InfluxConfig) -> Path | None:
    """The file that the token is read from; None when none is named and systemd hands over none."""
    if config.token_file:
        return Path(config.token_file)
    if folder := os.environ.get("CREDENTIALS_DIRECTORY"):
        path = Path(folder) / CREDENTIAL
        return path if path.exists() else None
    return None


def read_token(config: InfluxConfig) -> str:
    """The token, empty without a file; ConfigError when the file cannot be read, is empty or is open to others."""
    path = token_path(config)
    if path is None:
        return ""
    try:
        mode, token = path.stat().st_mode, path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"influx.token_file: {error}", hint="one line with the token, chmod 0600") from error
    if config.token_file and mode & 0o077:
        raise ConfigError(f"influx.token_file {path}: others can read it", hint="chmod 0600")
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"influx.token_file {path}: there is no token in it", hint="one line with the token")
    return token


def need_client() -> None:
    """UnavailableError unless influxdb-client is installed."""
    if importlib.util.find_spec("influxdb_client") is None:
        raise UnavailableError("[influx] needs influxdb-client", hint="pip install 'powerd[influx]', or remove influx.url")


def make_sink(
    config: InfluxConfig, state_dir: Path, clock: Clock, host: str, hw_hz: float, tell: Callable[[str, str], None]
) -> InfluxSink | None:
    """The running sink that the section asks for; ``tell`` is called from another thread."""
    if check_influx(config) is None:
        return None
    need_client()
    from powerd.sinks.influx import InfluxSink

    sink = InfluxSink(config, state_dir / "spool.sqlite", clock, host, hw_hz, lambda: read_token(config), tell)
    sink.start()
    return sink
