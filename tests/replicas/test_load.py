"""From pages to figures: rates, latencies over a window, restarts, and whether a promise was surely kept."""

from __future__ import annotations

import pytest

from powerd.clock import NS
from powerd.engineload import LoadWindow, between_edges
from powerd.enginepage import PageError, parse
from powerd.replicatypes import SloSpec
from tests.replicas.engine import Engine

SLO = SloSpec(0.5, 0.1)


def test_rates_and_latencies_are_of_the_window_not_of_all_time() -> None:
    engine, window = Engine(), LoadWindow(SLO, window_s=10)
    engine.ttft = [2.0] * 100  # a bad past
    engine.gaps = [0.5] * 1000
    engine.prompt_tokens = 1e6
    first = window.add(0, parse(engine.page()))
    assert first.requests_per_s is None
    assert first.within_slo is None, "nothing was observed yet"
    for second in range(1, 21):
        engine.ttft += [0.2] * 4
        engine.gaps += [0.03] * 40
        engine.prompt_tokens += 2000
        engine.output_tokens += 40
        engine.preemptions += second == 15
        figures = window.add(second * NS, parse(engine.page()))
    assert figures.requests_per_s == 4
    assert figures.prompt_tokens_per_s == 2000
    assert figures.output_tokens_per_s == 40
    assert figures.preemptions == 1
    assert figures.window_s == 10
    assert (figures.ttft.p99_s, figures.tbt.p99_s) == (0.25, 0.05), "upper edges of their buckets"
    assert (figures.ttft.share, figures.within_slo) == (1.0, True)


def test_one_percent_may_miss_and_more_is_a_broken_promise() -> None:
    engine, window = Engine(), LoadWindow(SLO, window_s=10)
    window.add(0, parse(engine.page()))
    engine.ttft = [0.2] * 99 + [9.0]
    engine.gaps = [0.03] * 1000
    assert window.add(NS, parse(engine.page())).within_slo is True
    engine.ttft.append(9.0)
    figures = window.add(2 * NS, parse(engine.page()))
    assert figures.within_slo is False
    assert figures.ttft.p99_s == 10.0
    assert figures.tbt.kept is True


def test_what_lies_beyond_the_last_edge_keeps_no_promise_however_wide() -> None:
    engine, window = Engine(), LoadWindow(SloSpec(9999.0, 0.1), window_s=10)
    window.add(0, parse(engine.page()))
    engine.ttft = [3000.0]
    figures = window.add(NS, parse(engine.page()))
    assert (figures.ttft.p99_s, figures.ttft.exact, figures.within_slo) == (2560.0, False, False)


@pytest.mark.parametrize("what", ["prompt_tokens", "output_tokens", "preemptions", "ttft", "gaps"])
def test_a_counter_that_fell_is_a_restart_after_which_all_begins_anew(what: str) -> None:
    engine, window = Engine(prompt_tokens=5, output_tokens=5, preemptions=5, ttft=[0.1], gaps=[0.01]), LoadWindow(SLO, 10)
    window.add(0, parse(engine.page()))
    setattr(engine, what, [] if what in ("ttft", "gaps") else 4)
    with pytest.raises(PageError, match="restarted"):
        window.add(NS, parse(engine.page()))
    engine.ttft = [*engine.ttft, 0.2]
    engine.prompt_tokens += 100
    assert window.add(2 * NS, parse(engine.page())).requests_per_s is None, "one second is too short for a rate"
    figures = window.add(3 * NS, parse(engine.page()))
    assert figures.requests_per_s == 0.5
    assert figures.prompt_tokens_per_s == 50


def test_buckets_that_change_are_a_restart_too() -> None:
    engine, window = Engine(ttft=[0.2]), LoadWindow(SLO, 10)
    window.add(0, parse(engine.page()))
    with pytest.raises(PageError, match="restarted"):
        window.add(NS, parse(engine.page().replace('le="0.25"', 'le="0.2"')))


def test_a_promise_between_two_edges_is_told_and_judged_at_the_lower_one() -> None:
    engine = Engine()
    assert between_edges(parse(engine.page()), SLO) == ""
    said = between_edges(parse(engine.page()), SloSpec(0.4, 0.12))
    assert said == (
        "TTFT: 0.4 s lies between the engine's bucket edges 0.25 and 0.5: it is judged at 0.25 s; "
        "TBT: 0.12 s lies between the engine's bucket edges 0.1 and 0.15: it is judged at 0.1 s"
    )
    window = LoadWindow(SloSpec(0.4, 0.12), 10)
    window.add(0, parse(engine.page()))
    engine.ttft = [0.3]
    assert window.add(NS, parse(engine.page())).within_slo is False, "0.3 s may as well have been 0.5 s"
    assert between_edges(parse(engine.page()), SloSpec(9999.0, 0.1)).endswith("edges 2560: it is judged at 2560 s")
