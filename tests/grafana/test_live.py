"""A real Prometheus scrapes a real powerd on a simulated node: every panel's query has an answer, and the answers are right."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as parse

from dashboards.grafana.__main__ import HERE
from powerd.api import JobEvent, JobStep, LeaseRequest, WantSpec
from powerd.clock import NS
from powerd.model import Control
from powerd.replicatypes import ReplicaRequest, SloSpec
from powerd_integrations.fleet.page import page as fleet_page
from powerd_integrations.fleet.planner import PlannerFigures
from powerd_integrations.fleet.published import Group, PublishedPlan
from tests.docs.markdown import ROOT
from tests.e2e.live import LiveNode, free_port, wait_for
from tests.hw.test_rapl import FakePowercap
from tests.real.servers import Prometheus, need
from tests.replicas.engine import Endpoint, Engine

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("grafana-live")]
RULES = HERE.parent / "prometheus" / "powerd.rules.yml"
DOCUMENT = json.loads((HERE / "powerd-prometheus.json").read_text())
SCRAPE = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: powerd
    authorization: {{credentials_file: {token}}}
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
  - job_name: powerd-dcgm
    metrics_path: /metrics/dcgm
    authorization: {{credentials_file: {token}}}
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
  - job_name: powerd-planner
    static_configs: [{{targets: ["127.0.0.1:{planner}"]}}]
"""
CHAT, CODE = Group("chat", 1), Group("code", 1)
PLAN = PublishedPlan(1, 1.0, 2.0, desired={CHAT: 2, CODE: 1}, clocks_mhz={CHAT: 1200})


READ_TOKEN = "only-reads-0123456789"


@dataclass
class Busy(Engine):
    """Answers five requests whenever somebody looks."""

    ttft_s: float = 0.2

    def page(self) -> str:
        self.ttft += [self.ttft_s] * 5
        self.gaps += [0.03] * 50
        return super().page()


def want(control: Control, value: int) -> WantSpec:
    return WantSpec(control, value, value)


def request(node: LiveNode, gpu: int, *wants: WantSpec) -> LeaseRequest:
    return LeaseRequest((node.uuids[gpu],), wants, "dashboards", detached=True)


def report_job(node: LiveNode) -> None:
    """A job with steps at full clock and steps under a plan that need a fifth less; one of them is thrown away."""
    steps = [
        JobStep(n, n * NS, (n + 1) * NS, (node.uuids[0],), "baseline" if n < 4 else "p1", 500.0 if n < 4 else 400.0)
        for n in range(9)
    ]
    for event in (JobEvent("start"), JobEvent("step", steps=tuple(steps)), JobEvent("restore", step=7)):
        node.client.job_event_strict("gpt-tiny", event)


def pools(node: LiveNode, stack: contextlib.ExitStack) -> None:
    """A replica of pool chat that keeps its SLO, and one of pool code that has missed it and has fallen silent since."""
    chat, code = Endpoint(Busy(running=3, waiting=1)), Endpoint(Busy(running=30, waiting=4, ttft_s=0.9))
    stack.callback(chat.close)
    for gpu, (pool, engine) in enumerate((("chat", chat), ("code", code))):
        node.client.replica_create(
            ReplicaRequest(f"{pool}-0", pool, (node.uuids[gpu],), engine.url, SloSpec(0.5, 0.1), detached=True, ttl_s=3600)
        )

    def states() -> dict[str, tuple[str, bool | None]]:
        return {view.name: (view.state, view.within_slo) for view in node.client.replicas()}

    wait_for("both are judged", lambda: states() == {"chat-0": ("fresh", True), "code-0": ("fresh", False)})
    code.close()
    wait_for("code's page is stale", lambda: states()["code-0"][0] == "stale")


@pytest.fixture(scope="module")
def node() -> Iterator[LiveNode]:
    """Two GPUs at work: a lease holds one, one was released, one lost to somebody else's change; a job has reported."""
    influx = f'[influx]\nurl = "http://127.0.0.1:{free_port()}"\nbucket = "powerd"\n'
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "read-token").write_text(READ_TOKEN)
        (folder / "read-token").chmod(0o600)
        more = f'read_token_file = "{folder}/read-token"\n[metrics]\ndcgm = true\n{influx}'
        tree = FakePowercap(folder / "powercap")  # made up: a machine like this one has none
        node = stack.enter_context(LiveNode(more=more, hw=f'powercap_dir = "{tree.root}"'))
        for gpu in range(2):
            stack.enter_context(node.load(gpu, 0.9))
        short = node.client.lease_create(request(node, 1, want(Control.SM_CLOCK, 1200)))
        node.client.lease_release(short.id, short.token)
        node.client.lease_create(request(node, 1, want(Control.POWER_LIMIT, 300_000)))
        node.node.fault("foreign-limit", 1, value=350_000)
        wait_for("drift is seen", lambda: any(e.kind == "drift" for e in node.client.events()))
        node.client.lease_create(request(node, 0, want(Control.SM_CLOCK, 1200), want(Control.POWER_LIMIT, 300_000)))
        report_job(node)
        pools(node, stack)
        yield node


@pytest.fixture(scope="module")
def prometheus(node: LiveNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has scraped the node for a few seconds, with our rules."""
    need("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "token").write_text(READ_TOKEN)
    planner = Endpoint(Engine())
    planner.text = fleet_page(PLAN, PlannerFigures(1, 0.1, 0, 0, {}, {}, 0, 0))
    port = planner.url.split(":")[2].split("/")[0]
    server = Prometheus(folder, SCRAPE.format(rules=RULES, token=folder / "token", port=node.tcp_port, planner=port))
    server.start()
    try:
        enough = 'count_over_time(powerd_gpu_power_watts{gpu="0"}[1m]) >= 6'
        wait_for("six scrapes", lambda: server.query(enough), timeout_s=60)
        yield server
    finally:
        server.stop()
        planner.close()


def filled_in(query: str) -> str:
    """The query as Grafana sends it with everything chosen."""
    query = re.sub(r"\$(node|gpu|training|pool)", ".*", query)
    query = query.replace("$__rate_interval", "30s").replace("$__range", "1m")
    assert "$" not in query, query
    return query


def panel_queries() -> Iterator[tuple[str, str]]:
    for panel in DOCUMENT["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", filled_in(target["expr"])


def test_every_panel_s_query_has_an_answer(prometheus: Prometheus) -> None:
    queries = dict(panel_queries())
    assert len(queries) > 35
    assert [name for name, query in queries.items() if not prometheus.query(query)] == []


def test_every_choice_at_the_top_of_the_page_has_something_to_choose(prometheus: Prometheus) -> None:
    for variable in DOCUMENT["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert asked is not None
            series, label = asked.groups()
            assert prometheus.query(f"count by ({label}) ({filled_in(series)})"), variable["name"]


def test_every_legend_names_labels_that_the_answer_has(prometheus: Prometheus) -> None:
    for panel in DOCUMENT["panels"]:
        for target in panel.get("targets", ()):
            labels = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
            for series in prometheus.query(filled_in(target["expr"])):
                assert labels <= set(series["metric"]), panel["title"]


def value(prometheus: Prometheus, query: str) -> float:
    (series,) = prometheus.query(query)
    return float(series["value"][1])


def test_the_answers_are_what_was_done_on_the_node(prometheus: Prometheus, node: LiveNode) -> None:
    titles = {name.rpartition(" ")[0]: query for name, query in panel_queries()}
    assert value(prometheus, titles["GPUs that answer"]) == 2
    assert value(prometheus, titles["Active leases"]) >= 1
    assert value(prometheus, titles["Saving"]) == pytest.approx(0.2)
    assert value(prometheus, 'sum(powerd_gpu_power_limit_watts{gpu="0", kind="enforced"})') == 300
    assert value(prometheus, 'powerd_gpu_sm_clock_lock_hertz{gpu="0", bound="maximum"}') == 1200e6
    assert value(prometheus, 'sum(powerd_drift_total{control="power_limit"})') >= 1
    assert value(prometheus, 'powerd_restore_total{cause="lease_end"}') >= 1
    assert value(prometheus, "powerd_spool_bytes") > 0, "nobody takes the points"
    held = {(s["metric"]["gpu"], s["metric"]["control"], s["metric"]["class"]) for s in prometheus.query("powerd_gpu_set_by")}
    assert held == {("0", "sm_clock", "lease"), ("0", "power_limit", "lease")}


def test_pools_are_told_as_their_replicas_and_the_planner_told_them(prometheus: Prometheus) -> None:
    titles = dict(panel_queries())

    def by_pool(title: str) -> dict[str, float]:
        return {s["metric"]["pool"]: float(s["value"][1]) for s in prometheus.query(titles[title])}

    assert by_pool("Time to first token A") == {"chat": 0.25}, "the edge above 0.2 s; nothing is known of what is stale"
    assert by_pool("Time to first token B") == {"chat": 0.5, "code": 0.5}
    assert by_pool("Time between tokens A") == {"chat": 0.05}
    assert by_pool("Within SLO A") == {"chat": 1.0}
    assert by_pool("Replicas and what is wanted A") == {"chat": 1, "code": 1}
    assert by_pool("Replicas and what is wanted B") == {"chat": 2, "code": 1}
    assert by_pool("Fresh and stale replicas A") == {"chat": 1, "code": 0}
    assert by_pool("Fresh and stale replicas B") == {"chat": 0, "code": 1}
    assert by_pool("Requests running A") == {"chat": 3}
    assert by_pool("Clock of pools A").keys() == {"chat", "code"}
    assert min(by_pool("Power of pools A")[pool] for pool in ("chat", "code")) > 10, "both GPUs work"


def test_every_recording_rule_has_an_answer(prometheus: Prometheus) -> None:
    records = [r["record"] for g in yaml.safe_load(RULES.read_text())["groups"] for r in g["rules"] if "record" in r]
    assert len(records) > 10
    wait_for("all rules are evaluated", lambda: all(prometheus.query(name) for name in records))


def test_every_example_of_the_page_is_taken_and_has_an_answer(prometheus: Prometheus) -> None:
    page = (ROOT / "docs" / "prometheus.md").read_text()
    examples = re.findall(r"^    ((?:sum|rate|powerd_).+?)   +\S", page, re.M)
    assert len(examples) >= 6
    unanswered = [example for example in examples if not prometheus.query(example)]
    assert unanswered == ["powerd_pool_ttft_p99_seconds > powerd_pool_ttft_slo_seconds"], (
        "the one pool that is known keeps its SLO"
    )


def test_the_page_passes_promtool_s_lint(node: LiveNode, promtool: Path) -> None:
    page = node.http("GET", "/metrics").out
    done = subprocess.run([str(promtool), "check", "metrics"], input=page, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_somebody_else_s_change_raises_the_alert(prometheus: Prometheus, node: LiveNode) -> None:
    firing = 'ALERTS{alertname="PowerdDrift", control="power_limit", alertstate="firing"}'
    assert prometheus.query(firing) == [], "the first change was before the first scrape"
    node.client.lease_create(request(node, 1, want(Control.POWER_LIMIT, 320_000)))
    node.node.fault("foreign-limit", 1, value=360_000)
    wait_for("PowerdDrift fires", lambda: prometheus.query(firing))


def test_dcgm_s_page_is_scraped_with_dcgm_s_labels(prometheus: Prometheus, node: LiveNode) -> None:
    energy = prometheus.query("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION")
    assert {s["metric"]["UUID"] for s in energy} == set(node.uuids)
    assert {"gpu", "UUID", "device", "modelName", "Hostname", "pci_bus_id"} <= set(energy[0]["metric"])
    assert {s["metric"]["device"] for s in energy} == {"nvidia0", "nvidia1"}


def test_both_pages_tell_the_same_energy(node: LiveNode) -> None:
    def joules(path: str, name: str, scale: float) -> float:
        families = parse(node.http("GET", path).out)
        return sum(s.value * scale for family in families for s in family.samples if s.name == name)

    before = joules("/metrics", "powerd_gpu_energy_joules_total", 1)
    dcgm = joules("/metrics/dcgm", "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION_total", 1e-3)
    after = joules("/metrics", "powerd_gpu_energy_joules_total", 1)
    assert 0 < before - 1e-6 <= dcgm <= after + 1e-6


def test_prometheus_token_reads_everything_and_sets_nothing(node: LiveNode) -> None:
    shown = {"Authorization": f"Bearer {READ_TOKEN}"}
    for path in ("/metrics", "/v1/snapshot", "/v1/leases", "/v1/history"):
        assert node.http("GET", path, tcp=True, **shown).code == 200, path
    (lease, *_) = node.client.leases()
    for method, path in (("POST", "/v1/panic"), ("POST", "/v1/leases"), ("DELETE", f"/v1/leases/{lease.id}"),
                         ("POST", "/v1/jobs/x/events"), ("POST", "/v1/windows")):  # fmt: skip
        refused = node.http(method, path, {}, tcp=True, **shown)
        assert (refused.code, refused.json()["error"]["code"]) == (403, "denied"), path
    assert not node.client.node().panic
    assert node.http("GET", "/metrics", tcp=True, Authorization="Bearer only-reads-0123456780").code == 403


def test_dcgm_s_page_and_names_of_jobs_are_off_when_the_operator_says_so(node: LiveNode) -> None:
    assert "powerd_training_steps_total{" in node.http("GET", "/metrics").out
    off = node.config_text.replace("dcgm = true", "dcgm = false\njob_names = false")
    try:
        node.write_config(off)
        node.reload()
        refused = node.http("GET", "/metrics/dcgm")
        assert refused.code == 404
        assert "dcgm = true" in refused.json()["error"]["hint"]
        page = node.http("GET", "/metrics").out
        assert "powerd_training_" not in page
        assert "powerd_job_steps_total 9" in page
    finally:
        node.write_config(node.config_text)
        node.reload()
