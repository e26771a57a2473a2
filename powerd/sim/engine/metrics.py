"""What the engine tells Prometheus: vLLM's metric names, types and default buckets, in simulated seconds.

House rules: names, labels, buckets and what is counted when are vLLM's own, held to the recorded pages of vLLM 0.32.0
(tests/replicas/pages); a comment line says that it is simulated; nothing is sampled: every token and request is counted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

from powerd.sim.engine.batch import Batch, Request

TTFT: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TBT: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
LATENCY: Final = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
ITERATION: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def one_two_five(most: int) -> tuple[float, ...]:
    """vLLM's buckets for lengths: 1, 2, 5, 10, ... up to the longest context."""
    return tuple(float(m * 10**e) for e in range(7) for m in (1, 2, 5) if m * 10**e <= most)


class Histogram:
    """A Prometheus histogram; ``observe`` takes a value and how often it occurred."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(float(bound) for bound in bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


class Metrics:
    """All metrics of one engine."""

    def __init__(self, model_name: str, max_context: int, kv_tokens: int) -> None:
        self._labels = f'engine="0",model_name="{model_name}"'
        lengths = one_two_five(max_context)
        self.ttft, self.tbt = Histogram(TTFT), Histogram(TBT)
        self._histograms = {
            "vllm:time_to_first_token_seconds": (self.ttft, "Histogram of time to first token in seconds."),
            "vllm:inter_token_latency_seconds": (self.tbt, "Histogram of inter-token latency in seconds."),
            "vllm:request_time_per_output_token_seconds": (
                Histogram(TBT),
                "Histogram of time_per_output_token_seconds per request.",
            ),
            "vllm:e2e_request_latency_seconds": (Histogram(LATENCY), "Histogram of e2e request latency in seconds."),
            "vllm:request_queue_time_seconds": (Histogram(LATENCY), "Histogram of time spent in WAITING phase for request."),
            "vllm:request_inference_time_seconds": (Histogram(LATENCY), "Histogram of time spent in RUNNING phase for request."),
            "vllm:request_prefill_time_seconds": (Histogram(LATENCY), "Histogram of time spent in PREFILL phase for request."),
            "vllm:request_decode_time_seconds": (Histogram(LATENCY), "Histogram of time spent in DECODE phase for request."),
            "vllm:request_prompt_tokens": (Histogram(lengths), "Number of prefill tokens processed."),
            "vllm:request_generation_tokens": (Histogram(lengths), "Number of generation tokens processed."),
            "vllm:request_max_num_generation_tokens": (
                Histogram(lengths),
                "Histogram of maximum number of requested generation tokens.",
            ),
            "vllm:request_params_max_tokens": (Histogram(lengths), "Histogram of the max_tokens request parameter."),
            "vllm:iteration_tokens_total": (Histogram(ITERATION), "Histogram of number of tokens per engine_step."),
        }
        self._prompt_tokens = self._generation_tokens = 0
        self._ended = dict.fromkeys(("stop", "length", "abort", "error", "repetition"), 0)
        self._config = f'cache_dtype="auto",enable_prefix_caching="False",engine="0",kv_cache_size_tokens="{kv_tokens}"'

    def iteration(self, gaps_s: Sequence[float], first: Sequence[Request]) -> None:
        """An iteration has ended: seconds since the last token of each that had one, and who got the first one.

        A prompt counts once, as a whole, with its first token: neither its chunks nor what a preemption has computed anew.
        """
        if not gaps_s and not first:
            return  # an iteration without a token: vLLM's frontend hears nothing of it
        prompt_tokens = sum(request.prompt_tokens for request in first)
        self._histograms["vllm:iteration_tokens_total"][0].observe(prompt_tokens + len(gaps_s) + len(first))
        self._prompt_tokens += prompt_tokens
        self._generation_tokens += len(gaps_s) + len(first)
        for gap_s in gaps_s:
            self.tbt.observe(gap_s)
        for request in first:
            if request.first_s is not None:
                self.ttft.observe(request.first_s - request.arrived_s)

    def ended(self, request: Request, reason: str) -> None:
        """A request has ended by itself: stop or length. One whose client has gone is not told of, as in vLLM."""
        self._ended[reason] += 1
        if request.first_s is None or request.last_s is None or request.scheduled_s is None:
            return
        values = {
            "e2e_request_latency": request.last_s - request.arrived_s,
            "request_queue_time": request.scheduled_s - request.arrived_s,
            "request_inference_time": request.last_s - request.scheduled_s,
            "request_prefill_time": request.first_s - request.scheduled_s,
            "request_decode_time": request.last_s - request.first_s,
        }
        for name, value in values.items():
            self._histograms[f"vllm:{name}_seconds"][0].observe(value)
        # Of a single token there is no gap, and vLLM counts it as none: 0.
        mean_s = (request.last_s - request.first_s) / max(1, request.generated - 1)
        self._histograms["vllm:request_time_per_output_token_seconds"][0].observe(mean_s)
        self._histograms["vllm:request_prompt_tokens"][0].observe(request.prompt_tokens)
        self._histograms["vllm:request_generation_tokens"][0].observe(request.generated)
        self._histograms["vllm:request_max_num_generation_tokens"][0].observe(request.max_tokens)
        self._histograms["vllm:request_params_max_tokens"][0].observe(request.max_tokens)

    def text(self, batch: Batch) -> str:
        """The exposition."""
        lines = ["# simulated: powerd sim engine"]

        def add(name: str, kind: str, text: str, *rows: tuple[str, float]) -> None:
            lines.extend((f"# HELP {name} {text}", f"# TYPE {name} {kind}"))
            lines.extend(f"{name}{{{self._labels}{labels}}} {float(value)!r}" for labels, value in rows)

        waiting = len(batch.waiting)
        add("vllm:num_requests_running", "gauge", "Number of requests in model execution batches.", ("", len(batch.running)))
        add("vllm:num_requests_waiting", "gauge", "Number of requests waiting to be processed.", ("", waiting))
        reasons = ((',reason="capacity"', waiting), (',reason="deferred"', 0))
        add("vllm:num_requests_waiting_by_reason", "gauge", "Number of waiting requests by reason.", *reasons)
        used = batch.kv_used / batch.kv_tokens
        add("vllm:kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.", ("", used))
        states = ((f',sleep_state="{s}"', s == "awake") for s in ("awake", "weights_offloaded", "discard_all"))
        add("vllm:engine_sleep_state", "gauge", "Engine sleep state.", *states)
        add("vllm:num_preemptions_total", "counter", "Cumulative number of preemption from the engine.", ("", batch.preemptions))
        add("vllm:prefix_cache_queries_total", "counter", "Prefix cache queries, in terms of number of queried tokens.", ("", 0))
        add("vllm:prefix_cache_hits_total", "counter", "Prefix cache hits, in terms of number of cached tokens.", ("", 0))
        add("vllm:prompt_tokens_total", "counter", "Number of prefill tokens processed.", ("", self._prompt_tokens))
        add("vllm:generation_tokens_total", "counter", "Number of generation tokens processed.", ("", self._generation_tokens))
        ends = ((f',finished_reason="{reason}"', count) for reason, count in self._ended.items())
        add("vllm:request_success_total", "counter", "Count of successfully processed requests.", *ends)
        for name, (histogram, text) in self._histograms.items():
            lines.extend((f"# HELP {name} {text}", f"# TYPE {name} histogram"))
            total = 0
            for bound, count in zip((*map(repr, histogram.bounds), "+Inf"), histogram.counts, strict=True):
                total += count
                lines.append(f'{name}_bucket{{{self._labels},le="{bound}"}} {float(total)!r}')
            lines.append(f"{name}_count{{{self._labels}}} {float(total)!r}")
            lines.append(f"{name}_sum{{{self._labels}}} {histogram.sum!r}")
        lines.extend(
            ("# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig", "# TYPE vllm:cache_config_info gauge")
        )
        lines.append(f"vllm:cache_config_info{{{self._config}}} 1.0")
        return "\n".join(lines) + "\n"
