"""Sockets and the lock: one powerd per state directory, and never the theft of a living daemon's socket.

House rules: a socket file is replaced only when nobody answers on it; the lock is the kernel's and dies with its holder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from powerd.errors import ConfigError, UnavailableError

_PATH_BYTES = 107  # sockaddr_un
BACKLOG = 128


def make_dir(path: Path, mode: int) -> None:
    """Make a directory of ours. ConfigError when it cannot be made or belongs to somebody else."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        info = path.stat()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", hint="see daemon.run_dir and daemon.state_dir") from error
    if info.st_uid not in (0, os.geteuid()) or not os.access(path, os.W_OK):
        raise ConfigError(f"{path}: belongs to another user", hint="choose daemon.run_dir and daemon.state_dir")


@contextlib.contextmanager
def lock_state(state_dir: Path) -> Iterator[None]:
    """Hold the state directory. UnavailableError(busy, exit 75) while another powerd holds it."""
    descriptor = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            who = f"another powerd (pid {owner}) is running" if owner.isdecimal() else "another powerd is running"
            raise UnavailableError(f"{who} in {state_dir}", hint="stop it first", code="busy") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def bind(path: Path, *, seqpacket: bool = False) -> Iterator[socket.socket]:
    """A listening Unix socket, mode 0666 (requests are authorised one by one); its file goes away in the end.

    UnavailableError(busy) when somebody answers there already; ConfigError when the path cannot be used.
    """
    kind = socket.SOCK_SEQPACKET if seqpacket else socket.SOCK_STREAM
    if len(os.fsencode(path)) > _PATH_BYTES:
        raise ConfigError(f"{path}: longer than {_PATH_BYTES} bytes, too long for a socket", hint="set daemon.run_dir")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            probe.connect(str(path))
            raise UnavailableError(f"another powerd is running: it answers at {path}", hint="stop it first", code="busy")
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)  # left over by one that was killed
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}", hint="remove it or set daemon.run_dir") from error
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        listener.bind(str(path))
        os.chmod(path, 0o666)  # noqa: S103
        listener.listen(BACKLOG)
        mine = path.stat().st_ino
        yield listener
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", hint="set daemon.run_dir") from error
    finally:
        listener.close()
        with contextlib.suppress(OSError):
            if path.stat().st_ino == mine:
                path.unlink()
