"""Who keeps the TTFT: every class by its own lengths and promise, by a model that is on the safe side."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerd_policies.dynamollm.classes import Classes, PromptSlo, Slo
from powerd_policies.dynamollm.fleet import InstanceLoad
from powerd_policies.dynamollm.instance import InstanceController
from powerd_policies.dynamollm.waits import Queue, mean_tokens, promised, spread
from tests.replicas.closed_loop import CHUNK, LENGTHS, MODEL, TP, arrivals, serve

SHORT, LONG = PromptSlo(1000, 1.5), PromptSlo(None, 4.0)
EDGES = (0.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)
#: The buckets of the closed loop's lengths.
BANDS = tuple(
    (sum(weight for weight, prompt, _ in LENGTHS if low < prompt <= high) / sum(weight for weight, _, _ in LENGTHS), low, high)
    for low, high in pairwise(EDGES)
)
LOAD = InstanceLoad(
    running=8, requests_per_s=1.0, prompt_tokens_per_s=1100.0, output_tokens_per_s=200.0, queued_prompt_tokens=None,
    oldest_wait_s=None, prompt_bands=BANDS,
)  # fmt: skip


def clock(load: InstanceLoad, ttft_s: float, *classes: PromptSlo, tbt_s: float = 0.15) -> int:
    mine = InstanceController(MODEL, TP, Slo(ttft_s, tbt_s), classes=classes, dwell_s=0.0, period_s=1.0)
    return [mine.clock(float(second), load).clock_mhz for second in range(0, 31, 10)][-1]


def test_a_bucket_in_two_classes_is_judged_by_both_and_a_class_that_was_not_seen_by_its_shortest_prompt() -> None:
    short, middle, long = promised((PromptSlo(255, 0.5), PromptSlo(1500, 1.0), LONG), BANDS[2:])
    assert (short.ttft_s, short.lengths) == (0.5, ((1.0, 1.0),))
    assert [tokens for _, tokens in middle.lengths] == [1000.0, 1500.0]
    assert [tokens for _, tokens in long.lengths] == [2000.0, 5000.0]
    assert sum(share for share, _ in middle.lengths) == pytest.approx(1)
    (endless,) = promised((LONG,), ((1.0, 5000.0, math.inf),))
    assert endless.late(Queue(0.1, 0.1), 500.0, 0.1, 0.03) == 1.0, "who may be of any length is never surely in time"


def test_the_same_page_needs_a_lower_clock_when_long_prompts_may_take_longer() -> None:
    assert clock(LOAD, 4.0) < clock(LOAD, 4.0, SHORT) < clock(LOAD, 1.5)


@given(
    shares=st.lists(st.floats(0.0, 1.0), min_size=5, max_size=5).filter(lambda s: sum(s) > 0.1),
    rps=st.floats(0.05, 3.0), running=st.integers(1, 40), queued=st.integers(0, 2),
    ttfts=st.tuples(st.floats(0.2, 2.0), st.floats(0.0, 2.0), st.floats(0.0, 3.0)),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_never_below_the_clock_that_any_class_needs_by_itself(
    shares: list[float], rps: float, running: int, queued: int, ttfts: tuple[float, float, float]
) -> None:
    bands = tuple((share / sum(shares), low, high) for share, (low, high) in zip(shares, pairwise(EDGES), strict=True))
    tokens_per_s = rps * mean_tokens(bands)
    load = replace(LOAD, running=running, queued=queued, requests_per_s=rps, prompt_tokens_per_s=tokens_per_s, prompt_bands=bands)
    first_s, second_s, third_s = ttfts[0], sum(ttfts[:2]), sum(ttfts)
    classes = (PromptSlo(255, first_s), PromptSlo(1023, second_s))
    decided = clock(load, third_s, *classes)
    idle = [PromptSlo(each.max_prompt_tokens, 1e6) for each in classes]  # whenever it pleases
    assert decided >= clock(load, 1e6, classes[0], idle[1])
    assert decided >= clock(load, 1e6, idle[0], classes[1])
    assert decided >= clock(load, third_s, *idle)


@given(queued=st.integers(0, 4), rps=st.floats(0.05, 3.0))
@settings(max_examples=20, deadline=None)
def test_who_does_not_know_lengths_is_as_careful_as_with_the_strictest_for_all(queued: int, rps: float) -> None:
    load = replace(LOAD, queued=queued, requests_per_s=rps, prompt_tokens_per_s=1100 * rps, prompt_bands=None)
    assert clock(load, 4.0, SHORT) == clock(load, 1.5)


@pytest.mark.parametrize(("rps", "clock_mhz"), [(1.0, 1980), (1.0, 1080), (1.5, 1530), (2.0, 1530)])
def test_the_model_is_on_the_safe_side_of_the_simulated_engine(rps: float, clock_mhz: int) -> None:
    seen = serve(arrivals(lambda now_s: rps, 1000, 7), clock_mhz)
    at = MODEL.table[TP, clock_mhz]
    tokens_per_s = rps * sum(w * prompt for w, prompt, _ in LENGTHS) / sum(w for w, _, _ in LENGTHS)
    output_per_s = rps * sum(w * output for w, _, output in LENGTHS) / sum(w for w, _, _ in LENGTHS)
    spare = 1.0 - tokens_per_s * at.prefill_token_s - output_per_s * at.decode_request_s
    batch = output_per_s * at.decode_fixed_s / spare
    decode_s, room = at.decode_fixed_s + at.decode_request_s * batch, CHUNK - batch
    full_s = decode_s + at.prefill_token_s * room
    queue = Queue(tokens_per_s * full_s / room, tokens_per_s / rps * full_s / room, cv2=spread(BANDS))
    short, long = (each.late(queue, room, full_s, decode_s) for each in promised((SHORT, LONG), BANDS))
    assert seen.late(0, 1000, SHORT.ttft_s) <= short
    assert seen.late(1000, 9999, LONG.ttft_s) <= long + 0.001
    assert short < 0.1, "safe, but it says something"


def test_who_promises_only_one_latency_is_held_to_that_one() -> None:
    heavy = replace(LOAD, prompt_tokens_per_s=9000.0)
    assert clock(heavy, math.inf) < clock(heavy, 1.5) == MODEL.max_clock_mhz
    crowded = replace(LOAD, running=60)
    assert clock(crowded, 4.0, tbt_s=math.inf) < clock(crowded, 4.0, tbt_s=0.1)
    assert clock(replace(LOAD, queued=20), math.inf) == MODEL.max_clock_mhz, "a queue that grows is nobody's wish"


def test_what_all_classes_promise_by_the_lengths_of_prompts() -> None:
    slo, shorter = Classes().by_prompt()
    assert (slo, shorter) == (Slo(2.0, 0.1), (PromptSlo(255, 0.25), PromptSlo(1023, 0.4)))
    slos = {name: Slo(1.5 if name[0] != "L" else 4.0, 0.2 if name != "MM" else 0.15) for name in Classes().slos}
    assert Classes(slos=slos).by_prompt() == (Slo(4.0, 0.15), (PromptSlo(1023, 1.5),))
    stricter = {**Classes().slos, "LS": Slo(0.3, 0.1)}
    assert Classes(slos=stricter).by_prompt() == (Slo(0.3, 0.1), (PromptSlo(255, 0.25),))
