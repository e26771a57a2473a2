"""A dashboard from rows of panels, built with Grafana's own types.

House rules: a panel says what it shows and nothing of how Grafana stores it; places and numbers are worked out here, so that two
runs give the same bytes; every query names its data source by a variable.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

COLUMNS = 24
_DASHED = {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 6]}}
_LINE = {"id": "custom.fillOpacity", "value": 0}


@dataclass(frozen=True, slots=True)
class Source:
    """A kind of data source and the variable that chooses one."""

    kind: str  # as Grafana calls it: prometheus, influxdb
    variable: str
    label: str

    @property
    def ref(self) -> models.DataSourceRef:
        """What every panel and query refers to."""
        return models.DataSourceRef(type_val=self.kind, uid=f"${{{self.variable}}}")


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel; ``dashed`` draws its lines as bounds, ``instant`` asks for the newest value only."""

    text: str
    legend: str = ""
    dashed: bool = False
    instant: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: what it shows, in which unit, how wide of 24 columns."""

    title: str
    what: str  # the help text behind the title
    unit: str
    queries: tuple[Query, ...]
    kind: str = "lines"  # lines, stack, number, bars, table, states
    width: int = 8
    height: int = 8
    low: float | None = None
    high: float | None = None
    decimals: int | None = None
    display: str = ""  # how lines are named where the query does not say
    hidden: tuple[str, ...] = ()  # columns that a table does not show
    named: tuple[tuple[str, str], ...] = ()  # columns of a table and their headings


@dataclass(frozen=True, slots=True)
class Row:
    """A headline and its panels, placed from left to right."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice at the top of the page, filled by a query."""

    name: str
    label: str
    query: str


class FluxQuery:
    """A Flux query as Grafana's InfluxDB data source takes it; the SDK has no type for it."""

    def __init__(self, ref_id: str, text: str, source: Source) -> None:
        self._json = {"refId": ref_id, "query": text, "datasource": source.ref.to_json()}

    def build(self) -> Any:
        """Itself: it is complete."""
        return self

    def to_json(self) -> dict[str, object]:
        """What Grafana stores."""
        return dict(self._json)


Dataquery.register(FluxQuery)


def _target(number: int, query: Query, panel: Panel, source: Source) -> Any:
    ref_id = chr(ord("A") + number)
    if source.kind != "prometheus":
        return FluxQuery(ref_id, query.text, source)
    target = prometheus.Dataquery().ref_id(ref_id).expr(query.text).datasource(source.ref)
    if query.legend:
        target = target.legend_format(query.legend)
    if panel.kind == "table":
        target = target.format(PromQueryFormat.TABLE)
    return target.instant() if query.instant or panel.kind in ("table", "bars") else target.range()


def _legend() -> common.VizLegendOptions:
    return (
        common.VizLegendOptions()
        .display_mode(common_models.LegendDisplayMode.TABLE)
        .placement(common_models.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["mean", "max", "lastNotNull"])
    )


def _lines(panel: Panel) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(60 if panel.kind == "stack" else 8)
        .show_points(common_models.VisibilityMode.NEVER)
        .span_nulls(False)
        .legend(_legend())
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI).sort(common_models.SortOrder.DESCENDING))
    )
    if panel.kind == "stack":
        made = made.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A"))
    for number, query in enumerate(panel.queries):
        if query.dashed:
            made = made.override_by_query(
                chr(ord("A") + number), [models.DynamicConfigValue(**_value(v)) for v in (_DASHED, _LINE)]
            )
    return made


def _value(change: dict[str, Any]) -> dict[str, Any]:
    return {"id_val": change["id"], "value": change["value"]}


def _table(panel: Panel) -> table.Panel:
    organize = {
        "excludeByName": dict.fromkeys(panel.hidden, True),
        "renameByName": dict(panel.named),
        "indexByName": {name: place for place, (name, _) in enumerate(panel.named)},
    }
    made = table.Panel().show_header(True)
    return made.with_transformation(models.DataTransformerConfig(id_val="organize", options=organize))


def _numbers(panel: Panel) -> stat.Panel:
    reduce = common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False)
    return stat.Panel().reduce_options(reduce).graph_mode(common_models.BigValueGraphMode.NONE)


def _bars(panel: Panel) -> bargauge.Panel:
    reduce = common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False)
    return (
        bargauge.Panel()
        .orientation(common_models.VizOrientation.HORIZONTAL)
        .display_mode(common_models.BarGaugeDisplayMode.BASIC)
        .reduce_options(reduce)
    )


def _states(panel: Panel) -> statetimeline.Panel:
    return statetimeline.Panel().merge_values(True).show_value(common_models.VisibilityMode.AUTO).row_height(0.8)


_KINDS = {"lines": _lines, "stack": _lines, "number": _numbers, "bars": _bars, "table": _table, "states": _states}


def _panel(panel: Panel, number: int, place: models.GridPos, source: Source) -> Any:
    made: Any = _KINDS[panel.kind](panel)
    made = made.id(number).title(panel.title).description(panel.what).unit(panel.unit).grid_pos(place).datasource(source.ref)
    plain = dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE)
    made = made.thresholds(plain.steps([models.Threshold(value=None, color="green")]))
    mode = models.FieldColorModeId.THRESHOLDS if panel.kind in ("number", "table") else models.FieldColorModeId.PALETTE_CLASSIC
    made = made.color_scheme(dashboard.FieldColor().mode(mode))
    if panel.low is not None:
        made = made.min(panel.low)
    if panel.high is not None:
        made = made.max(panel.high)
    if panel.decimals is not None:
        made = made.decimals(panel.decimals)
    if panel.display:
        made = made.display_name(panel.display)
    for at, query in enumerate(panel.queries):
        made = made.with_target(_target(at, query, panel, source))
    return made


def _variable(one: Variable, source: Source) -> dashboard.QueryVariable:
    query: str | dict[str, object] = one.query
    if source.kind == "prometheus":
        query = {"query": one.query, "refId": f"Variable-{one.name}", "qryType": 1}
    return (
        dashboard.QueryVariable(one.name)
        .label(one.label)
        .datasource(source.ref)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def build(uid: str, title: str, what: str, source: Source, variables: Sequence[Variable], rows: Sequence[Row]) -> dict[str, Any]:
    """The whole dashboard as Grafana's JSON; ValueError when a row's panels do not fit into its columns."""
    made = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(what)
        .tags(["powerd", "gpu", "energy"])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .editable()
        .with_variable(dashboard.DatasourceVariable(source.variable).label(source.label).type(source.kind))
    )
    for one in variables:
        made = made.with_variable(_variable(one, source))
    y, number = 0, 0
    for row in rows:
        number += 1
        made = made.with_row(dashboard.Row(row.title).id(number).grid_pos(models.GridPos(h=1, w=COLUMNS, x=0, y=y)))
        y += 1
        x = tallest = 0
        for panel in row.panels:
            if panel.width > COLUMNS:
                raise ValueError(f"{panel.title}: wider than the page")
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            number += 1
            made = made.with_panel(_panel(panel, number, models.GridPos(h=panel.height, w=panel.width, x=x, y=y), source))
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
    return json.loads(text(made.build()))  # type: ignore[no-any-return]


def text(document: Any) -> str:
    """The file's text: keys in order, one line a value, so that a change is a readable difference."""
    return json.dumps(document, cls=JSONEncoder, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
