"""What docs/prometheus.md and docs/grafana.md tell people to write is accepted and complete."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from dashboards.grafana.__main__ import HERE
from tests.docs.markdown import ROOT

PROMETHEUS, GRAFANA = ((ROOT / "docs" / name).read_text() for name in ("prometheus.md", "grafana.md"))
RULES = HERE.parent / "prometheus" / "powerd.rules.yml"


@pytest.mark.real
@pytest.mark.parametrize("number", [0, 1, 2])
def test_prometheus_takes_the_configuration_that_the_page_shows(number: int, promtool: Path, tmp_path: Path) -> None:
    block = re.findall(r"```text\n(.*?)```", PROMETHEUS, re.S)[number]
    assert "scrape_configs" in block
    for name in ("powerd-ca.pem", "powerd-token"):
        (tmp_path / name).write_text("x")
    (tmp_path / RULES.name).write_text(RULES.read_text())
    config = tmp_path / "prometheus.yml"
    config.write_text(block.replace("/etc/prometheus", str(tmp_path)))
    done = subprocess.run([str(promtool), "check", "config", str(config)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("rules found" in done.stdout) == (number == 0)


def test_every_alert_and_no_other_is_in_the_page_s_table() -> None:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]
    assert re.findall(r"^\| `(Powerd\w+)` \|", PROMETHEUS, re.M) == alerts


def test_every_dashboard_and_every_variable_of_the_environment_is_explained() -> None:
    assert set(re.findall(r"`(powerd-\w+\.json)` \|", GRAFANA)) == {path.name for path in HERE.glob("*.json")}
    provisioning = "".join(path.read_text() for path in (HERE / "provisioning").rglob("*.yaml"))
    assert set(re.findall(r"^(POWERD_\w+)=", GRAFANA, re.M)) == set(re.findall(r"\$(POWERD_\w+)", provisioning))
    assert "/var/lib/grafana/dashboards/powerd" in provisioning
