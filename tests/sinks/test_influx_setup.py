"""The [influx] section: what starts powerd, what is refused at once, and where the token may come from."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from powerd.config import InfluxConfig
from powerd.errors import UnavailableError
from powerd.sinks import influxsetup
from powerd.sinks.influxsetup import check_influx, read_token


def test_without_a_url_nothing_is_asked_for() -> None:
    assert check_influx(InfluxConfig(token_file="/nowhere")) is None


def test_the_credential_of_systemd_is_found_without_being_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "influx_token").write_text("from-systemd\n")
    config = InfluxConfig(url="http://localhost:8086", bucket="b")
    assert read_token(config) == ""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_token(config) == "from-systemd"


def test_http_beyond_this_machine_needs_its_own_word() -> None:
    assert check_influx(InfluxConfig(url="http://192.0.2.1:8086", bucket="b", insecure_http=True)) is not None
    assert check_influx(InfluxConfig(url="http://[::1]:8086", bucket="b")) is not None
    assert check_influx(InfluxConfig(url="https://influx.example.org", bucket="b")) is not None


def test_without_influxdb_client_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"pip install 'powerd\[influx\]'"):
        influxsetup.need_client()


def test_a_daemon_without_influx_never_loads_its_client() -> None:
    code = "import sys, powerd.main, powerd.sinks.influxsetup, powerd.sinks.influx; print('influxdb_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


def test_check_config_refuses_a_section_that_would_not_start(tmp_path: Path) -> None:
    path = tmp_path / "powerd.toml"
    path.write_text('[influx]\nurl = "http://192.0.2.1:8086"\nbucket = "b"\n')
    done = subprocess.run(
        [sys.executable, "-m", "powerd.main", "check-config", str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 78
    assert "in the clear" in done.stderr
