"""Reports: what a counter's course comes to, what is said when something is missing, and that the JSON stays as it is."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import msgspec
import pytest

from powerd.cli.reports import build, nodes, page, prometheus
from powerd.cli.reports.counters import counted, summed
from powerd.cli.reports.model import Amount, Factors, Report
from powerd.errors import ConfigError, RequestError, UnavailableError
from tests.cli.report_data import BEGIN_S, END_S, STEPS, WATTS, course, node, steps, view
from tests.client.fake_daemon import UUIDS, FakeDaemon

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "report.json"
FACTORS = Factors(0.12, "EUR", 400.0)
TRUE_J = WATTS * (END_S - BEGIN_S)


def made(*data: nodes.NodeData, job: str | None = "train-7", factors: Factors = FACTORS) -> Report:
    return build.build(data, job=job, begin_s=BEGIN_S, end_s=END_S, made_s=END_S + 60, source="nodes", factors=factors)


# --- energy of a stored counter -----------------------------------------------------------------------------------------------


def test_energy_is_the_counters_difference() -> None:
    amount, notes = counted(course(), BEGIN_S + 0.5, END_S)
    assert amount.value == pytest.approx(TRUE_J - 0.5 * WATTS)
    assert amount.value is not None
    assert amount.low is not None
    assert amount.high is not None
    assert amount.low < amount.value * 0.991
    assert amount.high > amount.value * 1.009
    assert notes == ()


def test_a_restart_of_the_counter_is_bridged_by_power_and_named() -> None:
    series = course()
    half = len(series.time_s) // 2
    energy = (*series.energy_j[:half], *(WATTS * i for i in range(len(series.time_s) - half)))
    for epoch in ((*[1.0] * half, *[2.0] * (len(series.time_s) - half)), ()):
        amount, notes = counted(replace(series, energy_j=energy, epoch=epoch), BEGIN_S, END_S)
        assert amount.value == pytest.approx(TRUE_J)
        assert len(notes) == 1
        assert notes[0].startswith("the energy counter restarted between ")


def test_a_hole_in_the_store_is_counted_across_and_named() -> None:
    series = course()
    hole = [i for i in range(len(series.time_s)) if not 100 <= i < 300]

    def cut(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(values[i] for i in hole)

    torn = replace(
        series, time_s=cut(series.time_s), energy_j=cut(series.energy_j), power_w=cut(series.power_w), epoch=cut(series.epoch)
    )
    amount, notes = counted(torn, BEGIN_S, END_S)
    assert amount.value == pytest.approx(TRUE_J)
    assert [n[:16] for n in notes] == ["no samples from "]


def test_what_lies_before_the_first_sample_is_not_guessed() -> None:
    amount, notes = counted(course(), BEGIN_S - 500, END_S)
    assert (amount.value, amount.low, amount.high) == (None, None, None)
    assert amount.known == pytest.approx(TRUE_J + 10 * WATTS)
    assert notes[0].startswith("not measured before ")


def test_unknown_is_never_zero() -> None:
    dark = replace(course(), energy_j=(None,) * len(course().time_s))
    assert counted(dark, BEGIN_S, END_S)[0] == Amount(None, None, None, None)
    whole = Amount(10.0, 9.0, 11.0, 10.0)
    assert summed([whole, Amount(None, None, None, None)]) == Amount(None, None, None, 10.0)
    assert summed([]) == Amount(None, None, None, None)
    assert summed([whole, whole]) == Amount(20.0, 18.0, 22.0, 20.0)


# --- the report ---------------------------------------------------------------------------------------------------------------


def test_the_json_is_the_golden_file() -> None:
    text = msgspec.json.format(msgspec.json.encode(made(node("node7"), node("node8", 2))), indent=2).decode() + "\n"
    if os.environ.get("POWERD_WRITE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    wanted = json.loads(GOLDEN.read_text(encoding="utf-8"))
    hint = f"POWERD_WRITE_GOLDEN=1 pytest {__file__} writes it anew"
    assert _rounded(json.loads(text)) == _rounded(wanted), hint
    msgspec.json.decode(GOLDEN.read_bytes(), type=Report)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def test_a_job_over_two_nodes() -> None:
    report = made(node("node7"), node("node8", 2))
    assert report.energy_j.value == pytest.approx(2 * TRUE_J)
    assert report.cost is not None
    assert report.cost.value == pytest.approx(2 * TRUE_J / 3.6e6 * 0.12)
    assert report.carbon_g is not None
    assert report.carbon_g.value == pytest.approx(2 * TRUE_J / 3.6e6 * 400)
    assert report.saving is not None
    assert report.saving.outcome == "saving"
    assert report.saving.saving is not None
    assert report.saving.saving.low < 0.08 < report.saving.saving.high
    assert report.saving.slowdown is not None
    assert report.saving.slowdown.low < 0.01 < report.saving.slowdown.high
    under = [s for n in (steps(1), steps(2)) for s in n if s.plan == "p-1"]
    used = sum(s.energy_j or 0 for s in under)
    assert report.saving.saved_energy_j is not None
    assert report.saving.saved_energy_j.value == pytest.approx(used * 0.08 / 0.92, rel=0.05)
    assert report.job is not None
    assert report.job.goodput_ratio == pytest.approx(0.95, abs=0.02)
    assert report.gaps == ()


def test_without_a_true_saving_nothing_is_claimed() -> None:
    report = made(node(saving=0.0))
    assert report.saving is not None
    assert report.saving.outcome == "not proven"
    assert report.saving.saved_energy_j is None
    assert report.saving.text.startswith("not proven: ")


@pytest.mark.parametrize(
    ("plans", "why"),
    [
        ((None,), "no step ran under a plan"),
        (("p-1",), "no step at full clock"),
        (("baseline",) * 100 + ("p-1",) * 173, "1 pairs"),
    ],
)
def test_a_saving_needs_both_sides_and_their_change(plans: tuple[str | None, ...], why: str) -> None:
    rows = tuple(replace(s, plan=plans[i % len(plans)]) for i, s in enumerate(steps()))
    report = made(replace(node(), steps=rows))
    assert report.saving is not None
    assert report.saving.outcome == "not proven"
    assert why in report.saving.text


def test_a_node_that_is_away_makes_the_whole_unknown_and_keeps_the_rest() -> None:
    report = made(node(), nodes.NodeData("node8", error="connection refused"))
    assert report.energy_j.value is None
    assert report.energy_j.known == pytest.approx(TRUE_J)
    assert report.saving is not None
    assert report.saving.outcome == "saving"
    assert [g.where for g in report.gaps] == ["node8", "report"]


def test_without_a_store_the_jobs_own_steps_are_told() -> None:
    report = made(replace(node(), gpus=(), notes=("its store tells nothing: the store is off",)))
    assert (report.energy_j.value, report.method) == (155_000.0, "steps")
    partly = made(replace(node(), gpus=(), job=view(unmeasured_steps=3)))
    assert (partly.energy_j.value, partly.energy_j.known) == (None, 155_000.0)


def test_lost_steps_cost_energy() -> None:
    kept = sum(s.energy_j or 0 for s in steps())
    report = made(replace(node(), job=view(lost_steps=20, energy_j=kept + 9000, checkpoints=1, checkpoint_energy_j=1000.0)))
    assert report.job is not None
    assert report.job.lost_energy_j == pytest.approx(8000)
    assert report.job.energy_per_kept_step_j == pytest.approx((kept + 9000) / STEPS)


def test_the_page_stands_alone_escapes_and_names_everything() -> None:
    evil = "<script>alert(1)</script>"
    report = made(replace(node(evil), notes=(f"GPU {evil} is gone",)))
    text = page.html(replace(report, title=evil))
    assert "<script" not in text
    assert not re.search(r"(src|href)=[\"']?(?!#)", text.replace("xlink:href", ""))
    assert text.count("<svg") == 3 == text.count('role="img"')
    assert "#01020a" not in text
    assert "prefers-color-scheme: dark" in text
    assert report.saving is not None
    assert text.count(report.saving.text) >= 3
    for table in re.findall(r"<table>.*?</table>", text, re.S):
        assert ElementTree.fromstring(table).find("caption") is not None
        assert 'scope="' in table
    assert page.html(report) == page.html(report)


def test_prices_and_carbon_are_read_with_their_units() -> None:
    assert build.price("0.12/kWh") == (0.12, "")
    assert build.price("0.12 EUR/kWh") == (0.12, "EUR")
    assert (build.carbon("0.4kg/kWh"), build.carbon(None)) == (400.0, None)
    for read, bad in ((build.price, "0.12"), (build.price, "cheap"), (build.carbon, "400/kWh"), (build.carbon, "400t/kWh")):
        with pytest.raises(RequestError):
            read(bad)


# --- where data come from -----------------------------------------------------------------------------------------------------


def test_a_file_of_nodes_says_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "nodes.toml"
    file.write_text('[[node]]\nurl = "https://n1:9478"\ntoken_file = "t"\n[[node]]\nname = "b"\nsocket = "/run/b.sock"\n')
    found = nodes.read_endpoints(file)
    assert [e.name for e in found] == ["https://n1:9478", "b"]
    assert found[0].token_file == str(tmp_path / "t")
    for text, said in (("", "one [[node]]"), ("[[node]]\n", "either a socket or a url"),
                       ('[[node]]\nsocet = "x"', "did you mean 'socket'"),
                       ('[[node]]\nsocket = "x"\n[[node]]\nsocket = "x"', "names two nodes"),
                       ("[[node", "nodes.toml")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(said)):
            nodes.read_endpoints(file)


class _Metrics(BaseHTTPRequestHandler):
    """A metrics server's query API over one GPU that is scraped every 15 s; its counter restarts once."""

    server: _MetricsServer

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        self.server.asked.append(query["query"])
        if self.server.broken:
            return self._send(400, {"status": "error", "error": "bad range"})
        labels = {"instance": "n1:9478", "uuid": UUIDS[0], "gpu": "3", "name": "H100"}
        if parts.path.endswith("/query"):
            return self._send(200, self._answer([{"metric": labels, "value": [0, "1"]}]))
        begin, end, step = float(query["start"]), float(query["end"]), float(query["step"].rstrip("s"))
        times = [begin + i * step for i in range(int((end - begin) / step) + 1)]
        values = []
        for at in times:
            scraped = at // 15 * 15
            value = {"powerd_gpu_power_watts": WATTS, "timestamp(powerd_gpu_energy_joules_total)": scraped,
                     "powerd_gpu_energy_joules_total": 5000 + WATTS * (scraped - BEGIN_S)}.get(query["query"], 1.0)  # fmt: skip
            if "powerd_job_gpu" not in query["query"] or ('"train-7"' in query["query"] and BEGIN_S <= at <= END_S):
                values.append([at, str(value)])
        self._send(200, self._answer([{"metric": labels, "values": values}] if values else []))

    @staticmethod
    def _answer(result: list[Any]) -> dict[str, Any]:
        return {"status": "success", "data": {"resultType": "matrix", "result": result}}

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _MetricsServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Metrics)
        self.asked: list[str] = []
        self.broken = False


@pytest.fixture
def metrics() -> Iterator[_MetricsServer]:
    server = _MetricsServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join(10)
    server.server_close()


def test_energy_from_a_metrics_server_by_the_times_of_its_scrapes(metrics: _MetricsServer) -> None:
    server = prometheus.Server.at(f"http://127.0.0.1:{metrics.server_port}", None, 10)
    data, begin_s, end_s = prometheus.collect(server, "train-7", BEGIN_S - 3600, END_S + 3600, lambda *_: None)
    assert begin_s == pytest.approx(BEGIN_S, abs=8)
    assert end_s == pytest.approx(END_S, abs=8)
    report = build.build(
        data, job="train-7", begin_s=begin_s, end_s=end_s, made_s=END_S, source="prometheus", factors=Factors(None, "", None)
    )
    assert report.energy_j.value == pytest.approx(WATTS * (end_s - begin_s), rel=0.01)
    assert (report.nodes[0].name, report.nodes[0].gpus[0].index, report.nodes[0].gpus[0].name) == ("n1:9478", 3, "H100")
    assert (report.cost, report.carbon_g, report.job) == (None, None, None)
    assert any("--nodes" in gap.what for gap in report.gaps)
    with pytest.raises(RequestError, match="other"):
        prometheus.collect(server, 'other"} or vector(1) #', BEGIN_S, END_S, lambda *_: None)
    assert metrics.asked[-1] == 'powerd_job_gpu{job="other\\"} or vector(1) #"}'
    metrics.broken = True
    with pytest.raises(UnavailableError, match="400 bad range"):
        prometheus.collect(server, None, BEGIN_S, END_S, lambda *_: None)


def test_the_verb_writes_each_kind_and_refuses_others(daemon: FakeDaemon, powerctl: Any, tmp_path: Path) -> None:
    for kind, magic in (("html", b"<!doctype html>"), ("pdf", b"%PDF"), ("json", b"{")):
        file = tmp_path / f"report.{kind}"
        answer = powerctl("report", "--job", "4711", "--price", "0.12/kWh", "-o", str(file))
        assert answer.code == 0, answer.err
        assert file.read_bytes().startswith(magic)
        assert "gap: " in answer.err  # the fake daemon's history has no energy
    assert json.loads(powerctl("report", "--job", "4711").out)["job"]["steps"] == 1200
    for words in (["-o", "report.docx"], ["--job", "nope"], ["--price", "cheap"], ["--nodes", "x", "--prometheus", "http://x"],
                  ["--job", "4711", "--since", "1h"], ["--prometheus", "file:///etc/passwd"]):  # fmt: skip
        assert powerctl("report", *words).code == 2


def test_the_page_names_every_field_of_the_schema() -> None:
    from powerd.cli.reports import model

    text = (Path(__file__).resolve().parents[2] / "docs" / "report.md").read_text(encoding="utf-8").split("## The JSON", 1)[1]
    kinds = [kind for kind in vars(model).values() if isinstance(kind, type) and is_dataclass(kind)]
    missing = [f"{kind.__name__}.{f.name}" for kind in kinds for f in fields(kind) if f"`{f.name}`" not in text]
    assert missing == []
