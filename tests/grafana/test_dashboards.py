"""The dashboards' form: as generated, placed without overlap, on metrics and fields that exist, on data sources by variable."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards.grafana.__main__ import HERE, documents
from dashboards.grafana.parts import Panel, Query, Row, build
from dashboards.grafana.prometheus import SOURCE
from powerd.sinks.metrics import METRICS
from powerd_integrations.fleet.page import METRICS as PLANNED

FILES = sorted(path.name for path in HERE.glob("*.json"))
DASHBOARDS = {name: json.loads((HERE / name).read_text()) for name in FILES}
RULES = HERE.parent / "prometheus" / "powerd.rules.yml"
each = pytest.mark.parametrize("name", FILES)


def names_of_metrics() -> set[str]:
    """Every series name that the daemon's page can have, and the fleet planner's."""
    suffixes = {"counter": ("_total",), "gauge": ("",), "summary": ("_sum", "_count")}
    return {metric.name + suffix for metric in METRICS for suffix in suffixes[metric.kind]} | {metric.name for metric in PLANNED}


def things(node: Any) -> Iterator[dict[str, Any]]:
    """Every object of a document."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from things(value)
    elif isinstance(node, list):
        for value in node:
            yield from things(value)


def test_the_files_are_what_the_generator_makes() -> None:
    made = documents()
    assert sorted(made) == FILES
    for name, text in made.items():
        assert (HERE / name).read_text() == text, "run: python -m dashboards.grafana"


def test_uids_and_panel_numbers_are_unique() -> None:
    uids = [document["uid"] for document in DASHBOARDS.values()]
    assert len(set(uids)) == len(uids) == 2
    for document in DASHBOARDS.values():
        for key in ("id", "title"):
            values = [panel[key] for panel in document["panels"]]
            assert len(set(values)) == len(values), key


@each
def test_panels_lie_within_24_columns_and_do_not_overlap(name: str) -> None:
    places = [(p["title"], p["gridPos"]) for p in DASHBOARDS[name]["panels"]]
    for title, place in places:
        assert place["x"] >= 0, title
        assert place["x"] + place["w"] <= 24, title
        assert place["w"] > 0 < place["h"], title
    for (one, a), (other, b) in combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart, f"{one} over {other}"


def test_rows_that_do_not_fit_are_wrapped_or_refused() -> None:
    query = (Query("up"),)
    row = Row("r", tuple(Panel(f"p{n}", "", "none", query, width=10, height=n + 1) for n in range(3)))
    places = [panel["gridPos"] for panel in build("u", "t", "", SOURCE, (), (row,))["panels"]]
    assert [(p["x"], p["y"]) for p in places] == [(0, 0), (0, 1), (10, 1), (0, 3)]
    with pytest.raises(ValueError, match="wide"):
        build("u", "t", "", SOURCE, (), (Row("r", (Panel("wide", "", "none", query, width=25),)),))


@each
def test_every_data_source_is_chosen_by_a_variable(name: str) -> None:
    document = DASHBOARDS[name]
    (variable,) = (v["name"] for v in document["templating"]["list"] if v["type"] == "datasource")
    sources = {json.dumps(thing["datasource"]) for thing in things(document) if "datasource" in thing}
    assert {json.loads(source)["uid"] for source in sources} == {f"${{{variable}}}"}
    for panel in document["panels"]:
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == f"${{{variable}}}"


@each
def test_every_panel_says_what_it_shows(name: str) -> None:
    for panel in DASHBOARDS[name]["panels"]:
        if panel["type"] != "row":
            assert panel["description"].endswith("."), panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_every_metric_named_in_a_dashboard_or_a_rule_exists() -> None:
    rules = yaml.safe_load(RULES.read_text())
    recorded = {rule["record"] for group in rules["groups"] for rule in group["rules"] if "record" in rule}
    texts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    document = DASHBOARDS["powerd-prometheus.json"]
    texts += [target["expr"] for panel in document["panels"] for target in panel.get("targets", ())]
    texts += [v["query"]["query"] for v in document["templating"]["list"] if v["type"] == "query"]
    named = {word for text in texts for word in re.findall(r"\bpowerd[_:][a-z0-9_:]+", text)}
    assert named - names_of_metrics() - recorded == set()
    assert len(named) > 30


def test_every_label_named_in_a_dashboard_or_a_rule_exists() -> None:
    labels = [*(metric.labels for metric in METRICS), *(metric.labels for metric in PLANNED)]
    known = {"instance", "job"}.union(*labels)
    texts = [RULES.read_text(), (HERE / "powerd-prometheus.json").read_text()]
    used = {label for text in texts for label in re.findall(r"[{,] ?(\w+)(?:=~|!=|!~|=)\\?\"", text)}
    assert {"gpu", "kind", "reason", "job_name"} <= used
    assert used <= known


def test_the_provisioning_files_name_variables_for_secrets_and_addresses() -> None:
    sources = yaml.safe_load((HERE / "provisioning" / "datasources" / "powerd.yaml").read_text())["datasources"]
    assert {source["type"] for source in sources} == {v["query"] for d in DASHBOARDS.values() for v in d["templating"]["list"]
                                                     if v["type"] == "datasource"}  # fmt: skip
    for source in sources:
        assert source["url"].startswith("$")
        assert all(secret.startswith("$") for secret in source.get("secureJsonData", {}).values())
    (provider,) = yaml.safe_load((HERE / "provisioning" / "dashboards" / "powerd.yaml").read_text())["providers"]
    assert provider["type"] == "file"
    assert Path(provider["options"]["path"]).is_absolute()
