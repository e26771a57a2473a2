"""`powerctl service`: what it writes, what it leaves alone, what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from powerd import config
from powerd.cli import service
from powerd.errors import ConfigError, DeniedError

PYTHON = "/opt/powerd/bin/python"
SERVICES = ("powerd.service", "powerd-hw.service")


def call(*arguments: str) -> list[str]:
    result = CliRunner().invoke(service.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("unit", service.UNITS)
def test_a_rendered_unit_has_no_placeholder_left(unit: str) -> None:
    body = [line for line in service.render(unit, PYTHON).splitlines() if not line.startswith("#")]
    assert not [line for line in body if "PYTHON" in line]


@pytest.mark.parametrize("unit", SERVICES)
def test_every_command_of_powerd_is_isolated_from_the_callers_python(unit: str) -> None:
    lines = [line for line in service.render(unit, PYTHON).splitlines() if re.match(r"Exec\w+=", line)]
    assert {line.split("=", 1)[1].split(" -m ")[0] for line in lines if "-m powerd" in line} == {f"{PYTHON} -I"}


@pytest.mark.parametrize("path", ["/opt/my powerd/bin/python", "/opt/%h/python", "opt/python", "/opt/$x/python", '/opt/"/python'])
def test_an_interpreter_that_systemd_would_read_otherwise_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot stand in a unit file"):
        service.render("powerd.service", path)


def test_a_fresh_install_only_monitors_and_lets_its_own_user_in(tmp_path: Path) -> None:
    call("install", "--prefix", str(tmp_path))
    written = config.load(tmp_path / "etc/powerd/powerd.toml")
    assert written.daemon.control is False
    assert written.hw.peer_user == service.USER
    assert f"User={service.USER}" in (tmp_path / "etc/systemd/system/powerd.service").read_text()


def test_installing_again_changes_nothing_and_keeps_the_operators_configuration(tmp_path: Path) -> None:
    own = tmp_path / "etc/powerd/powerd.toml"
    own.parent.mkdir(parents=True)
    own.write_text("[daemon]\ncontrol = true\n")
    call("install", "--prefix", str(tmp_path))
    once = tree(tmp_path)
    lines = call("install", "--prefix", str(tmp_path))
    assert tree(tmp_path) == once
    assert own.read_text() == "[daemon]\ncontrol = true\n"
    assert not [line for line in lines if line.startswith("wrote")]


def test_a_dry_run_says_what_it_would_write_and_writes_nothing(tmp_path: Path) -> None:
    lines = call("install", "--dry-run", "--prefix", str(tmp_path))
    assert tree(tmp_path) == {}
    assert {line.rsplit("/", 1)[1] for line in lines} == {*service.UNITS, "powerd.conf", "powerd.toml"}


def test_uninstall_takes_what_install_brought_and_leaves_the_configuration(tmp_path: Path) -> None:
    call("install", "--prefix", str(tmp_path))
    assert set(tree(tmp_path)) != {"etc/powerd/powerd.toml"}
    before = tree(tmp_path)
    call("uninstall", "--dry-run", "--prefix", str(tmp_path))
    assert tree(tmp_path) == before
    assert str(tmp_path / "etc/powerd") in call("uninstall", "--prefix", str(tmp_path))[-1]
    assert set(tree(tmp_path)) == {"etc/powerd/powerd.toml"}


def test_root_does_not_run_what_others_can_write(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("")
    tmp_path.chmod(0o777)
    assert "can be changed by others" in str(service.unfit(python))


def test_an_interpreter_in_a_home_folder_is_refused() -> None:
    assert "home folder" in str(service.unfit(Path("/home/somebody/.venv/bin/python")))


def test_what_root_alone_can_write_may_run() -> None:
    assert service.unfit(Path("/usr/bin/env")) is None


def test_only_root_changes_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(DeniedError, match="only root"):
        CliRunner().invoke(service.app, ["install"], catch_exceptions=False)
