"""The dashboards against the real judges: Grafana's own types by TypeScript, InfluxData's own compiler for Flux."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dashboards.grafana.__main__ import HERE
from tests.grafana.tools import flux_is_valid, flux_script, type_errors

pytestmark = pytest.mark.real
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(HERE.glob("*.json"))}


def declarations(document: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Each panel as a value of its own type: in a dashboard's union of panels TypeScript lets unknown keys pass."""
    made = {
        f"panel{panel['id']}": ("RowPanel" if panel["type"] == "row" else "Panel", panel) for panel in document["panels"]
    }  # fmt: skip
    top = copy.deepcopy(document)
    for variable in top["templating"]["list"]:
        for key in ("auto", "auto_min", "auto_count"):  # the SDK writes them, Grafana reads them, its types do not know them
            variable.pop(key, None)
    return {**made, "top": ("Dashboard", top)}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_panel_is_what_grafana_s_types_say(name: str, tmp_path: Path) -> None:
    assert type_errors(declarations(DASHBOARDS[name]), tmp_path) == ""


def test_the_type_check_notices_a_wrong_key_and_a_wrong_type(tmp_path: Path) -> None:
    panel = next(p for p in DASHBOARDS["powerd-prometheus"]["panels"] if p["type"] == "timeseries")
    wrong = {**panel, "gridPoss": panel["gridPos"]}
    complaints = type_errors({"a": ("Panel", wrong), "b": ("Panel", {**panel, "title": 5}), "c": ("Panel", panel)}, tmp_path)
    assert "gridPoss" in complaints
    assert complaints.count("error TS") == 2


def flux() -> dict[str, str]:
    """Every Flux query of the dashboards, variables' too."""
    document = DASHBOARDS["powerd-influx"]
    queries = {f"{p['title']} {t['refId']}": t["query"] for p in document["panels"] for t in p.get("targets", ())}
    queries |= {v["name"]: v["query"] for v in document["templating"]["list"] if v["type"] == "query"}
    return {name: flux_script(query) for name, query in queries.items()}


def test_every_flux_query_compiles() -> None:
    queries = flux()
    assert len(queries) > 25
    assert [name for name, valid in flux_is_valid(queries).items() if not valid] == []


def test_the_compiler_notices_what_is_wrong_with_a_query() -> None:
    good = flux()["Power now A"]
    wrong = {
        "function": good.replace("last()", "lastt()"), "argument": good.replace("start:", "strat:"),
        "type": good + ' |> aggregateWindow(every: "10s", fn: mean)', "syntax": good.replace(")", "", 1),
    }  # fmt: skip
    assert flux_is_valid({"good": good, **wrong}) == {"good": True, **dict.fromkeys(wrong, False)}
