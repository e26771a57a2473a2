"""`powerctl service`: installs powerd as systemd units for the environment it runs in, and takes them away again.

House rules: what is written is worked out first, by pure functions; a configuration that is there is never touched;
root runs nothing that somebody else can write.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from powerd import config
from powerd.errors import ConfigError, DeniedError, UnavailableError
from powerd.resources import folder

UNITS: Final = ("powerd.socket", "powerd-attach.socket", "powerd-hw.service", "powerd.service")
USER: Final = "powerd"
_INTERPRETER: Final = "PYTHON"
# Units hide these from the services (ProtectHome=yes), so an interpreter there cannot be started.
_HOMES: Final = ("/home", "/root", "/run/user")
# What systemd takes literally in a command line; anything else would need its quoting.
_PLAIN_PATH: Final = re.compile(r"/[\w./+@:-]*")
_RUNNING_SYSTEMD: Final = Path("/run/systemd/system")

app = typer.Typer(help="Install powerd as systemd units, or take them away.", no_args_is_help=True)
_Prefix = Annotated[Path, typer.Option("--prefix", help="Write below this folder instead of / and leave systemd alone.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and change nothing.")]


@dataclass(frozen=True, slots=True)
class File:
    """One file to write; `keep` when one that exists is the operator's and stays."""

    path: Path
    text: str
    keep: bool = False


def render(unit: str, python: str) -> str:
    """The text of a unit that runs powerd with this interpreter; raises ConfigError for a path that systemd would split."""
    if not _PLAIN_PATH.fullmatch(python):
        raise ConfigError(f"{python} cannot stand in a unit file", hint="install powerd at a path without spaces or signs")
    return (folder("systemd") / unit).read_text(encoding="utf-8").replace(f"{_INTERPRETER} ", f"{python} ")


def files(prefix: Path, python: str) -> list[File]:
    """Everything that an installation consists of."""
    shipped = folder("systemd")
    units = [File(_unit_path(prefix, unit), render(unit, python)) for unit in UNITS]
    return [
        File(_user_path(prefix), (shipped / "powerd.sysusers").read_text(encoding="utf-8")),
        File(_config_path(prefix), (shipped / "powerd.toml").read_text(encoding="utf-8"), keep=True),
        *units,
    ]


def _unit_path(prefix: Path, unit: str) -> Path:
    return prefix / "etc/systemd/system" / unit


def _user_path(prefix: Path) -> Path:
    return prefix / "etc/sysusers.d/powerd.conf"


def _config_path(prefix: Path) -> Path:
    return prefix / config.SYSTEM_FILE.relative_to("/")


def unfit(path: Path) -> str | None:
    """Why root's units must not run what lies at a path (hidden from them, or somebody else can change it), or None."""
    real = path.resolve()
    if any(real.is_relative_to(home) for home in _HOMES):
        return f"{real} is in a home folder, which the units cannot see"
    for part in (real, *real.parents):
        status = part.stat()
        others = stat.S_IWOTH if status.st_gid == 0 else stat.S_IWGRP | stat.S_IWOTH
        # In a sticky folder such as /tmp nobody can replace what root owns.
        sticky = stat.S_ISDIR(status.st_mode) and bool(status.st_mode & stat.S_ISVTX)
        if status.st_uid != 0 or (status.st_mode & others and not sticky):
            return f"{part} can be changed by others than root"
    return None


def _check_place(python: Path) -> None:
    """Refuse an environment that root's units must not run."""
    for path in (python.parent, python, Path(config.__file__)):
        if reason := unfit(path):
            hint = "make an environment for the system: python3 -m venv /opt/powerd, and run its powerctl"
            raise ConfigError(reason, hint=hint)


def _check_root(prefix: Path, dry_run: bool) -> None:
    if prefix == Path("/") and os.geteuid() != 0 and not dry_run:
        raise DeniedError("only root can change the system's units", hint="use sudo, or --prefix DIR to look at the files")


def _write(file: File, dry_run: bool) -> str:
    """Bring one file to its text, at once or not at all; returns what was (or would be) done."""
    if file.path.exists():
        if file.keep:
            return f"kept      {file.path}"
        if file.path.read_text(encoding="utf-8") == file.text:
            return f"unchanged {file.path}"
    if dry_run:
        return f"would write {file.path}"
    file.path.parent.mkdir(parents=True, exist_ok=True)
    draft = file.path.with_name(f".{file.path.name}.new")
    draft.write_text(file.text, encoding="utf-8")
    draft.chmod(0o644)
    draft.replace(file.path)
    return f"wrote     {file.path}"


def _system(dry_run: bool, *command: str) -> None:
    """Run one of systemd's commands and say so; raises UnavailableError with its own words."""
    if dry_run:
        typer.echo(f"would run {' '.join(command)}")
        return
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UnavailableError(f"{command[0]} is missing", hint="powerd's service needs systemd") from error
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"{' '.join(command)}: {error.stderr.strip() or error.returncode}") from error
    typer.echo(f"ran       {' '.join(command)}")


def _reload(dry_run: bool) -> None:
    if _RUNNING_SYSTEMD.exists():
        _system(dry_run, "systemctl", "daemon-reload")


def _warn_about_peer(path: Path) -> None:
    """A configuration from elsewhere may lock powerd out of powerd-hw: say so now, not at the first start."""
    if path.exists() and config.load(path).hw.peer_user != USER:
        typer.echo(f'warning: {path} needs [hw] peer_user = "{USER}", or powerd-hw will not listen to powerd', err=True)


@contextmanager
def _errors_say_where() -> Iterator[None]:
    """Files that cannot be written are an operator's error like any other: one line, with the file in it."""
    try:
        yield
    except OSError as error:
        raise DeniedError(f"{error.filename}: {error.strerror}", hint="run it as root, or with another --prefix") from error


@app.command()
def install(
    prefix: _Prefix = Path("/"),
    dry_run: _DryRun = False,
    now: Annotated[bool, typer.Option("--now", help="Start the units as well.")] = False,
) -> None:
    """Write the units, the user and (if there is none) a configuration that only monitors; enable the units."""
    with _errors_say_where():
        python = Path(sys.executable)
        _check_root(prefix, dry_run)
        if prefix == Path("/"):
            _check_place(python)
        for file in files(prefix, str(python)):
            typer.echo(_write(file, dry_run))
        if prefix != Path("/"):
            return
        _system(dry_run, "systemd-sysusers", str(_user_path(prefix)))
        _reload(dry_run)
        _system(dry_run, "systemctl", "enable", *UNITS)
        _warn_about_peer(_config_path(prefix))
        if now:
            _system(dry_run, "systemctl", "restart", *UNITS)
        else:
            typer.echo("start it with: systemctl start powerd.service")


@app.command()
def uninstall(prefix: _Prefix = Path("/"), dry_run: _DryRun = False) -> None:
    """Stop and remove the units; what powerd had set is restored; configuration, history and the user stay."""
    with _errors_say_where():
        _check_root(prefix, dry_run)
        present = [unit for unit in UNITS if _unit_path(prefix, unit).exists()]
        if prefix == Path("/") and present:
            _system(dry_run, "systemctl", "disable", *(["--now"] if _RUNNING_SYSTEMD.exists() else []), *present)
        for path in [*(_unit_path(prefix, unit) for unit in present), _user_path(prefix)]:
            if not path.exists():
                continue
            if not dry_run:
                path.unlink()
            typer.echo(f"{'would remove' if dry_run else 'removed  '} {path}")
        if prefix == Path("/"):
            _reload(dry_run)
        typer.echo(f"left: {_config_path(prefix).parent}, /var/lib/powerd, /var/lib/powerd-hw and the user {USER}")
