"""Energy spans: what is promised of them, and what they say when they cannot know."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from benchmarks.spans import Setup, campaign, summary
from powerd.api import Span, SpansRequest, SpansView
from powerd.clock import NS, RealClock, Waiter
from powerd.energy import SensorErrors
from powerd.errors import RequestError
from powerd.model import EnergyMethod, Health, Reading, Snapshot
from powerd.spans import MAX_SPANS, Cut, estimate
from powerd.trace import KEEP_NS, EnergySpans

GPU = "GPU-a"
POWER_W = {"forward": 400.0, "backward": 300.0, "": 90.0}


class Now(RealClock):
    """A clock that tests move; nobody waits on it."""

    def __init__(self) -> None:
        self.at_ns = 1000 * NS

    def now_ns(self) -> int:
        return self.at_ns

    def waiter(self, name: str) -> Waiter:
        return super().waiter(name)


class Gpu:
    """A GPU whose power follows its spans exactly, sampled every 100 ms; its counter is refreshed at a phase of its own."""

    def __init__(self, refresh_s: float = 0.1, age_s: float = 0.063) -> None:
        self.clock = Now()
        self.service = EnergySpans(self.clock, NS // 10)
        self.refresh_ns, self.age_ns = round(refresh_s * NS), round(age_s * NS)
        self.spans: list[Span] = []
        self.true_j: dict[str, float] = {}
        self.begin_ns = self.clock.at_ns
        self.course: list[tuple[int, int, float]] = []  # begin, end, power
        self.epoch = 1
        self.change: Callable[[Reading], Reading] = lambda reading: reading

    def run(self, label: str, seconds: float, power_w: float | None = None) -> None:
        begin, power = self.clock.at_ns, POWER_W[label] if power_w is None else power_w
        self.clock.at_ns += round(seconds * NS)
        self.course.append((begin, self.clock.at_ns, power))
        self.true_j[label] = self.true_j.get(label, 0.0) + power * seconds
        if label:
            self.spans.append(Span(label, begin, self.clock.at_ns))

    def _energy_j(self, at_ns: int) -> float:
        return sum(p * max(0, min(at_ns, e) - b) / NS for b, e, p in self.course if b < at_ns)

    def sample(self, *, counter: bool = True, from_s: float = 0.0) -> None:
        """Feed what a sampler would have read so far."""
        seen: tuple[int, int] | None = None
        at = self.begin_ns + round(from_s * NS)
        while at <= self.clock.at_ns:
            refreshed = (at - self.begin_ns - self.age_ns) // self.refresh_ns * self.refresh_ns + self.begin_ns + self.age_ns
            value = round(1000 * self._energy_j(refreshed))
            if seen is None or value != seen[1]:
                seen = at, value
            power = next((p for b, e, p in self.course if b < at <= e), 90.0)
            clock, reasons = (1005, 0x20) if power == POWER_W["backward"] else (1410, 0)
            reading = Reading(GPU, at, Health.UP, self.epoch, value if counter else None, seen[0] if counter else None,
                              round(power * 1000), sm_clock_mhz=clock, power_limit_enforced_mw=500_000,
                              clock_event_reasons=reasons,
                              energy_method=EnergyMethod.COUNTER if counter else EnergyMethod.INTEGRATED)  # fmt: skip
            self.service.observe(Snapshot(0, at, at, (self.change(reading),)))
            at += NS // 10

    def ask(self, spans: list[Span] | None = None, *, wait: bool = False) -> SpansView:
        return asyncio.run(self.service.answer(SpansRequest(GPU, tuple(self.spans if spans is None else spans), wait)))

    def train(self, steps: int = 40, low_s: float = 0.05, high_s: float = 0.9, seed: int = 1) -> None:
        rng = random.Random(seed)
        self.run("", 2.0)
        for _ in range(steps):
            for label in ("forward", "backward"):
                self.run(label, rng.uniform(low_s, high_s))
            self.run("", rng.uniform(0.0, 0.3))
        self.run("", 1.0)


def energies(view: SpansView) -> dict[str, float | None]:
    return {row.label: row.energy_j for row in view.labels}


@pytest.mark.parametrize("refresh_s", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("longest_s", [0.08, 0.9])
def test_an_exact_gpu_is_fitted_exactly_whatever_its_counters_phase(refresh_s: float, longest_s: float) -> None:
    gpu = Gpu(refresh_s, age_s=0.6 * refresh_s)
    gpu.train(high_s=longest_s)
    gpu.sample()
    view = gpu.ask()
    found = energies(view)
    assert found["forward"] == pytest.approx(gpu.true_j["forward"], rel=0.01)
    assert found["backward"] == pytest.approx(gpu.true_j["backward"], rel=0.01)
    for row in view.labels[:2]:
        assert row.low_j is not None
        assert row.high_j is not None
        assert row.low_j <= gpu.true_j[row.label] <= row.high_j
    assert (view.method, view.note) == ("counter", "")
    assert [row.spans for row in view.labels[:2]] == [40, 40]


def test_labels_add_up_to_the_counter() -> None:
    gpu = Gpu()
    gpu.train()
    gpu.sample()
    inside_j = gpu._energy_j(gpu.spans[-1].end_ns) - gpu._energy_j(gpu.spans[0].begin_ns)
    assert sum(e for e in energies(gpu.ask()).values() if e is not None) == pytest.approx(inside_j, rel=0.003)


def test_a_throttled_label_shows_its_clock_and_why() -> None:
    gpu = Gpu()
    gpu.train()
    gpu.sample()
    rows = {row.label: row for row in gpu.ask().labels}
    assert (rows["backward"].sm_clock_mhz, rows["backward"].clock_event_reasons) == (1005, ("sw_thermal_slowdown",))
    assert (rows["forward"].sm_clock_mhz, rows["forward"].clock_event_reasons) == (1410, ())


def test_no_refresh_period_is_believed_that_the_samples_contradict() -> None:
    """Samples a little off their 50 ms: a grid of 100 ms would explain the jitter and lose every second value."""
    rng, cut = random.Random(3), Cut(0, True, 500_000, ())
    for number in range(60):
        at = NS + number * NS // 20 + rng.randrange(100_000)
        for column, value in ((cut.time_ns, at), (cut.seen_ns, at), (cut.energy_mj, 15_000 * number), (cut.power_mw, 300_000),
                              (cut.clock_mhz, 1410), (cut.reasons, 0), (cut.epoch, 1)):  # fmt: skip
            column.append(value)
    (row,) = estimate(GPU, [Span("forward", 2 * NS, 3 * NS)], cut, SensorErrors()).labels
    assert row.energy_j == pytest.approx(300, rel=0.005)


def test_labels_that_the_data_cannot_tell_apart_get_a_wide_interval_and_a_right_sum() -> None:
    gpu = Gpu()
    gpu.run("", 1.0)
    for _ in range(400):  # ten pairs to an interval, always the same mix
        gpu.run("forward", 0.005)
        gpu.run("backward", 0.005)
    gpu.run("", 1.0)
    gpu.sample()
    view = gpu.ask()
    assert sum(e for e in energies(view).values() if e) == pytest.approx(gpu.true_j["forward"] + gpu.true_j["backward"], rel=0.01)
    for row in view.labels:
        assert row.low_j is not None
        assert row.high_j is not None
        assert row.low_j <= gpu.true_j[row.label] <= row.high_j
        assert row.high_j - row.low_j > 0.3 * gpu.true_j[row.label]


def test_one_short_span_has_an_answer_as_wide_as_its_doubt() -> None:
    gpu = Gpu()
    gpu.run("", 3.0)
    gpu.run("forward", 0.25)
    gpu.run("", 1.0)
    gpu.sample()
    (row,) = gpu.ask().labels
    assert row.low_j is not None
    assert row.high_j is not None
    assert row.low_j <= 100.0 <= row.high_j
    assert row.high_j < 400


def test_without_a_counter_power_readings_answer() -> None:
    gpu = Gpu()
    gpu.train(low_s=0.4)
    gpu.sample(counter=False)
    view = gpu.ask()
    assert view.method == "integrated"
    assert energies(view)["forward"] == pytest.approx(gpu.true_j["forward"], rel=0.03)


def unknown(view: SpansView) -> str:
    assert {row.energy_j for row in view.labels} == {None}
    assert {row.low_j for row in view.labels} == {None}
    assert all(row.time_s > 0 for row in view.labels)
    return view.note


def test_a_counter_that_restarts_inside_makes_it_unknown_and_one_before_does_not() -> None:
    gpu = Gpu()
    gpu.train()
    middle_ns = gpu.spans[40].begin_ns
    gpu.change = lambda r: r if r.time_ns < middle_ns else Reading(
        r.uuid, r.time_ns, r.health, 2, (r.energy_mj or 0) - 5_000_000, r.energy_time_ns, r.power_mw)  # fmt: skip
    gpu.sample()
    assert "counter restarted" in unknown(gpu.ask())
    later = [s for s in gpu.spans if s.begin_ns > middle_ns + NS]
    true_j = sum((s.end_ns - s.begin_ns) / NS * POWER_W[s.label] for s in later if s.label == "forward")
    assert energies(gpu.ask(later))["forward"] == pytest.approx(true_j, rel=0.015)


def test_a_gpu_that_was_lost_inside_is_unknown() -> None:
    gpu = Gpu()
    gpu.train()
    lost_ns = gpu.spans[40].begin_ns
    gpu.change = lambda r: Reading(GPU, r.time_ns, Health.LOST, 1) if lost_ns < r.time_ns < lost_ns + NS else r
    gpu.sample()
    assert unknown(gpu.ask()) == "GPU lost"


def test_spans_from_before_the_trace_are_unknown() -> None:
    gpu = Gpu()
    gpu.train()
    gpu.sample(from_s=10)
    assert "older than what is kept" in unknown(gpu.ask())


def test_a_time_without_samples_is_unknown() -> None:
    gpu = Gpu()
    gpu.train()
    first, last = gpu.spans[10].begin_ns, gpu.spans[78].begin_ns
    gpu.change = lambda r: Reading(GPU, 0, Health.WEDGED, 1) if first < r.time_ns < last else r
    gpu.sample(counter=False)
    assert "no power readings" in unknown(gpu.ask())


def test_the_trace_keeps_ten_minutes_and_no_more() -> None:
    gpu = Gpu()
    for _ in range(70):
        gpu.run("forward", 10.0)
    gpu.course = [(gpu.begin_ns, gpu.clock.at_ns, 400.0)]
    gpu.sample()
    trace = gpu.service._traces[GPU]
    assert 6000 <= len(trace) <= 6000 + 2 * 256
    assert trace.oldest_ns is not None
    assert gpu.clock.at_ns - KEEP_NS - 60 * NS < trace.oldest_ns <= gpu.clock.at_ns - KEEP_NS


S = NS


@pytest.mark.parametrize(
    ("spans", "says"),
    [
        ([], "no spans"),
        ([Span("a", 5 * S, 6 * S), Span("b", 4 * S, 5 * S)], r"span 1 \(b\) begins before"),
        ([Span("a", 5 * S, 7 * S), Span("b", 6 * S, 8 * S)], r"span 1 \(b\) begins before"),
        ([Span("a", 5 * S, 6 * S), Span("b", 7 * S, 6 * S)], r"span 1 \(b\) ends before it begins"),
        ([Span("", 5 * S, 6 * S)], "span 0: a label"),
        ([Span("a", 5 * S, 6 * S), Span("b", 6 * S, 2000 * S)], r"span 1 \(b\) ends in the future"),
        ([Span("a", n, n) for n in range(MAX_SPANS + 1)], "at most 20000"),
        ([Span(f"l{n}", n, n) for n in range(65)], "65 labels"),
    ],
)
def test_spans_that_make_no_sense_are_refused_by_number(spans: list[Span], says: str) -> None:
    gpu = Gpu()
    gpu.run("", 1.0)
    gpu.sample()
    with pytest.raises(RequestError, match=says):
        gpu.ask(spans)


def test_an_unknown_gpu_is_refused() -> None:
    service = EnergySpans(Now(), NS // 10)
    with pytest.raises(RequestError, match="GPU"):
        asyncio.run(service.answer(SpansRequest("GPU-x", (Span("a", 1, 2),))))


def test_labels_of_a_simulated_stage_are_within_one_and_a_half_percent() -> None:
    figures = summary(campaign(Setup(shortest_s=0.5, longest_s=0.5, seed=12, windows=8)))
    assert figures["worst_error_percent"] <= 1.5
    assert figures["covered_percent"] >= 93
    assert figures["median_half_width_percent"] <= 4, "an interval that covers everything tells nothing"


@pytest.mark.parametrize(("model", "seed"), [("a100-sxm-500w", 21), ("h100-sxm", 22)])
def test_intervals_cover_labels_of_any_length(model: str, seed: int) -> None:
    figures = summary(campaign(Setup(model=model, seed=seed, windows=12)))
    assert figures["covered_percent"] >= 93
    assert figures["mean_abs_error_percent"] <= 1
