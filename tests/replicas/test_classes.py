"""A replica that promises shorter prompts a shorter TTFT: each class keeps its own, and none pays for another's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest

from powerd.clock import NS
from powerd.engineload import LENGTHS_MIN, LoadWindow, between_edges
from powerd.enginepage import parse
from powerd.model import SloClass
from powerd.replicatypes import SloSpec
from tests.replicas.closed_loop import LENGTHS, arrivals, late, serve
from tests.replicas.engine import Engine

PAGES = Path(__file__).parent / "pages"
CLASSES = SloSpec(4.0, 0.15, (SloClass(500, 1.0), SloClass(1000, 1.5)))
WIDE = SloSpec(4.0, 0.15, (SloClass(1000, 1.5),))
STRICTEST = SloSpec(1.5, 0.15)


def window(slo: SloSpec, engine: Engine) -> LoadWindow:
    made = LoadWindow(slo, window_s=10)
    made.add(0, parse(engine.page()))
    return made


def test_lengths_are_read_from_the_pages_of_both_engines() -> None:
    busy = parse((PAGES / "vllm-0.32.0-busy.txt").read_text()).prompts
    assert busy is not None
    assert busy.total > 0
    assert sum(share for share, _, _ in busy.bands()) == pytest.approx(1)
    sglang = (PAGES / "sglang.txt").read_text()
    assert parse(sglang).prompts is None
    sglang += 'sglang:prompt_tokens_histogram_bucket{le="500"} 3\nsglang:prompt_tokens_histogram_bucket{le="+Inf"} 4\n'
    lengths = parse(sglang).prompts
    assert lengths is not None
    assert lengths.bands() == ((0.75, 0.0, 500.0), (0.25, 500.0, float("inf")))
    assert (lengths.share_beyond(400), lengths.share_beyond(500), lengths.share_beyond(501)) == (0.25, 0.25, 0.0)


def test_first_tokens_are_late_only_where_no_longer_prompt_explains_them() -> None:
    engine = Engine(prompts=[])
    seen = window(CLASSES, engine)
    assert engine.prompts is not None
    assert engine.prompts is not None
    engine.prompts += [300.0] * 60 + [800.0] * 20 + [3000.0] * 20
    engine.ttft += [0.5] * 60 + [1.2] * 20 + [2.4] * 20
    figures = seen.add(NS, parse(engine.page()))
    assert figures.ttft.kept is False, "2.5 is the edge above 1.2 s: 40 of 100 may be later than 1.5 s, 20 are long"
    assert figures.ttft.share == pytest.approx(0.8)
    engine = Engine(prompts=[])
    seen = window(CLASSES, engine)
    assert engine.prompts is not None
    engine.prompts += [300.0] * 60 + [800.0] * 20 + [3000.0] * 20
    engine.ttft += [0.5] * 60 + [0.9] * 20 + [2.4] * 20
    assert seen.add(NS, parse(engine.page())).ttft.kept is True
    engine.ttft += [0.9] * 97 + [9.0] * 3
    engine.prompts += [3000] * 100
    assert seen.add(2 * NS, parse(engine.page())).ttft.kept is False, "no class may take 9 s"


@pytest.mark.parametrize("prompts", [None, [3000] * (LENGTHS_MIN - 1)])
def test_where_lengths_are_not_known_the_strictest_promise_is_that_of_all(prompts: list[float] | None) -> None:
    engine = Engine(prompts=None if prompts is None else [])
    seen = window(CLASSES, engine)
    engine.prompts = prompts
    engine.ttft += [1.2] * 100
    figures = seen.add(NS, parse(engine.page()))
    assert figures.prompts is None
    assert (figures.ttft.kept, figures.ttft.share) == (False, 0.0)


def test_of_what_is_not_promised_nothing_is_judged() -> None:
    engine = Engine()
    seen = window(SloSpec(ttft_s=None, tbt_s=0.1), engine)
    engine.ttft, engine.gaps = [90.0], [0.05]
    figures = seen.add(NS, parse(engine.page()))
    assert (figures.ttft.p99_s, figures.ttft.kept, figures.within_slo) == (160.0, None, True)


def test_a_class_that_ends_between_two_edges_is_told() -> None:
    slo = SloSpec(4.0, 0.1, (SloClass(255, 0.25), SloClass(1000, 1.0)))
    assert between_edges(parse(Engine(prompts=[]).page()), slo) == (
        "TTFT: 4 s lies between the engine's bucket edges 2.5 and 5: it is judged at 2.5 s; "
        "classes: 255 tokens lie between the engine's bucket edges 200 and 500: what is between is judged as both classes"
    )


@pytest.mark.parametrize(
    "rate",
    [
        lambda now_s: 1.0,
        lambda now_s: 0.3 if now_s < 60 or now_s > 140 else 1.6,
        lambda now_s: 1.8 if now_s % 60 < 20 else 0.2,
    ],
    ids=["even", "a step up and down", "bursts"],
)
def test_each_class_keeps_its_promise_with_less_energy_than_the_strictest_for_all(rate: Callable[[float], float]) -> None:
    full_j = strictest_j = classes_j = 0.0
    ended = []
    for seed in (1, 2):
        requests = arrivals(rate, 200, seed)
        full_j += serve(copy.deepcopy(requests), 1980).joules
        strictest_j += serve(copy.deepcopy(requests), STRICTEST).joules
        held = serve(copy.deepcopy(requests), WIDE)
        classes_j += held.joules
        ended += held.ended
    assert late(ended, 0, 1000, 1.5) <= 0.01
    assert late(ended, 1000, 9999, 4.0) <= 0.01
    assert classes_j < 0.95 * strictest_j
    assert classes_j < 0.85 * full_j


def test_without_lengths_on_the_page_classes_are_as_careful_as_the_strictest_for_all() -> None:
    requests = arrivals(lambda now_s: 1.0, 120, 1)
    strictest, classes = (serve(copy.deepcopy(requests), slo, lengths_told=False) for slo in (STRICTEST, WIDE))
    assert classes.clocks_mhz == strictest.clocks_mhz
    assert min(classes.clocks_mhz) < 1980


def test_a_rush_of_long_prompts_after_short_ones_is_noticed_before_short_ones_are_late() -> None:
    short = [each for each in LENGTHS if each[1] < 500]
    requests = arrivals(lambda now_s: 1.0, 120, 3, short)
    rush = arrivals(lambda now_s: 1.0, 60, 4, [(1, 4200, 200)])
    for request in rush:
        request.arrived_s += 120.0
    held = serve([*requests, *rush], WIDE)
    assert held.clocks_mhz[115] < 1200, "short prompts alone are cheap"
    assert min(held.clocks_mhz[140:180]) > 1500, "the rush is not"
    assert held.late(0, 1000, 1.5) == 0.0
    assert held.late(1000, 9999, 4.0) <= 0.05
