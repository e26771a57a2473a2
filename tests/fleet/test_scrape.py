"""Engines' own pages: vLLM's and SGLang's names, garbage, restarts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerd_integrations.fleet.observed import Arrivals
from powerd_integrations.fleet.published import Group
from powerd_integrations.fleet.scrape import Page, ScrapeError, load_of, parse
from powerd_integrations.fleet.targets import Targets
from powerd_policies.dynamollm.fleet import ClassLoad, InstanceState

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prompt_tokens_total{engine="0",model_name="m"} 1000.0
vllm:generation_tokens_total{engine="0",model_name="m"} 500.0
vllm:e2e_request_latency_seconds_count{engine="0",model_name="m"} 10.0
"""
SGLANG = 'sglang:num_running_reqs{m="x"} 5\nsglang:num_queue_reqs{m="x"} 1\nsglang:token_usage{m="x"} 0.5\n'


def test_both_engines_pages_are_read() -> None:
    load = load_of(parse(VLLM, 0.0))
    assert (load.running, load.queued, load.kv_used_ratio, load.requests_per_s) == (7, 2, 0.25, None)
    load = load_of(parse(SGLANG, 0.0))
    assert (load.running, load.queued, load.kv_used_ratio, load.prompt_tokens_per_s) == (5, 1, 0.5, None)


def test_rates_come_from_two_pages_of_one_life() -> None:
    before = parse(VLLM, 0.0)
    after = parse(VLLM.replace("1000.0", "3000.0").replace('count{engine="0",model_name="m"} 10', "count{} 14"), 2.0)
    load = load_of(after, before)
    assert (load.prompt_tokens_per_s, load.output_tokens_per_s, load.requests_per_s) == (1000.0, 0.0, 2.0)
    assert load_of(before, Page(-1.0, after.totals)).prompt_tokens_per_s is None, "the engine was restarted"


@pytest.mark.parametrize("text", ["", "<html>", VLLM.replace("3.0", "NaN").replace("4.0", "x"), VLLM.replace("} 3.0", "} -9")])
def test_garbage_is_an_error_and_never_zero(text: str) -> None:
    with pytest.raises(ScrapeError):
        load_of(parse(text, 0.0))


@given(st.text() | st.text(alphabet="vllm:num_requests_running{} 0123456789\n#e+-"))
def test_no_page_breaks_the_reader(text: str) -> None:
    try:
        assert load_of(parse(text, 0.0)).running >= 0
    except ScrapeError:
        pass


class Engine(BaseHTTPRequestHandler):
    page = VLLM

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.page.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_targets_are_found_by_name_and_one_that_is_away_hides_no_other(port: int) -> None:
    told: list[InstanceState] = []
    targets = Targets(
        [
            (Group("LL", 8), (f"dns://localhost:{port}", "dns://no.such.host.invalid:1")),
            (Group("SS", 2), ("http://127.0.0.1:9",)),
        ],
        told.extend,
    )
    assert targets.look() == 1
    assert [(state.pool, state.tp, state.load.running, state.phase) for state in told] == [("LL", 8, 7, "serving")]
    assert told[0].id == f"127.0.0.1:{port}"


def test_without_a_router_what_engines_finish_stands_for_what_arrives(port: int) -> None:
    counted: list[Arrivals] = []
    targets = Targets([(Group("ML", 8), (f"http://127.0.0.1:{port}/metrics",))], lambda states: None, count=counted.append)
    targets.look()
    Engine.page = VLLM.replace("1000.0", "2500.0").replace(" 500.0", " 900.0").replace(" 10.0", " 12.0")
    try:
        targets.look()
        targets.look()
    finally:
        Engine.page = VLLM
    targets.look()
    assert [dict(report.classes) for report in counted] == [{}, {"ML": ClassLoad(2, 1500, 400)}, {"ML": ClassLoad(0, 0, 0)}, {}]
    assert [report.sequence for report in counted] == [1, 2, 3, 4]
