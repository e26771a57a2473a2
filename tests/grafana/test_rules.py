"""The recording and alerting rules by promtool, and that no alert is without a test of both its answers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from dashboards.grafana.__main__ import HERE

pytestmark = pytest.mark.real
FOLDER = HERE.parent / "prometheus"
RULES, TESTS = FOLDER / "powerd.rules.yml", FOLDER / "powerd.rules.test.yml"


def run(promtool: Path, *words: str) -> tuple[int, str]:
    """promtool's exit code and all it said."""
    done = subprocess.run([str(promtool), *words], capture_output=True, text=True, timeout=120, cwd=FOLDER)
    return done.returncode, done.stdout + done.stderr


def test_the_rules_are_valid_and_pass_their_unit_tests(promtool: Path) -> None:
    assert run(promtool, "check", "rules", RULES.name)[0] == 0
    code, said = run(promtool, "test", "rules", TESTS.name)
    assert code == 0, said


def test_the_unit_tests_notice_a_rule_that_never_fires(promtool: Path, tmp_path: Path) -> None:
    rules = RULES.read_text().replace("expr: powerd_gpu_up == 0", "expr: powerd_gpu_up == 2")
    (tmp_path / RULES.name).write_text(rules)
    (tmp_path / TESTS.name).write_text(TESTS.read_text())
    code, said = run(promtool, "test", "rules", str(tmp_path / TESTS.name))
    assert code != 0
    assert "PowerdGpuLost" in said


def test_every_alert_has_a_moment_at_which_it_fires_and_one_at_which_it_does_not() -> None:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    cases = [case for test in yaml.safe_load(TESTS.read_text())["tests"] for case in test.get("alert_rule_test", ())]
    fires = {case["alertname"] for case in cases if case["exp_alerts"]}
    silent = {case["alertname"] for case in cases if not case["exp_alerts"]}
    assert alerts == fires == silent
    assert len(alerts) >= 14


def test_every_recording_rule_is_tested() -> None:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    recorded = {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}
    asked = " ".join(t["expr"] for test in yaml.safe_load(TESTS.read_text())["tests"] for t in test.get("promql_expr_test", ()))
    assert [name for name in sorted(recorded) if name not in asked] == []
