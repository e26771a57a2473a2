"""What docs/autoscaling.md shows works; every metric of the planner stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from powerd_integrations.fleet import settings as configured
from powerd_integrations.fleet.page import METRICS
from powerd_integrations.fleet.policy import build
from powerd_integrations.fleet.published import from_json, to_json
from tests.docs import markdown
from tests.fleet.test_settings import MODEL

PAGE = Path(__file__).resolve().parents[2] / "docs" / "autoscaling.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_file_that_is_shown_can_be_used() -> None:
    (block,) = [b for b in markdown.blocks("text") if b.page == PAGE and b.text.startswith("[planner]")]
    settings = configured.parse(block.text.replace('"engine.csv"', f'"{MODEL}"'))
    assert build(settings).name == "dynamollm"
    assert settings.engine.command[0] == "vllm"


def test_the_plan_that_is_shown_is_one() -> None:
    (block,) = [b for b in markdown.blocks("json") if b.page == PAGE]
    shown = json.loads(block.text)
    assert to_json(from_json(shown)) == shown


def test_every_metric_is_documented_and_no_other() -> None:
    table = TEXT.split("## Metrics\n", 1)[1].split("\n## ", 1)[0]
    assert set(re.findall(r"`(powerd_\w+)", table)) == {metric.name for metric in METRICS}


def test_every_knob_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`([a-z]+_[a-z_]+)`", TEXT)) - {"record_autoscaling_stats", "max_tokens", "desired_replicas"}
    keys = set()
    for section in (configured.PlannerSection, configured.ServiceSection, configured.EngineSection, configured.GroupSection):
        keys |= set(section.__dataclass_fields__)
    assert {name for name in named if not name.startswith("powerd_")} - keys <= {"shed_after_s"}
