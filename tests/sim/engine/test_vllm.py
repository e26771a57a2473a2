"""The simulated engine beside a real vLLM: the same requests, and a page with the same names, buckets and counts."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable

from prometheus_client.parser import text_string_to_metric_families

from powerd import clock as clocks
from powerd.sim import enginemodels
from powerd.sim.engine import Engine, Options, SimulatedGpus
from powerd.sim.node import SimNode
from tests.replicas.record import PAGES, SENT
from tests.replicas.shapes import shapes

REAL = (PAGES / "vllm-0.32.0-done.txt").read_text()
KV_TOKENS = 23 * 128  # as the recorded engine: 24 blocks, one of which vLLM keeps for itself
MODEL = enginemodels.load("llama2-70b_h100")
MODEL = dataclasses.replace(MODEL, kv_tokens=dict.fromkeys(MODEL.kv_tokens, KV_TOKENS))
MakeNode = Callable[..., SimNode]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def pages(node: SimNode, body: Callable[[Engine], Awaitable[None]]) -> tuple[str, str]:
    """An engine's page before and after."""
    node.load()

    async def main() -> tuple[str, str]:
        options = Options(MODEL, 2, "tiny", max_running=2, max_context=2048)
        async with Engine(options, SimulatedGpus(node, range(2))) as engine:
            fresh = engine.metrics.text(engine.batch)
            await body(engine)
            return fresh, engine.metrics.text(engine.batch)

    before, after = clocks.run(clocks.SimClock(node.library), main())
    return before, after


async def all_sent(engine: Engine) -> None:
    await asyncio.gather(*[engine.submit(sent.prompt_tokens, sent.output_tokens).whole() for sent in SENT])


def samples(text: str, *names: str) -> Samples:
    """The samples of these names, of counters and whole histograms alike."""
    every = [s for family in text_string_to_metric_families(text) for s in family.samples]
    wanted = [sample for sample in every if sample.name.startswith(names) and not sample.name.endswith("_created")]
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in wanted}


def test_every_metric_is_one_of_vllms_with_its_kind_labels_and_buckets(make_node: MakeNode) -> None:
    real = shapes(REAL)
    for page in pages(make_node("h100-sxm"), all_sent):
        simulated = shapes(page)
        assert len(simulated) > 20
        assert {name: (shape, real.get(name)) for name, shape in simulated.items() if not shape.within(real.get(name))} == {}
        cut = {name for name, shape in simulated.items() if shape.values != real[name].values}
        assert not cut, "a reason or a state that vLLM tells is missing"


def test_the_same_requests_are_counted_as_vllm_counts_them(make_node: MakeNode) -> None:
    """Chunks of prompts, one preemption and answers of one token included."""
    names = (
        "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total", "vllm:num_preemptions_total",
        "vllm:request_prompt_tokens_", "vllm:request_generation_tokens_", "vllm:request_max_num_generation_tokens_",
        "vllm:request_params_max_tokens_", "vllm:iteration_tokens_total_sum", "vllm:num_requests_", "vllm:kv_cache_usage_perc",
        *(f"vllm:{kind}_seconds_count" for kind in (
            "time_to_first_token", "inter_token_latency", "request_time_per_output_token", "e2e_request_latency",
            "request_queue_time", "request_prefill_time", "request_decode_time", "request_inference_time",
        )),
    )  # fmt: skip
    done = samples(pages(make_node("h100-sxm"), all_sent)[1], *names)
    assert done == samples(REAL, *names)
    assert len(done) > 60


def test_a_request_whose_client_has_gone_leaves_only_its_tokens(make_node: MakeNode) -> None:
    """As measured on vLLM 0.32.0: neither a success by abort nor a latency of the request."""

    async def hangs_up(engine: Engine) -> None:
        stream = engine.submit(50, 1500)
        async for _ in stream:
            break
        stream.cancel()

    fresh, page = pages(make_node("h100-sxm"), hangs_up)
    grown = {key: value for key, value in samples(page, "vllm:").items() if value != samples(fresh, "vllm:")[key]}
    counts = {name.removeprefix("vllm:"): value for (name, _), value in grown.items() if not name.endswith(("_bucket", "_sum"))}
    assert counts == {
        "prompt_tokens_total": 50, "generation_tokens_total": 1, "time_to_first_token_seconds_count": 1,
        "iteration_tokens_total_count": 1,
    }  # fmt: skip
