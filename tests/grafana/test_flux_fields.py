"""What the Flux queries name is what the InfluxDB sink writes: measurements, tags and fields."""

from __future__ import annotations

import json
import re

from dashboards.grafana.__main__ import HERE
from powerd.api import LeaseView, WantSpec
from powerd.clock import NS
from powerd.jobs import JobRow
from powerd.model import Control, Event, Health, LeaseEnd, LeaseState, Reading, Snapshot, WantClass
from powerd.records import JobStepRow
from powerd.sinks.lines import TAGS, InferenceRow, Lines

UUID = "GPU-00000000-0000-0000-0000-000000000001"
OURS = {"_time", "_value", "_field", "_measurement", "full", "plan"}  # Flux's own columns, and those that a query makes
DOCUMENT = json.loads((HERE / "powerd-influx.json").read_text())


def written() -> dict[str, set[str]]:
    """Measurement -> fields, of lines that the sink made of full rows."""
    lines = Lines("node", sample_hz=1.0, every=True)
    reading = Reading(
        UUID, NS, Health.UP, 1, 5_000_000, NS, 250_000, 251_000, 1200, 1593, 61, 97, 2 << 30, 80 << 30, 400_000, 390_000, 4
    )  # fmt: skip
    wants = (WantSpec(Control.SM_CLOCK, 1200, 1200), WantSpec(Control.POWER_LIMIT, 300_000, 300_000))
    lease = LeaseView(
        id="l1", state=LeaseState.ACTIVE, want_class=WantClass.LEASE, uid=1, user="ann", pid=2, gpus=(UUID,), wants=wants,
        reason="why", job="j", detached=True, ttl_s=9.0, age_s=1.0, expires_in_s=9.0, end=LeaseEnd.RELEASED,
    )  # fmt: skip
    step = JobStepRow("j", 0, 1, NS, NS, 2 * NS, 1.0, 400.0, 1200.0, "p1", (UUID,))
    made = [
        *lines.snapshot(Snapshot(1, NS, NS, (reading,))),
        *lines.lease(NS, lease),
        *lines.job(NS, step),
        *lines.job(NS, JobRow("j", 1, NS, energy_j=1.0, checkpoint_energy_j=1.0, plan="p1")),
        *lines.inference(InferenceRow("chat", NS, 2, 4, 1200, 3.5, 1, 0.1, 0.2, 0.01, 0.02, 900.0, 0.99, 1, 5, 800.0, 0.4, 0.1)),
        *lines.event(Event(1, NS, NS, "drift", UUID, "sm_clock", "said", {"a": 1})),
    ]
    fields: dict[str, set[str]] = {}
    for line in made:
        measurement = re.match(r"\w+", line)
        assert measurement is not None
        fields.setdefault(measurement[0], set()).update(re.findall(r"[ ,](\w+)=", line))
    return fields


def queries() -> list[tuple[str, str]]:
    return [(p["title"], t["query"]) for p in DOCUMENT["panels"] for t in p.get("targets", ())]


def test_every_measurement_and_field_of_a_query_is_written() -> None:
    fields = written()
    for title, query in queries():
        (measurement,) = set(re.findall(r'_measurement == "(\w+)"', query))
        assert measurement in fields, title
        known = fields[measurement] | OURS | set(TAGS)
        known |= {f"{name}_{side}" for name in fields[measurement] for side in ("full", "plan")}  # a join's two sides
        named = re.findall(r'_field == "(\w+)"', query) + re.findall(r"\br\.(\w+)", query)
        assert set(named) - known == set(), title
        for pattern in re.findall(r"_field =~ /(.+?)/", query):
            assert any(re.search(pattern, name) for name in fields[measurement]), title


def test_every_column_that_a_table_names_or_hides_is_written() -> None:
    fields = written()
    for panel in DOCUMENT["panels"]:
        if panel["type"] == "table":
            (measurement,) = set(re.findall(r'_measurement == "(\w+)"', panel["targets"][0]["query"]))
            options = panel["transformations"][0]["options"]
            named = {*options["renameByName"], *options["excludeByName"]}
            assert named - fields[measurement] - set(TAGS) <= {"_time", "_start", "_stop", "_measurement"}, panel["title"]


def test_levels_are_in_the_units_that_their_panels_say() -> None:
    suffix = {"watt": "_watts", "joule": "_joules", "hertz": "_hertz", "celsius": "_celsius", "bytes": "_bytes", "s": "_seconds"}
    for panel in DOCUMENT["panels"]:
        unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit")
        for target in panel.get("targets", ()):
            field = re.search(r'_field == "(\w+)"', target["query"])
            if unit in suffix and field and field[1] != "up" and "derivative" not in target["query"]:
                assert field[1].endswith(suffix[unit]), panel["title"]
