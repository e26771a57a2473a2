"""The optional TCP listener's own rules: where it may listen, with which certificate, and the token that it asks for.

House rules: refused before anything is bound; beyond loopback never without TLS; the token file is its owner's alone.
"""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path
from typing import NamedTuple

from powerd.config import TcpConfig
from powerd.errors import ConfigError


class Tokens(NamedTuple):
    """What TCP clients may show: the token that may set, and the one that only reads."""

    control: str | None = None
    read: str | None = None


def bearer_token(config: TcpConfig, key: str = "token_file") -> str | None:
    """The token in the file that this key names. ConfigError when the file is missing, empty or readable by others."""
    name = getattr(config, key)
    if not name:
        return None
    path = Path(name)
    try:
        info = path.stat()
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tcp.{key}: {error}") from error
    if info.st_mode & 0o077:
        raise ConfigError(f"tcp.{key} {path}: others can read it", hint="chmod 0600")
    if len(token) < 16:
        raise ConfigError(f"tcp.{key} {path}: fewer than 16 characters", hint="openssl rand -base64 32")
    return token


def tcp_address(config: TcpConfig) -> tuple[str, int]:
    """Host and port of ``tcp.listen``. ConfigError when malformed, or beyond loopback without TLS and token."""
    host, _, port = config.listen.rpartition(":")
    host = host.strip("[]")
    try:
        address, number = ipaddress.ip_address(host), int(port)
        if not 0 <= number <= 65535:
            raise ValueError
    except ValueError:
        raise ConfigError(f"tcp.listen {config.listen!r}: not ADDRESS:PORT", hint='for example "127.0.0.1:9478"') from None
    if bool(config.certificate) != bool(config.key):
        raise ConfigError("tcp.certificate and tcp.key belong together")
    if not address.is_loopback and not config.certificate:
        raise ConfigError(f"tcp.listen {config.listen}: beyond loopback TLS is needed", hint="set tcp.certificate and tcp.key")
    if not (config.token_file or config.read_token_file) and not (address.is_loopback and config.loopback_reads):
        raise ConfigError("tcp.listen without tcp.token_file would answer nobody", hint="set tcp.token_file")
    return host, number


def tls_context(config: TcpConfig) -> ssl.SSLContext | None:
    """The TLS side of the TCP listener, or ``None`` without a certificate. ConfigError when the files are no good."""
    if not config.certificate:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.certificate, config.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tcp.certificate: {error}") from error
    return context


def check_tcp(config: TcpConfig) -> Tokens:
    """Check all of it and answer the tokens. ConfigError when anything is wrong."""
    if not config.listen:
        return Tokens()
    tcp_address(config)
    tls_context(config)
    tokens = Tokens(bearer_token(config), bearer_token(config, "read_token_file"))
    if tokens.control is not None and tokens.control == tokens.read:
        raise ConfigError("tcp.read_token_file has the token of tcp.token_file", hint="the one that only reads has to be another")
    return tokens
