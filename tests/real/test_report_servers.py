"""``powerctl report --prometheus`` against the real servers that scrape a running powerd: their energy is the daemon's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.live import LiveNode, wait_for
from tests.real.servers import Prometheus, VictoriaMetrics, http, need

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("influx")]

WINDOW_S = 12


@pytest.fixture(scope="module")
def live() -> Iterator[LiveNode]:
    with LiveNode(gpus=2) as node:
        yield node


def scraping(node: LiveNode) -> str:
    return f"""\
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: powerd
    authorization: {{credentials_file: {node.token_file}}}
    static_configs: [{{targets: ['127.0.0.1:{node.tcp_port}']}}]
"""


class ScrapingVictoria(VictoriaMetrics):
    """VictoriaMetrics that scrapes by itself."""

    def __init__(self, folder: Path, config: str) -> None:
        super().__init__(folder)
        (folder / "scrape.yml").write_text(config)

    def command(self) -> list[str]:
        return [*super().command(), f"-promscrape.config={self.folder}/scrape.yml"]


def reported(node: LiveNode, url: str, *more: str) -> dict[str, Any]:
    """The report of the time since a little before now, as JSON."""
    done = node.powerctl("report", "--prometheus", url, *more)
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def check(node: LiveNode, url: str, count: Callable[[], float]) -> None:
    """A job of a known window, and the same joules from the server."""
    wait_for("the server has scraped", lambda: count() > 2, 40)
    client = node.client
    with node.load(0, 0.6):
        wait_for("the load draws power", lambda: (client.snapshot().readings[0].power_mw or 0) > 150_000)
        window = client.window_begin("all")
        began_ns = client.snapshot().time_ns
        wait_for("the window is long enough", lambda: client.snapshot().time_ns > began_ns + WINDOW_S * 10**9, 60)
        ended = client.window_end(window.id)
        page = reported(node, url, "--since", f"{WINDOW_S}s")
    assert ended.end_ns is not None
    assert page["source"] == "prometheus"
    mean_w = sum(figure.energy_j or 0 for figure in ended.figures) / ((ended.end_ns - ended.begin_ns) / 1e9)
    span_s = page["end_s"] - page["begin_s"]
    assert page["energy_j"]["value"] / span_s == pytest.approx(mean_w, rel=0.1), page["gaps"]
    assert page["energy_j"]["low"] <= page["energy_j"]["value"] <= page["energy_j"]["high"]
    (part,) = page["nodes"]
    assert part["name"] == f"127.0.0.1:{node.tcp_port}"
    refused = node.powerctl("report", "--prometheus", url, "--job", "no such job", "--since", "1m")
    assert refused.code == 2
    assert "no such job" in refused.err


def test_from_prometheus(live: LiveNode, start_prometheus: Callable[[str], Prometheus]) -> None:
    server = start_prometheus(scraping(live))

    def samples() -> float:
        found = server.query("sum(count_over_time(powerd_gpu_energy_joules_total[1m]))")
        return float(found[0]["value"][1]) if found else 0.0

    check(live, server.url, samples)


def test_from_victoria_metrics(live: LiveNode, tmp_path: Path) -> None:
    need("victoria-metrics")
    server = ScrapingVictoria(tmp_path / "vm", scraping(live))
    server.start()
    try:
        check(live, server.url, lambda: server.count("powerd_gpu_energy_joules_total"))
    finally:
        server.stop()
    with pytest.raises(OSError, match="refused"):
        http(server.url + "/health", timeout_s=2)
    gone = live.powerctl("report", "--prometheus", server.url)
    assert gone.code == 69
    assert "is this the server's address?" in gone.err
