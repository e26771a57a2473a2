"""Reading engines' pages: both engines by their own names, several engines as one, and every page that cannot be believed."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from powerd.enginepage import EnginePage, Histogram, PageError, parse
from tests.replicas.engine import Engine

PAGES = Path(__file__).parent / "pages"
VLLM, SGLANG = (PAGES / "vllm.txt").read_text(), (PAGES / "sglang.txt").read_text()


def summed(text: str, name: str) -> float:
    """The sum of a name's samples as prometheus_client reads the page."""
    return sum(s.value for family in text_string_to_metric_families(text) for s in family.samples if s.name == name)


def test_the_engines_on_a_vllm_page_are_summed_as_prometheus_clients_own_parser_reads_them() -> None:
    page = parse(VLLM)
    assert (page.engine, page.running, page.waiting) == ("vllm", 16, 2)
    assert page.kv_used_ratio == 0.3721, "that of the fuller engine: it is the one that will run out"
    assert page.prompt_tokens == summed(VLLM, "vllm:prompt_tokens_total") > 0
    assert page.output_tokens == summed(VLLM, "vllm:generation_tokens_total") > 0
    assert page.preemptions == 3
    assert page.ttft is not None
    assert page.gap is not None
    assert page.ttft.total == summed(VLLM, "vllm:time_to_first_token_seconds_count") == 800
    assert page.gap.total == summed(VLLM, "vllm:inter_token_latency_seconds_count") == 10_010
    assert len(page.ttft.edges) == 23
    assert math.isinf(page.ttft.edges[-1])


def test_an_sglang_page_is_read_by_its_own_names() -> None:
    page = parse(SGLANG)
    assert (page.engine, page.running, page.waiting, page.kv_used_ratio) == ("sglang", 14, 5, 0.41)
    assert page.prompt_tokens == summed(SGLANG, "sglang:prompt_tokens_total")
    assert page.output_tokens == summed(SGLANG, "sglang:generation_tokens_total")
    assert page.preemptions is None, "not on this page"
    assert page.ttft is not None
    assert page.ttft.total == 412
    assert page.ttft.edges[0] == 0.1


def test_names_of_older_vllm_count_where_the_new_ones_are_missing_and_never_twice() -> None:
    old = VLLM.replace("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
    old = old.replace("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")
    assert parse(old) == parse(VLLM)
    extra = [line.replace("inter_token_latency", "time_per_output_token") for line in VLLM.splitlines() if "inter_token" in line]
    assert parse(VLLM + "\n".join(extra) + "\n") == parse(VLLM)


def test_labels_may_hold_anything() -> None:
    engine = Engine(running=3, labels=r'model_name="a {strange} \"model\", le=\"7\" # 1",engine="0"')
    engine.ttft = [0.2]
    page = parse(engine.page())
    assert page.running == 3
    assert page.ttft is not None
    assert page.ttft.total == 1


@pytest.mark.parametrize(
    ("page", "why"),
    [
        ("", "cut off"),
        ("\n", "no page of vLLM or SGLang"),
        ("<html>it works</html>\n", "no page of vLLM or SGLang"),
        (VLLM + SGLANG, "both"),
        (VLLM.replace("vllm:num_requests_waiting{", "vllm:num_requests_waited{"), "num_requests_waiting is not on the page"),
        (VLLM.replace('-hf"} 9.0', '-hf"} -9.0'), "-9 cannot be"),
        (VLLM.replace('-hf"} 9.0', '-hf"} NaN'), "nan cannot be"),
        (VLLM.replace('-hf"} 9.0', '-hf"} +Inf'), "inf cannot be"),
        (VLLM.replace('-hf"} 9.0', '-hf"} 9.5'), "no number of requests"),
        (VLLM.replace('-hf"} 9.0', '-hf"} nine'), "no number"),
        (VLLM.replace('-hf"} 9.0', '-hf"}'), "a line that is none"),
        (VLLM.replace('-hf"} 9.0', '-hf 9.0'), "a line that is none"),
        (VLLM.replace('-hf"} 0.3721', '-hf"} 37.21'), "beyond all of it"),
        ("".join(x for x in VLLM.splitlines(True) if "+Inf" not in x), "the last bucket is missing"),
        (VLLM.replace('le="0.25"} ', 'le="0.25"} 9'), "its buckets fall"),
        (VLLM.replace('le="0.25"', 'le="wide"'), "a bucket without its edge"),
        (re.sub(r'(first_token_seconds_count{.*}) 412.0', r'\1 4.0', VLLM), "its count is not that of its buckets"),
        (VLLM.replace('first_token_seconds_bucket{engine="1",model_name="meta-llama/Llama-2-70b-chat-hf",le="0.001"}', "x"),
         "different buckets"),
    ],
)  # fmt: skip
def test_a_page_that_cannot_be_is_refused_with_a_reason(page: str, why: str) -> None:
    with pytest.raises(PageError, match=why):
        parse(page)


def test_the_page_of_another_engine_than_was_said_is_refused() -> None:
    with pytest.raises(PageError, match="sglang:num_running_reqs is not on the page"):
        parse(VLLM, "sglang")
    assert parse(VLLM + SGLANG, "sglang").running == 14


@settings(deadline=None)
@given(st.integers(0, len(VLLM) - 1))
def test_a_page_that_is_cut_anywhere_is_refused_or_says_no_wrong_figure(at: int) -> None:
    whole = parse(VLLM)
    try:
        part = parse(VLLM[:at])
    except PageError:
        return
    # Cut between two lines it may lack whole metrics, and an engine's share of the last one.
    assert part.running == whole.running
    assert part.waiting in (2, whole.waiting)
    for name in ("ttft", "gap"):
        assert getattr(part, name) in (None, getattr(whole, name))


@settings(deadline=None)
@given(st.text(max_size=200) | st.lists(st.sampled_from([*VLLM.splitlines(), "vllm:num_requests_running -1"])).map("\n".join))
def test_whatever_is_served_the_answer_is_a_page_or_a_page_error(text: str) -> None:
    try:
        page = parse(text + "\n")
    except PageError:
        return
    assert isinstance(page, EnginePage)
    assert page.running >= 0


def test_a_quantile_is_the_upper_edge_of_its_bucket() -> None:
    seen = Histogram((0.1, 0.25, 0.5, math.inf), (90, 99, 100, 100))
    assert seen.upper_edge(0.5) == (0.1, True)
    assert seen.upper_edge(0.99) == (0.25, True)
    assert seen.upper_edge(0.995) == (0.5, True)
    beyond = Histogram((0.1, 0.5, math.inf), (1, 2, 4))
    assert beyond.upper_edge(0.99) == (0.5, False), "beyond the last edge: at least that"
    assert Histogram((0.1, math.inf), (0, 0)).upper_edge(0.99) is None
    assert seen.share_within(0.3) == 0.99, "surely: what lies in the bucket around 0.3 may be above"


@settings(deadline=None)
@given(st.lists(st.floats(0, 4), min_size=1, max_size=200), st.floats(0.01, 1))
def test_at_least_the_share_lies_at_or_below_the_edge(values: list[float], share: float) -> None:
    edges = (0.1, 0.5, 1.0, 2.0, 5.0, math.inf)
    histogram = Histogram(edges, tuple(float(sum(v <= e for v in values)) for e in edges))
    edge = histogram.upper_edge(share)
    assert edge is not None
    assert edge[1]
    assert sum(v <= edge[0] for v in values) >= share * len(values) - 1e-6
