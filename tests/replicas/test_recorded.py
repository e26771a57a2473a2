"""The daemon against pages that a real vLLM has served, and the pages written by hand against them."""

from __future__ import annotations

import asyncio
import math

import pytest

from powerd.clock import NS
from powerd.engineload import LoadWindow, between_edges
from powerd.enginepage import ENGINES, PageError, parse
from powerd.replicatypes import SloSpec
from powerd.scrape import Reader, source_of
from tests.replicas.engine import Endpoint, Engine
from tests.replicas.record import PAGES, SENT, STATES
from tests.replicas.shapes import shapes, total

PAGE = {state: (PAGES / f"vllm-0.32.0-{state}.txt").read_text() for state in STATES}
SHAPES = shapes(PAGE["done"])
VLLM = ENGINES["vllm"]
PROMPTS, ANSWERS = sum(sent.prompt_tokens for sent in SENT), sum(sent.output_tokens for sent in SENT)


def test_an_engine_that_was_never_asked_has_all_counters_at_zero_and_no_latency() -> None:
    page = parse(PAGE["fresh"])
    assert (page.engine, page.running, page.waiting, page.kv_used_ratio) == ("vllm", 0, 0, 0.0)
    assert (page.prompt_tokens, page.output_tokens, page.preemptions) == (0, 0, 0)
    assert page.ttft is not None
    assert page.gap is not None
    assert (page.ttft.total, page.gap.total, page.ttft.upper_edge(0.99)) == (0, 0, None)


def test_an_engine_at_work_shows_who_runs_who_waits_and_a_full_cache() -> None:
    page = parse(PAGE["busy"])
    answered = total(PAGE["busy"], "vllm:request_success_total")
    assert page.running == 2, "--max-num-seqs"
    assert page.waiting == len(SENT) - answered - page.running > 0
    assert page.kv_used_ratio is not None
    assert 0.4 < page.kv_used_ratio <= 1.0
    assert page.preemptions == 1, "the long ones do not fit together"
    assert page.ttft is not None
    assert 0 <= page.ttft.total - answered - page.running <= page.preemptions, "who had to give way has a token already"


def test_what_was_sent_is_counted_to_the_token() -> None:
    page = parse(PAGE["done"])
    assert (page.running, page.waiting, page.kv_used_ratio) == (0, 0, 0.0)
    assert page.prompt_tokens == PROMPTS, "once, though a preempted one was computed twice"
    assert page.output_tokens == ANSWERS
    assert page.ttft is not None
    assert page.gap is not None
    assert page.ttft.total == len(SENT)
    assert page.gap.total == ANSWERS - len(SENT)


def test_latencies_of_the_time_between_two_pages_are_the_edges_above_what_was_seen() -> None:
    window = LoadWindow(SloSpec(5.0, 0.1), window_s=60)
    for at_s, state in enumerate(STATES):
        figures = window.add(4 * at_s * NS, parse(PAGE[state]))
    assert (figures.ttft.p99_s, figures.ttft.exact, figures.tbt.p99_s, figures.tbt.exact) == (5.0, True, 0.01, True)
    assert figures.within_slo is True
    for seen, name in ((figures.ttft_seen, VLLM.ttft), (figures.tbt_seen, VLLM.gap[0])):
        assert seen is not None
        edge_s, _ = seen.upper_edge(0.99) or (math.nan, False)
        below = seen.edges[seen.edges.index(edge_s) - 1] if edge_s != seen.edges[0] else 0.0
        assert (seen.share_within(below) or 0.0) < 0.99 <= (seen.share_within(edge_s) or 0.0)
        mean_s = total(PAGE["done"], f"{name}_sum") / total(PAGE["done"], f"{name}_count")
        assert mean_s < edge_s
    busy = parse(PAGE["busy"])
    assert figures.output_tokens_per_s == (ANSWERS - (busy.output_tokens or 0)) / 4, "rates are of the last seconds"
    assert figures.preemptions == 1


def test_a_promise_that_those_who_waited_did_not_get_is_broken() -> None:
    window = LoadWindow(SloSpec(2.5, 0.1), window_s=60)
    window.add(0, parse(PAGE["fresh"]))
    figures = window.add(4 * NS, parse(PAGE["done"]))
    assert (figures.ttft.kept, figures.tbt.kept) == (False, True)
    assert between_edges(figures.page, SloSpec(2.5, 0.1)) == ""
    assert "edges 1 and 2.5" in between_edges(figures.page, SloSpec(2.0, 0.1))


def test_a_fresh_engine_in_the_old_ones_place_is_a_restart() -> None:
    window = LoadWindow(SloSpec(5.0, 0.1), window_s=60)
    window.add(0, parse(PAGE["done"]))
    with pytest.raises(PageError, match="restarted"):
        window.add(NS, parse(PAGE["fresh"]))


def test_recorded_pages_come_over_a_socket_as_they_are() -> None:
    endpoint = Endpoint(Engine())

    async def all_of_them() -> list[tuple[int, int]]:
        reader = Reader(source_of(endpoint.url, ""), 0, 5.0)
        seen = []
        for text in PAGE.values():
            endpoint.text = text
            page = parse(await reader.read())
            seen.append((page.running, page.waiting))
        await reader.close()
        return seen

    try:
        fresh, busy, done = asyncio.run(all_of_them())
    finally:
        endpoint.close()
    assert fresh == done == (0, 0)
    assert busy == (2, total(PAGE["busy"], "vllm:num_requests_waiting"))


def test_every_name_that_the_daemon_wants_is_on_the_real_page_with_its_kind() -> None:
    wanted = dict.fromkeys((VLLM.running, VLLM.waiting, VLLM.kv_used[0]), "gauge")
    wanted |= dict.fromkeys((VLLM.prompt_tokens, VLLM.output_tokens, VLLM.preemptions), "counter")
    wanted |= dict.fromkeys((VLLM.ttft, VLLM.gap[0]), "histogram")
    found = {name: SHAPES.get(name.removesuffix("_total")) for name in wanted}
    assert {name: shape and shape.kind for name, shape in found.items()} == wanted


@pytest.mark.parametrize("text", [(PAGES / "vllm.txt").read_text(), Engine().page()], ids=["vllm.txt", "engine.py"])
def test_pages_written_by_hand_have_only_what_the_real_one_has(text: str) -> None:
    by_hand = shapes(text)
    assert len(by_hand) >= 8
    assert {name: (shape, SHAPES.get(name)) for name, shape in by_hand.items() if not shape.within(SHAPES.get(name))} == {}
