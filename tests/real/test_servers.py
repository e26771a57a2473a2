"""The servers that other tests rely on come up, take data and say what they hold."""

from __future__ import annotations

import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.real.front import Front
from tests.real.servers import Influxd, Prometheus, VictoriaMetrics, wait_for

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("influx")]


def _write(url: str, lines: str, token: str = "the-right-token") -> int:
    request = urllib.request.Request(f"{url}/api/v2/write?org=o&bucket=servers&precision=ms", lines.encode())
    request.add_header("Authorization", f"Token {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_influxd_behind_its_front_is_the_real_engine(influxd: Influxd, influx_front: Front) -> None:
    influxd.create("servers")
    assert _write(influx_front.url, "m,t=a v=1i 1700000000000\nm,t=a v=1i 1700000000000\nm,t=b v=2i 1700000000001") == 204
    assert influxd.value("select count(v) from m", "servers") == 2
    assert _write(influx_front.url, "m v=1i 1\nm v=nonsense 2\n") == 422
    assert _write(influx_front.url, "m v=1i 1", token="another") == 401
    assert influxd.value("select count(v) from m", "servers") == 3


def test_victoria_metrics_counts_a_replay_once_and_says_what_it_could_not_read(victoria_metrics: VictoriaMetrics) -> None:
    before = victoria_metrics.invalid_rows()
    for _ in range(2):
        assert _write(victoria_metrics.url, "replay,t=a v=1i 1700000000000\nreplay,t=a v=2i 1700000000001") == 204
    wait_for("both points are seen", lambda: victoria_metrics.count("replay_v") == 2)
    assert victoria_metrics.invalid_rows() == before
    _write(victoria_metrics.url, "replay,t=a")
    wait_for("it counts what it could not read", lambda: victoria_metrics.invalid_rows() == before + 1)


def test_prometheus_scrapes_and_promtool_judges(
    start_prometheus: Callable[[str], Prometheus], promtool: Path, tmp_path: Path, victoria_metrics: VictoriaMetrics
) -> None:
    target = f"127.0.0.1:{victoria_metrics.port}"
    jobs = f"[{{job_name: vm, static_configs: [{{targets: ['{target}']}}]}}]"
    config = f"global: {{scrape_interval: 1s}}\nscrape_configs: {jobs}\n"
    server = start_prometheus(config)
    wait_for("the target is up", lambda: [row["value"][1] for row in server.query('up{job="vm"}')] == ["1"])
    with pytest.raises(AssertionError, match="unknown function"):
        server.query("summ(up)")
    rules = tmp_path / "rules.yml"
    rules.write_text("groups: [{name: g, rules: [{record: r, expr: summ(up)}]}]\n")
    done = subprocess.run([promtool, "check", "rules", rules], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "summ" in done.stderr
